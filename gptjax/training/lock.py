"""One run at a time writes into a folder, and knows when that is no longer there. Of its processes the first does."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from gptjax.errors import UserError
from gptjax.parallel import distributed

LOCK_FILE = "run.lock"


@contextlib.contextmanager
def hold(directory: str | os.PathLike, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Keep other runs out of a folder, by `flock` on its `run.lock`, which says who holds it.

    The operating system gives the lock back when this process is gone, however it went, so that nothing is ever to be
    removed by hand. On NFS the lock holds between machines (Linux 2.6.12 and later), and that of a machine which is
    lost goes when its lease ends, some 90 seconds later. Lustre needs the mount option `flock`; with `localflock` only
    the runs of one machine see each other. Where a file system knows no locks, that is said and the run goes on.

    Args:
        say: gets a line where the folder cannot be locked.

    Yields:
        A function that raises `UserError` if the folder was moved, renamed or deleted since: what is written to a path
        that is gone would make half a run there.

    Raises:
        UserError: another run holds the folder, and which one.
    """
    path = Path(directory) / LOCK_FILE
    with distributed.together():
        file = _lock(path, say) if distributed.is_first() else None
    if file is None:
        yield lambda: None
        return
    here = os.open(directory, os.O_RDONLY)  # while it is open, no other folder gets its number
    try:
        _sign(file)
        yield lambda: _require_there(here, directory)
    finally:
        if _is_same(file.fileno(), path):
            path.unlink()
        os.close(here)
        file.close()


def _lock(path: Path, say: Callable[[str], None]) -> IO[str]:
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                say(f"{path.parent} cannot be locked ({error.strerror}): take care that no other run writes there")
                return file
            holder = _holder(file)
            file.close()
            raise UserError(
                f"{path.parent} is in use by {holder}; wait until it ends, or choose another --run-dir"
            ) from None
        if _is_same(file.fileno(), path):
            return file
        file.close()  # its holder has just ended and removed it: the lock of a file that nobody else finds


def _sign(file: IO[str]) -> None:
    card = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
        file.truncate(0)
        file.write(json.dumps(card) + "\n")
        file.flush()


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        card = json.loads(file.read())
        return f"process {card['pid']} on {card['host']} since {card['since']}"
    except (ValueError, KeyError, OSError):
        return "another process"


def _is_same(opened: int, path: str | os.PathLike) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), os.stat(path))
    except OSError as error:  # ESTALE: another machine has removed it
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            raise
        return False


def _require_there(here: int, directory: str | os.PathLike) -> None:
    if not _is_same(here, directory):
        raise UserError(
            f"{directory} was moved, renamed or deleted while this run wrote there; continue it from where it is now"
        )
