"""Reward model: a number for an answer, learned from answers of which people say which is better.

The second of InstructGPT's steps (Ouyang et al. 2022): the language model with a scalar head, all pairs of a prompt's
answers compared in one forward pass, so that none is learned from twice (Bradley and Terry 1952).
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import Config
from gptjax.data.conversations import SPLIT_BY, fingerprint, left_out, read_items, split_items
from gptjax.data.forms import ranked_answers_of
from gptjax.data.loader import RowStream, evaluation_rows, evenly_spaced
from gptjax.data.rankings import EncodedAnswers, PairRows, RankedRows, encode_answers, longest_answer, rounded
from gptjax.errors import UserError
from gptjax.evaluation.calibration import agreement, plot_calibration
from gptjax.model.gpt import GPT, Params
from gptjax.model.workload import Rows
from gptjax.parallel import distributed, sharding
from gptjax.parametrization import multipliers
from gptjax.stages import callbacks, chats, messages, start
from gptjax.stages.stage import Data, Stage
from gptjax.stages.weights import weights_of
from gptjax.text.chat import ChatFormat
from gptjax.text.templates import TEMPLATE_FILE
from gptjax.text.tokenizer import Tokenizer
from gptjax.training import run_dir
from gptjax.training.optimizer import make_optimizer
from gptjax.training.preference_losses import groups_of, reward_loss, rows_of, scores
from gptjax.training.state import TrainState

REWARD_FILE = "reward.json"
"""Mean and deviation of the scores of good answers, and how often the model agrees with people."""
PLOT_FILE = "calibration.png"


class Rankings(NamedTuple):
    """Answers of the two splits."""

    form: ChatFormat
    train: list[EncodedAnswers]
    validation: list[EncodedAnswers]

    @property
    def num_answers(self) -> int:
        return max(len(group.answers) for side in (self.train, self.validation) for group in side)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer with its prompt."""
        return max(longest_answer(side) for side in (self.train, self.validation))


def configure(config: Config) -> Config:
    """With the head that scores."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, value_head=True))


def load_data(config: Config, tokenizer: Tokenizer | None, log: Callable[[str], None]) -> Data:
    """Read all ranked answers, lay them out, and say what does not fit.

    Args:
        tokenizer: the run's own, where it goes on; None: that of `model.init_from` or of `tokenizer.path`.

    Raises:
        UserError: what cannot be read or compared; or an answer that does not fit under `data.on_long` stop.
    """
    tokenizer = tokenizer or start.tokenizer(config)
    form, skipped = chats.layout(config, tokenizer), Counter()
    items = read_items(config.data, ranked_answers_of, skipped)
    # A pair's tokens are inputs and, shifted by one, labels; a score is of the tokens alone.
    length, shifted, sides = config.sequence_length, config.stage != "reward", []
    for side in split_items(items, config.data, skipped):
        groups, counts = encode_answers(form, side, length, config.data, shifted)
        skipped += counts
        if not groups:
            raise UserError(f"no answers are left to compare that fit training.sequence_length {length}")
        sides.append(groups)
    log(f"data: {len(items):,} prompts, {len(sides[0]):,} to learn from, {len(sides[1]):,} held out{left_out(skipped)}")
    mark = fingerprint(
        [[item.prompt, item.answers, item.ranks] for item in items],
        *(tokenizer.fingerprint, form.template, length - (not shifted), config.data.on_long),
        *(config.data.on_error, config.data.split, SPLIT_BY, config.data.validation_fraction),
    )
    content = Rankings(form, *sides)
    if shifted:  # one to learn from is a pair, and the last token is no input
        num_rows = sum(len(PairRows([group], 0, 0)) for group in content.train)
        rows = Rows(2, rounded(content.longest - 1, length))
    else:
        num_rows, rows = len(content.train), Rows(content.num_answers, rounded(content.longest, length))
    return Data(tokenizer, mark, " ".join(config.data.path), num_rows, rows, content)


def example_rows(config: Config, data: Data, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The answers to the first prompt, (K, T), and which of their tokens are an answer's."""
    rankings = data.content
    group = rankings.train[0]
    row = RankedRows([group], len(group.answers), data.rows.num_tokens, data.tokenizer.padding_id)[0]
    mask_KT = np.zeros(row["tokens"].shape, bool)
    for k, answer in enumerate(group.answers):
        mask_KT[k, : len(answer.learned)] = answer.learned
    return row["tokens"], mask_KT


