"""A scaling study as data, and the runs that it asks for. Only the standard library is imported.

A study's file assigns one to `study`. Every combination of sizes, grid and budgets is one run.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptjax.checks import require
from gptjax.config import Config, ModelConfig
from gptjax.config_files import flat, replace_fields, run_file
from gptjax.errors import UserError
from gptjax.model.accounting import training_flops_per_token
from gptjax.resolve import evaluation_sequences
from gptjax.scaling.laws import Counting, counted_parameters
from gptjax.training.schedule import final_progress, steps_for

BYTE_VOCABULARY = 272
"""Tokens of a `byte` tokenizer: the bytes and the reserved special ones."""


@dataclass(frozen=True)
class Study:
    """What to train, and what it is to tell."""

    question: str
    """What the study is to answer, in a sentence."""
    base: Config
    """What all runs have in common."""
    sizes: Mapping[str, Mapping[str, Any]]
    """By name, from small to large: fields (`section.field`) in which a size differs from the base."""
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields and their values, all combinations of which are trained of each size: learning rates, seeds."""
    tokens: tuple[int, ...] = ()
    """Tokens to train on. One of the three budgets is given."""
    tokens_per_parameter: tuple[float, ...] = ()
    """The same, as multiples of the parameters that are counted."""
    flops: tuple[float, ...] = ()
    """FLOPs to spend on training, as `accounting.training_flops_per_token` counts them: an isoFLOP study."""
    predict: tuple[str, ...] = ()
    """Sizes whose losses are predicted from the others', and written down, before they are trained."""
    counts: Counting = "non_embedding_and_head"
    """Which parameters the fit counts, in the words of `laws.py`."""
    branch_cooldowns: bool = False
    """Train each size once at a constant rate, and branch each budget's cooldown off (Hägele et al. 2024)."""

    def __post_init__(self):
        require(bool(self.sizes), "the study has no sizes; give one at least, as {'small': {'model.num_layers': 4}}")
        budgets = [name for name in ("tokens", "tokens_per_parameter", "flops") if getattr(self, name)]
        given = " and ".join(budgets) or "none of them"
        require(len(budgets) == 1, f"a study has one of tokens, tokens_per_parameter and flops, and this has {given}")
        for name in budgets:
            low = [value for value in getattr(self, name) if not 0 < value < float("inf")]
            require(not low, f"{name} has {low[:1]}, but a budget must be positive")
        unknown = [name for name in self.predict if name not in self.sizes]
        require(not unknown, f"predict names {unknown}, but the sizes are {', '.join(self.sizes)}")
        known = flat(self.base)
        for where, fields in (("grid", self.grid), *((f"size {name}", fields) for name, fields in self.sizes.items())):
            for name in fields:
                require(name in known, f"{where} sets {name}, which is no field of the configuration")
        for name, values in self.grid.items():
            require(len(set(values)) == len(values) > 0, f"the grid's {name} is {values}, but must be different values")
        if self.branch_cooldowns:
            optimizer, training = self.base.optimizer, self.base.training
            require(
                optimizer.schedule == "wsd" and not optimizer.warmup_tokens and not optimizer.decay_tokens,
                f"branch_cooldowns needs optimizer.schedule wsd, with its warm-up in steps, and this is "
                f"{optimizer.schedule}",
            )
            require(training.batch_ramp_start is None, "branch_cooldowns needs a constant batch, without a ramp")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    name: str
    """Of its folder."""
    size: str
    trunk: str
    """What it has in common with the runs of other budgets: size and grid."""
    config: Config
    parameters: int
    """As the study counts them."""
    tokens: int
    """Trained on, in whole steps."""
    flops: float
    budget: float
    """What the study's file says, in its own unit."""
    predicted: bool


def load_study(path: str | os.PathLike) -> Study:
    """Read a Python file that assigns `study`.

    Raises:
        UserError: the file is missing, or holds no study.
    """
    path = Path(path)
    require(path.is_file(), f"no study's file {path}; those that ship with gptjax lie in configs/studies/")
    study = run_file(path).get("study")
    require(isinstance(study, Study), f"{path} does not assign `study = Study(...)`")
    return study


def expand(study: Study) -> list[PlannedRun]:
    """The runs of a study, small sizes and small budgets first.

    Raises:
        UserError: a combination is no configuration, a budget has not one step, or two runs have one name.
    """
    runs = _evaluated_alike(list(_runs(study)))
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"two runs of the study would be called {twice}; give budgets that differ in three digits")
    return runs


def _evaluated_alike(runs: list[PlannedRun]) -> list[PlannedRun]:
    """With as many held-out sequences for each, where they say nothing of it: what the shortest run can pay for."""
    silent = [run for run in runs if run.config.training.eval_sequences is None]
    if not silent:
        return runs
    common = {"training.eval_sequences": min(evaluation_sequences(run.config.training) for run in silent)}
    return [
        dataclasses.replace(run, config=replace_fields(run.config, common)) if run in silent else run for run in runs
    ]


def _runs(study: Study) -> Iterator[PlannedRun]:
    for size, fields in study.sizes.items():
        for values in itertools.product(*study.grid.values()):
            chosen = dict(zip(study.grid, values, strict=True))
            trunk = "-".join([size, *(f"{name.split('.')[-1]}_{_word(value)}" for name, value in chosen.items())])
            try:
                config = replace_fields(study.base, {**fields, **chosen})
            except UserError as error:
                raise UserError(f"{trunk}: {error}") from None
            model = with_vocabulary(config)
            parameters, T = counted_parameters(model, study.counts), config.sequence_length
            per_token = training_flops_per_token(model, T).total
            for budget in study.tokens or study.tokens_per_parameter or study.flops:
                factor = 1.0 if study.tokens else parameters if study.tokens_per_parameter else 1 / per_token
                tokens = budget * factor
                steps = round(steps_for(config.training, T, tokens / T))
                first = config.training.resolved_batch_ramp_start * T
                require(
                    steps > 0, f"{trunk}: a budget of {budget:g} is {tokens:.3g} tokens, less than a step's {first}"
                )
                name = f"{trunk}-{_word(tokens)}tokens"
                finished = replace_fields(config, {"training.steps": steps, "optimizer.decay_steps": steps})
                predicted = size in study.predict
                trained = final_progress(finished.training, T).tokens
                yield PlannedRun(
                    *(name, size, trunk, finished, parameters),
                    *(trained, float(trained * per_token), float(budget), predicted),
                )


def planned_vocab_size(config: Config) -> int:
    """Of the tokenizer to come: studies and runs are planned before it is made.

    Raises:
        UserError: only the text says.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    kind = config.tokenizer.kind
    require(
        kind != "char" and not config.tokenizer.path,
        "parameters are counted before there is a tokenizer; give model.vocab_size, or tokenizer.kind bpe or byte",
    )
    return config.tokenizer.vocab_size if kind == "bpe" else BYTE_VOCABULARY


def with_vocabulary(config: Config) -> ModelConfig:
    """The model with the vocabulary that `planned_vocab_size` says."""
    return dataclasses.replace(config.model, vocab_size=planned_vocab_size(config))


def _word(value: Any) -> str:
    """A value as part of a folder's name: three digits and a suffix for large numbers."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) >= 1000:
            power = next(p for p in (12, 9, 6, 3) if abs(value) >= 10**p or p == 3)
            return f"{value / 10**power:.3g}{ {3: 'k', 6: 'M', 9: 'G', 12: 'T'}[power] }"
        return f"{value:.3g}"
    return re.sub(r"[^A-Za-z0-9.]+", "_", str(value))
