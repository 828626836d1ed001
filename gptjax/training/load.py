"""A finished or running run, ready to be used."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import jax

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model.gpt import GPT, Params
from gptjax.resolve import default_compute_dtype
from gptjax.text.tokenizer import Tokenizer
from gptjax.training import checkpoint
from gptjax.training.run_dir import CHECKPOINTS, TOKENIZER_FILE, load_run_config
from gptjax.training.state import abstract_params


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


def load_run(directory: str | os.PathLike, step: int | str = "last") -> Run:
    """Load configuration, tokenizer and parameters of a run, onto the current mesh or the default device.

    Args:
        step: a step that has a checkpoint, `last`, or `best` (lowest validation loss).

    Raises:
        UserError: the folder is no run, or has no such checkpoint.
    """
    directory = Path(directory)
    config, _ = load_run_config(directory)
    tokenizer = Tokenizer.load(directory / TOKENIZER_FILE)
    # A run trained in bfloat16 on an accelerator is used in float32 on a CPU, and the other way round.
    dtype = default_compute_dtype(jax.devices()[0].platform)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))
    model = GPT(config.model)
    checkpoints = directory / CHECKPOINTS
    number = _step_number(checkpoints, step)
    params = checkpoint.restore_params(checkpoints, number, abstract_params(model))
    return Run(directory, config, tokenizer, model, params, number)


def _step_number(checkpoints: Path, step: int | str) -> int:
    if step == "last":
        return checkpoint.latest_step(checkpoints)
    if step == "best":
        return checkpoint.best_step(checkpoints)
    try:
        return int(step)
    except ValueError:
        raise UserError(f"step {step!r} is neither last, best nor a number") from None