def open_stage(config: Config, data: Data, directory: Path, log: Callable[[str], None]) -> Stage:
    """The stage under the current mesh."""
    rankings, training, padding = data.content, config.training, data.tokenizer.padding_id
    num_answers, num_tokens = data.rows
    rows, held_out = (
        RankedRows(side, num_answers, num_tokens, padding) for side in (rankings.train, rankings.validation)
    )
    model, optimizer = GPT(config.model), make_optimizer(config.optimizer, multipliers(config.model))
    weights = weights_of(config, model, log)

    def evaluate(state: TrainState) -> dict[str, float]:
        found = agreement(*_scored(config, weights.whole(state.params), held_out, training.eval_sequences))
        return {"val_loss": found.loss, "val_accuracy": found.accuracy}

    def finish(state: TrainState) -> dict[str, Any]:
        scores_BK, ranks_BK = _scored(config, weights.whole(state.params), held_out, 0)
        found = agreement(scores_BK, ranks_BK)
        good = _best(*_scored(config, weights.whole(state.params), rows, 0))
        result = found._asdict() | {"mean": float(good.mean()), "std": float(good.std())}
        if distributed.is_first():
            run_dir.write_json(directory / REWARD_FILE, result)
            try:
                plot_calibration(scores_BK, ranks_BK, directory / PLOT_FILE)
            except UserError as error:
                log(f"no {PLOT_FILE}: {error}")
        low, high = found.interval
        log(f"agrees in {found.accuracy:.1%} of {found.pairs} held-out pairs (95 % interval {low:.1%} to {high:.1%})")
        return {"val_accuracy": found.accuracy, "val_accuracy_interval": [low, high]}

    return Stage(
        loss=weights.loss(reward_loss(model)),
        optimizer=optimizer,
        new_state=lambda: weights.new_state(optimizer),
        abstract_state=weights.abstract_state(optimizer),
        frozen=weights.frozen,
        stream=lambda position: RowStream([rows], training.seed, position, share=callbacks.share(config)),
        evaluate=evaluate,
        sample=lambda state, progress: None,  # it writes nothing
        finish=finish,
        description=lambda progress: [
            f"{len(rows):,} prompts with up to {num_answers} answers, rows of {num_tokens} tokens",
            *messages.of_rows(config, data, {" ".join(config.data.path): rows}, held_out),
        ],
        files={TEMPLATE_FILE: rankings.form.template},
    )


def read_reward(directory: Path) -> dict[str, Any]:
    """What `reward.json` of a finished reward model holds.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        return json.loads((directory / REWARD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no {REWARD_FILE}: it is no finished reward model; train one with configs/reward.py"
        ) from None
    except ValueError as error:
        raise UserError(f"{directory / REWARD_FILE} is not JSON: {error}") from None


def _scored(config: Config, params: Params, rows: RankedRows, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ranks of all answers, or of evenly spaced prompts', both (B, K)."""
    model, batch_size = GPT(callbacks.as_used(config.model)), config.training.resolved_micro_batch_size

    @jax.jit
    def score(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        flat = {name: rows_of(batch[name]) for name in ("tokens", "ends")}
        return sharding.reshard(groups_of(scores(model, params, flat), batch["tokens"].shape[1]), "stack", "stack")

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch, count in evaluation_rows(rows, batch_size, limit, callbacks.share(config)):
            put = {name: sharding.put_batch(batch[name], batch_size, lead=0) for name in ("tokens", "ends")}
            yield np.asarray(score(params, put))[:count], count

    found = np.concatenate([scores_BK for scores_BK, _ in batches()])
    return found, np.stack([rows[number]["ranks"] for number in evenly_spaced(len(rows), limit)])


def _best(scores_BK: np.ndarray, ranks_BK: np.ndarray) -> np.ndarray:
    """The score of the best answer to each prompt."""
    return scores_BK[np.arange(len(scores_BK)), np.where(ranks_BK < 0, np.iinfo(np.int32).max, ranks_BK).argmin(axis=1)]
