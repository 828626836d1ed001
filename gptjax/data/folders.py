"""Folders that appear whole or not at all, with one process at a time writing them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from gptjax.plain_files import named

LOCK, PARTIAL = ".lock", ".partial"
NO_CONTENT = {LOCK, PARTIAL, "lost+found"}
"""Names that do not make a folder count as full: our own helpers, and the folder that ext4 puts on every disk."""


def is_empty(folder: Path) -> bool:
    """Whether something may be made there: nothing is there, or a folder that holds nothing."""
    return not os.path.lexists(folder) or (folder.is_dir() and {path.name for path in folder.iterdir()} <= NO_CONTENT)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Whoever comes second waits, and finds the folder made; a killed process holds no lock. Nothing is left behind: no
    lock, and after an error no parent of the folder that was not there before."""
    folder = folder.resolve()
    lock = FileLock(_helper(folder, LOCK))
    made = [parent for parent in folder.parents if not parent.exists()]
    while not lock.is_locked:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # who had the lock has just removed the parent that it had made
            lock.acquire()
    try:
        yield
    except BaseException:
        _unlock(lock)
        for parent in made:
            with suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise
    _unlock(lock)


def _unlock(lock: FileLock) -> None:
    """Remove the file while it is still locked: whoever waits for it sees that it is gone, and locks a new one."""
    with suppress(OSError):  # Windows removes no open file
        Path(lock.lock_file).unlink()
    lock.release()


@contextmanager
def written_whole(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write in, whose files become those of `folder` when all went well; call it under a lock.

    A folder that is there already stays the same one, as it may be a link, a mount or the working directory.

    Args:
        last: the file that makes the folder what it is, which gets there after all others.
    """
    folder = folder.resolve()
    partial = _helper(folder, PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
        if partial.parent != folder:
            partial.rename(folder)
            return
        (folder / last).unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.name not in NO_CONTENT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _helper(folder: Path, name: str) -> Path:
    """In the folder, if there is one: its parent may not be ours to write in. Else beside it."""
    if folder.is_dir():
        return folder / name
    return folder.with_name(named(f".{folder.name}", name))
