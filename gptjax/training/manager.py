"""Orbax's checkpoint manager, as a run wants it: what it keeps, and how it fails."""

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from gptjax.errors import UserError
from gptjax.parallel import distributed
from gptjax.training.integrity import write_manifest

ITEMS = ("state", "metadata")
"""What each step's folder holds: the arrays, and a JSON of everything else."""
REMOVED = "removed"
"""Where a step goes that is to be removed, in one rename: it is gone at once, however long removing its files takes."""


def open_manager(
    directory: str | os.PathLike,
    options: ocp.CheckpointManagerOptions | None = None,
    bytes_at_once: int | None = None,
) -> ocp.CheckpointManager:
    """A manager of `directory/STEP/`.

    Args:
        options: None reads only.
        bytes_at_once: most to read at the same time; None: Orbax's default.

    Raises:
        UserError: a checkpoint of the folder, or the folder itself, cannot be read.
    """
    state = ocp.PyTreeCheckpointHandler(
        # What training leaves in a mantissa is noise: compressing it saves little, and holds all of it once more.
        use_compression=False,
        # A read as large as this is refused, so a little more.
        restore_concurrent_gb=None if bytes_at_once is None else (1.01 * bytes_at_once + 1) / 1e9,
    )
    failures: list[Exception] = []
    _watch(state, failures)
    try:
        manager = Manager(
            Path(directory).absolute(),
            item_handlers={"state": state, "metadata": ocp.JsonCheckpointHandler()},
            # A reader of one step does not look into the others, which may be damaged.
            options=options or ocp.CheckpointManagerOptions(create=False, lightweight_initialize=True),
        )
    except (ValueError, OSError) as error:
        raise UserError(f"the checkpoints in {directory} cannot be opened: {one_line(error)}") from error
    manager.failures = failures
    return manager


def _watch(handler: ocp.PyTreeCheckpointHandler, failures: list[Exception]) -> None:
    """Note what fails in this process: of several, Orbax lets none know before it has waited minutes for the others."""
    save = handler.async_save

    async def async_save(*args: Any, **kwargs: Any) -> list["_Watched"]:
        return [_Watched(future, failures) for future in await save(*args, **kwargs)]

    handler.async_save = async_save


@dataclass(frozen=True)
class _Watched:
    """A future of Orbax's whose failure is noted."""

    future: ocp.future.Future
    failures: list[Exception]

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self.future.result(timeout)
        except Exception as error:
            self.failures.append(error)
            raise

    def cancel(self) -> bool | None:
        return self.future.cancel()


@dataclass(frozen=True)
class NewestAndBest:
    """Orbax's own policies do not do this: best-of deletes the newest, or keeps all that were not evaluated."""

    newest: int
    best: int

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        del context
        losses = {info.step: validation_loss(info.metrics) for info in checkpoints}
        steps = sorted(losses)
        evaluated = [step for step in steps if losses[step] < math.inf]
        keep = {*steps[-self.newest :], *sorted(evaluated, key=losses.__getitem__)[: self.best]}
        return [info.step in keep for info in checkpoints]


@dataclass(frozen=True)
class _RenamingDeleter:
    """Orbax's, which renames a step to `removed/STEP`, and then removes that.

    A kill in between leaves nothing half removed under a step's number.
    """

    deleter: Any
    directory: Path

    def delete(self, step: int) -> None:
        self.delete_steps([step])

    def delete_steps(self, steps: Sequence[int]) -> None:
        self.deleter.delete_steps(steps)
        remove_removed(self.directory)

    def close(self) -> None:
        self.deleter.close()


class Manager(ocp.CheckpointManager):
    """Orbax's, with failures in one line, and without its questions to JAX's preemption service.

    The service takes the number in the newest question, whoever asks, for how far this process is, and agrees on the
    next one. Orbax asks with the step and the loop counts dispatches since its start: after a save the processes
    would agree on a number that the loop reaches much later, or never.
    """

    failures: Sequence[Exception] = ()
    """What this process could not write; the others may not know of it yet."""

    def __init__(self, directory: Path, **arguments: Any):
        super().__init__(directory, **arguments)
        self._checkpoint_deleter = _RenamingDeleter(self._checkpoint_deleter, directory)

    def reached_preemption(self, step: int) -> bool:
        del step
        return False

    def wait_until_finished(self) -> None:
        with clear_failure(self):
            super().wait_until_finished()


def validation_loss(metrics: Mapping[str, float] | None) -> float:
    """In nats a token; infinite where there was no evaluation."""
    return (metrics or {}).get("val_loss", math.inf)


def all_steps(directory: str | os.PathLike) -> list[int]:
    """The steps whose checkpoints are complete, in order: until then their folders have longer names."""
    try:
        names = [path.name for path in Path(directory).iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"the checkpoints in {directory} cannot be listed: {error.strerror}") from error
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


@contextlib.contextmanager
def clear_failure(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Say in one line why a save failed, and remove what it had written, which may be what fills the disk."""
    try:
        yield
    except Exception as error:
        gone = None if manager.directory.exists() else "the folder is no longer there"
        cause = _system_cause(error) or gone
        if cause is None:
            raise
        remove_unfinished(manager.directory)
        raise UserError(
            f"a checkpoint could not be saved in {manager.directory} ({cause}); "
            f"those that are there stay: {listed(all_steps(manager.directory))}"
        ) from error


def _system_cause(error: Exception) -> str | None:
    """The operating system's words for why a file could not be written, which storage libraries bury in a paragraph."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT)
    words = next((os.strerror(number) for number in numbers if os.strerror(number) in str(error)), None)
    return words or getattr(error, "strerror", None)


def write_manifests(directory: str | os.PathLike) -> None:
    """The checksums of the step that is being saved, into its folder, which has not got its name yet."""
    for folder in _unfinished(directory):
        write_manifest(folder)


def _unfinished(directory: str | os.PathLike) -> list[Path]:
    """The folder that is being written: of an earlier one nothing is left."""
    return [*Path(directory).glob(f"*{ocp.utils.TMP_DIR_SUFFIX}")]


def remove_unfinished(directory: str | os.PathLike) -> None:
    """Remove what a failed save has written. Only for the run that writes: a reader would remove a save under way."""
    if distributed.is_first():
        for folder in _unfinished(directory):
            shutil.rmtree(folder, ignore_errors=True)


def remove_removed(directory: str | os.PathLike) -> None:
    """Remove the files of removed steps, those included that a killed run left."""
    if distributed.is_first():
        shutil.rmtree(Path(directory) / REMOVED, ignore_errors=True)


def listed(steps: Iterable[int]) -> str:
    """Steps for a message: `4, 8`, or `none`."""
    return ", ".join(map(str, sorted(steps))) or "none"


def one_line(error: Exception) -> str:
    """Storage errors run to paragraphs; the first words say what is wrong."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:160] + "…"
