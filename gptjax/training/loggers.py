"""Metrics to TensorBoard, Weights & Biases or trackio, beside `metrics.jsonl`."""

import contextlib
import importlib
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from gptjax.config import Config
from gptjax.config_files import to_dict
from gptjax.errors import UserError

PROJECT = "gptjax"
TENSORBOARD_DIR = "tensorboard"
ID_FILE = "tracking_id.txt"
"""Keeps what a run is called at W&B and trackio, so that a continued run goes on there, too."""
EXTRAS = {"tensorboard": ("tensorboardX", "log"), "wandb": ("wandb", "wandb"), "trackio": ("trackio", "trackio")}
"""The package of each logger, and the extra that installs it."""


class Logger(NamedTuple):
    """Somewhere metrics go."""

    log: Callable[[Mapping[str, Any]], None]
    """Takes a record of `metrics.jsonl`."""
    close: Callable[[], None]
    go_back: Callable[[int], None] = lambda step: None
    """Forgets what was logged of steps after this one, which come again; W&B and trackio cannot."""


@contextlib.contextmanager
def open_loggers(directory: Path, config: Config, step: int, warn: Callable[[str], None]) -> Iterator[list[Logger]]:
    """The loggers of `training.log_to`, closed in the end. One that fails later is left out, and the run goes on.

    Args:
        directory: of the run.
        step: that the run starts after: what was logged of later ones comes again.
        warn: told in one line of a logger that failed.

    Raises:
        UserError: a package is missing, or a logger cannot be opened.
    """
    loggers = [_forgiving(kind, open_logger(kind, directory, config, step), warn) for kind in config.training.log_to]
    try:
        yield loggers
    finally:
        for logger in loggers:
            logger.close()


def open_logger(kind: str, directory: Path, config: Config, step: int) -> Logger:
    """One logger, of a kind that `training.log_to` names.

    Raises:
        UserError: its package is missing, or it cannot be opened.
    """
    module = _package(kind)
    try:
        if kind == "tensorboard":
            return _open_tensorboard(module, directory, step)
        return _open_tracker(module, directory, config)
    except Exception as error:  # each has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"training.log_to {kind} cannot be opened: {reason}") from error


def require_packages(kinds: Sequence[str]) -> None:
    """Check that the loggers' packages are there.

    Raises:
        UserError: one is missing.
    """
    for kind in kinds:
        _package(kind)


def _package(kind: str) -> ModuleType:
    package, extra = EXTRAS[kind]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f'training.log_to {kind} needs {package}: pip install "gptjax[{extra}]"') from error


def _open_tensorboard(module: ModuleType, directory: Path, step: int) -> Logger:
    def open_writer(step: int) -> Any:
        # Files are named after the second: another one of the same second would take this one's place.
        suffix = f".{uuid.uuid4().hex[:8]}"
        return module.SummaryWriter(str(directory / TENSORBOARD_DIR), purge_step=step + 1, filename_suffix=suffix)

    writer = open_writer(step)

    def go_back(step: int) -> None:
        nonlocal writer
        writer.close()
        writer = open_writer(step)

    def log(record: Mapping[str, Any]) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return Logger(log, lambda: writer.close(), go_back)


def _open_tracker(module: ModuleType, directory: Path, config: Config) -> Logger:
    """W&B, or trackio, which has its interface."""
    id_file = directory / ID_FILE
    if not id_file.exists():
        id_file.write_text(f"{directory.name}-{uuid.uuid4().hex[:8]}\n", encoding="utf-8")
    name = id_file.read_text(encoding="utf-8").strip()
    options = {"id": name, "dir": str(directory)} if module.__name__ == "wandb" else {}
    module.init(project=PROJECT, name=name, config=to_dict(config), resume="allow", **options)
    return Logger(lambda record: module.log(_numbers(record), step=record["step"]), module.finish)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn: no step, nothing unknown, nothing infinite."""
    values = {name: value for name, value in record.items() if name != "step" and value is not None}
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _forgiving(kind: str, logger: Logger, warn: Callable[[str], None]) -> Logger:
    failed = False

    def attempt(action: Callable[..., None], *arguments: Any) -> None:
        nonlocal failed
        if failed:
            return
        try:
            action(*arguments)
        except Exception as error:  # a network that is down must not cost the run
            failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            warn(f"{kind} is left out from here on: {reason}")

    return Logger(
        lambda record: attempt(logger.log, record),
        lambda: attempt(logger.close),
        lambda step: attempt(logger.go_back, step),
    )
