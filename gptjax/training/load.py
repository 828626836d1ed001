"""A finished or running run, ready to be used."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from gptjax.config import Config, ModelConfig, TokenizerConfig, TrainingConfig, foreign_row_tokens
from gptjax.errors import UserError
from gptjax.interop import huggingface
from gptjax.interop.places import is_foreign
from gptjax.model import lora
from gptjax.model.gpt import GPT, Params
from gptjax.resolve import default_compute_dtype, resolve
from gptjax.text.tokenizer import Tokenizer
from gptjax.training import checkpoint, recovery
from gptjax.training.run_dir import CHECKPOINTS, TOKENIZER_FILE, load_run_config
from gptjax.training.state import abstract, draw_trained


@dataclass(frozen=True)
class Run:
    """A run's model at one step.

    Example:
        run = load_run("runs/quickstart")
        logits, _ = run.model.apply({"params": run.params}, tokens)
    """

    directory: Path
    config: Config
    tokenizer: Tokenizer
    model: GPT
    params: Params
    step: int


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load_run(
    directory: str | os.PathLike,
    step: int | str = "last",
    *,
    verify: bool = True,
    log: Callable[[str], None] = _to_stderr,
) -> Run:
    """Load configuration, tokenizer and parameters of a run, onto the current mesh or the default device.

    Of a Hugging Face directory or a GGUF file, too, which have one step, 0. Adapters are merged into the run that they
    adapt. Nothing is written. In place of a damaged checkpoint that was not named by its number, the next one is used.

    Args:
        step: a step that has a checkpoint, `last`, or `best` (lowest validation loss).
        verify: compare the checkpoint's checksums first, which reads all of it, the optimizer's state too.
        log: gets a line about each checkpoint that is damaged or has no checksums.

    Raises:
        UserError: the folder is no run, has no such checkpoint, or it is damaged.
    """
    directory = Path(directory)
    if is_foreign(directory):
        return _load_foreign(directory, log)
    config, _ = load_run_config(directory)
    tokenizer = Tokenizer.load(directory / TOKENIZER_FILE).with_vocab_size(config.model.vocab_size)
    # A run trained in bfloat16 on an accelerator is used in float32 on a CPU, and the other way round; a kernel that it
    # was told to train with need not exist here; and eight-bit products become whole ones, which need no such chip and
    # cost little where weights are read once a token.
    dtype = default_compute_dtype(jax.devices()[0].platform)
    model_config = dataclasses.replace(config.model, compute_dtype=dtype, attention_kernel="auto", fp8=False)
    config = dataclasses.replace(config, model=model_config)
    model = GPT(config.model)
    checkpoints = directory / CHECKPOINTS
    number = _step_number(checkpoints, step, verify, log)
    trained = abstract(functools.partial(draw_trained, model, config.lora))
    params = checkpoint.restore_params(checkpoints, number, trained, _place(config))
    if config.lora.rank:
        base = load_run(config.model.init_from, verify=verify, log=log).params
        params = jax.jit(lambda trained, base: lora.merge(lora.join(base, trained, config.lora)))(params, base)
    return Run(directory, config, tokenizer, model, params, number)


def _load_foreign(directory: Path, log: Callable[[str], None]) -> Run:
    model = huggingface.read_config(directory)
    tokenizer = huggingface.read_tokenizer(directory, model, log)
    given = Config(
        model=model,
        tokenizer=TokenizerConfig(path=str(directory)),
        training=TrainingConfig(sequence_length=foreign_row_tokens(model)),
        run_dir=str(directory),
    )
    config = resolve(given, jax.devices(), tokenizer)
    params = huggingface.read_params(directory, config.model)
    return Run(directory, config, tokenizer, GPT(config.model), params, 0)


def _place(config: Config) -> tuple[str, ...]:
    """Where a run's state has the parameters that are used in the end."""
    if config.stage == "ppo":
        return ("extra", "average") if config.ppo.ema_decay else ("params", "policy")
    return ("params",)


def load_draft(directory: str | os.PathLike, run: Run) -> tuple[ModelConfig, Params]:
    """Configuration and parameters of a run whose model is to guess for another's.

    Raises:
        UserError: as `load_run`, or it has another tokenizer.
    """
    draft = load_run(directory)
    if draft.tokenizer.token_bytes() != run.tokenizer.token_bytes():
        raise UserError(
            f"the draft {directory} has another tokenizer ({draft.tokenizer.vocab_size} tokens) than {run.directory} "
            f"({run.tokenizer.vocab_size}); train one with --tokenizer.path {run.directory / TOKENIZER_FILE}"
        )
    return draft.config.model, draft.params


def _step_number(checkpoints: Path, step: int | str, verify: bool, log: Callable[[str], None]) -> int:
    if step in ("last", "best"):
        order = checkpoint.steps_by_age if step == "last" else checkpoint.steps_by_loss
        choice = recovery.choose(checkpoints, order, verify=verify)
    else:
        try:
            number = int(step)
        except ValueError:
            raise UserError(f"step {step!r} is neither last, best nor a number") from None
        choice = recovery.require_usable(checkpoints, number, verify=verify)
    for line in choice.lines():
        log(line)
    return choice.step
