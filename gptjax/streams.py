"""Standard input, output and error, whatever they are connected to: other encodings, closed readers, full disks.

Work is not given up because nobody reads what it says: a run that trains goes on, and so does whatever makes files.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from gptjax.errors import UserError


class _Output(io.FileIO):
    """Drops what cannot be written; `lost` is the first error that says why, but for a reader that has left."""

    def __init__(self, descriptor: int, ends_with_reader: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.lost: OSError | None = None
        self._ends_with_reader = ends_with_reader

    def write(self, data: "bytes | memoryview") -> int | None:
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:  # buffers are flushed once more when Python ends
                os.dup2(nowhere.fileno(), self.fileno())
            if not isinstance(error, BrokenPipeError):
                self.lost = error
            elif self._ends_with_reader:
                raise
            return len(data)


@contextlib.contextmanager
def safe_streams(ends_with_reader: bool = False) -> Iterator[None]:
    """Make printing safe for as long as a command runs; what is left in buffers is written at the end.

    A character that the encoding of standard output lacks becomes `?`. A stream that is closed is /dev/null.

    Args:
        ends_with_reader: what the command prints is all that it is for: `BrokenPipeError` where nobody reads it.

    Raises:
        UserError: at the end of the command, if standard output could not be written (the disk is full, say).
    """
    _open_closed_ones()
    before = sys.stdout, sys.stderr
    sys.stdout = _safe(sys.stdout, "replace", ends_with_reader)
    sys.stderr = _safe(sys.stderr, "backslashreplace", False)
    raw = _raw(sys.stdout)
    try:
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(ValueError):  # closed by what ran
                    stream.flush()
        if isinstance(raw, _Output) and raw.lost is not None:
            raise UserError(f"cannot write to standard output: {raw.lost.strerror}")
    finally:
        sys.stdout, sys.stderr = before


def _open_closed_ones() -> None:
    """Python has None for a stream that is closed, and the next file that is opened would take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="replace"))  # noqa: SIM115


def _raw(stream: TextIO) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _safe(stream: TextIO, errors: str, ends_with_reader: bool) -> TextIO:
    """The same stream, safe; of one that is no file only the characters are."""
    if type(_raw(stream)) is not io.FileIO:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
        return stream
    stream.flush()
    raw = _Output(stream.fileno(), ends_with_reader)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        stream.encoding,
        errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
