"""The objects of a file of data: JSON in each of its layouts, and parquet, compressed by gzip or Zstandard or not."""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptjax.errors import UserError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
PARQUET_ROWS = 256
CONTAINERS = ("data", "train", "rows", "examples", "samples", "records", "instances", "items", "entries")
"""Under one of these an object that is the whole file may hold the array of objects that are meant."""
MOST_DIGITS = 4000
"""Python reads no integer of more than 4,300 digits."""


class Problem(NamedTuple):
    """Something that gives no object or text; `expected` where it is no fault."""

    reason: str
    message: str
    expected: bool = False

    @property
    def is_file(self) -> bool:
        """Whether it is about the rest of a file, not about one line of it."""
        return "files" in self.reason.split()

    @property
    def lacks_field(self) -> bool:
        """Whether another name of the field that holds the text may help."""
        return self.reason.endswith("without text field")


class Record(NamedTuple):
    """One object, and where it came from: a file and the line or row."""

    values: dict[str, Any]
    origin: str


def read_records(path: Path) -> Iterator[Record | Problem]:
    """The objects of a JSON or parquet file, and what in it is none.

    Raises:
        UserError: a package that this format needs is missing.
    """
    readers = dict.fromkeys(JSON_SUFFIXES, read_json) | {".parquet": read_parquet}
    suffix = form(path)
    if suffix not in readers:
        yield Problem("unreadable files", f"{path} is none of {', '.join(readers)}, which hold examples")
        return
    yield from guarded(path, readers[suffix](path), is_named=True)


def form(path: Path) -> str:
    """The suffix of what a file holds, decompressed."""
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def guarded(path: Path, items: Iterator[Any], is_named: bool) -> Iterator[Any]:
    """The items of a file, and what keeps the rest of it from being read."""
    nothing = True
    try:
        for item in items:
            nothing = False
            yield item
    except (OSError, EOFError, zlib.error) as error:
        yield Problem("unreadable files", f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
        return
    if nothing:
        yield Problem("empty files", f"{path} is empty", expected=not is_named)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed.

    Raises:
        OSError: it cannot be read. A pipe or a device is not tried: reading it may never end, and works only once.
    """
    _require_file(path)
    match path.suffix.lower():
        case ".gz":
            stream = gzip.open(path, "rb")  # noqa: SIM115 -- closed below
        case ".zst":
            # Arrow's, because the zstandard package takes a file that was cut short for a whole one.
            stream = io.BufferedReader(_pyarrow().input_stream(path, compression="zstd"))
        case _:
            stream = path.open("rb")
    with stream:
        yield stream


def _require_file(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise OSError(f"it is a link to {path.readlink()}, which does not exist")
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is a pipe or a device, not a file")


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError('.parquet and .zst files need pyarrow: pip install "gptjax[data]"') from error
    return pyarrow


def read_json(path: Path) -> Iterator[Record | Problem]:
    """The objects of a JSON file, whatever its name: one a line, an array, or an array under one of `CONTAINERS`."""
    with opened(path) as stream:
        lines = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        second = next(lines, None)
        if _is_a_line(first[1], second, form(path)):
            for number, line in itertools.chain([first], [second] if second else [], lines):
                yield _object(line, f"{path}:{number}")
            return
        raw = first[1] + (second[1] if second else b"") + stream.read()
    try:
        values = _loads(raw)
    except UnicodeDecodeError as error:
        yield Problem("undecodable files", f"{path} is not UTF-8: byte {bad_byte(error, raw)}")
    except (ValueError, RecursionError) as error:
        yield Problem("broken files", f"{path} is not JSON: {error}")
    else:
        yield from _objects(values, path)


def _is_a_line(first: bytes, second: object, suffix: str) -> bool:
    """Whether the first line of a file is an object, or should have been one, and not the beginning of a whole."""
    try:
        value = _loads(first)
    except (ValueError, RecursionError):
        begun = first.removeprefix(codecs.BOM_UTF8).strip()
        return suffix != ".json" and not begun.startswith(b"[") and begun != b"{"
    return second is not None or not (isinstance(value, list) or (isinstance(value, dict) and _arrays(value)))


def _objects(values: Any, path: Path) -> Iterator[Record | Problem]:
    """The objects that a whole file holds."""
    arrays = _arrays(values) if isinstance(values, dict) else []
    if len(arrays) == 1:
        values = values[arrays[0]]
    elif arrays:
        names = " and ".join(arrays)
        yield Problem("broken files", f"{path} has arrays of objects under {names}; give each a file of its own")
        return
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        yield _record(value, f"{path}:{number}")


def _arrays(values: dict[str, Any]) -> list[str]:
    """The names of `CONTAINERS` under which an object holds objects."""
    return [
        name
        for name in CONTAINERS
        if isinstance(held := values.get(name), list) and held and all(isinstance(value, dict) for value in held)
    ]


def _loads(raw: bytes) -> Any:
    return json.loads(raw.decode("utf-8-sig"), parse_int=_number)


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)


def _object(line: bytes, origin: str) -> Record | Problem:
    try:
        return _record(_loads(line), origin)
    except UnicodeDecodeError as error:
        return Problem("undecodable lines", f"{origin} is not UTF-8: byte {bad_byte(error, line)} of the line")
    except (ValueError, RecursionError) as error:
        return Problem("broken lines", f"{origin} is not JSON: {error}")


def _record(values: object, origin: str) -> Record | Problem:
    if isinstance(values, dict):
        return Record(values, origin)
    return Problem("broken lines", f"{origin} holds a JSON {type(values).__name__}, not an object")


def read_parquet(path: Path, column: str | None = None) -> Iterator[Record | Problem]:
    """The rows of a `.parquet`, or one column of them; a row whose bytes are not UTF-8 is a problem of its own."""
    pyarrow = _pyarrow()
    if path.suffix.lower() != ".parquet":
        yield Problem("unreadable files", f"{path} is compressed outside, but parquet is inside: unpack it")
        return
    _require_file(path)
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if column is not None and column not in names:
                has = ", ".join(names) or "none"
                yield Problem("files without text field", f"{path} has no field {column!r}, but {has}")
                return
            columns, row = None if column is None else [column], 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
                yield from _rows(batch, path, row)
                row += batch.num_rows
    except pyarrow.ArrowException as error:
        yield Problem("unreadable files", f"{path} is no parquet file: {' '.join(str(error).split())}")


def _rows(batch: Any, path: Path, before: int) -> Iterator[Record | Problem]:
    """The rows of a batch that follows so many others."""
    try:
        for number, values in enumerate(batch.to_pylist(), start=before + 1):
            yield Record(values, f"{path}:{number}")
        return
    except UnicodeDecodeError:  # raised before the first row was given
        pass
    for number in range(batch.num_rows):
        origin, values = f"{path}:{before + number + 1}", {}
        try:
            for name in batch.schema.names:
                values[name] = batch.column(name)[number].as_py()
            yield Record(values, origin)
        except UnicodeDecodeError as error:
            byte = bad_byte(error, error.object)
            yield Problem("undecodable lines", f"{origin} is not UTF-8: byte {byte} of field {name!r}")


def bad_byte(error: UnicodeDecodeError, raw: bytes) -> str:
    """Where text stops being UTF-8, and what stands there."""
    position = error.start + len(raw) - len(error.object)  # the codec leaves a byte-order mark out of its count
    return f"{position} is 0x{raw[position]:02x}"
