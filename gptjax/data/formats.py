"""One file to its documents: text, `.jsonl` and `.parquet`, compressed by gzip or Zstandard or not."""

import codecs
import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptjax.errors import UserError
from gptjax.text.splitting import split_text

BLOCK_BYTES = 2**20
MAX_PIECE_CHARACTERS = 2**20
"""A text file longer than this comes in pieces."""
PARQUET_ROWS = 256

_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One text and where it came from, a file or a file and line; or a piece of a text too long to hold."""

    text: str
    origin: str
    first: bool = True
    last: bool = True


class Problem(NamedTuple):
    """Something that gives no document; `expected` where it is no fault."""

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
    """One object of a file of data, and where it came from."""

    values: dict[str, Any]
    origin: str


def read_records(path: Path) -> Iterator[Record | Problem]:
    """The objects of a `.json` (one array), `.jsonl` or `.parquet` file, and what in it is none.

    Raises:
        UserError: a package that this format needs is missing.
    """
    readers = {".json": _read_array, ".jsonl": _read_objects, ".parquet": _read_rows}
    form = _form(path)
    if form not in readers:
        yield Problem("unreadable files", f"{path} is none of {', '.join(readers)}, which hold conversations")
        return
    yield from _guarded(path, readers[form](path), is_named=True)


def _form(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix


def read(path: Path, text_field: str, is_named: bool) -> Iterator[Document | Problem]:
    """The documents of a file, and what in it is none.

    Args:
        text_field: field of a `.jsonl` line, or column of a `.parquet` file, that holds the text.
        is_named: whether the user named this very file, so that its emptiness is a fault.

    Raises:
        UserError: a package that this format needs is missing.
    """
    readers = {".jsonl": _read_lines, ".parquet": _read_parquet}
    yield from _guarded(path, readers.get(_form(path), _read_text)(path, text_field), is_named)


def _guarded(path: Path, items: Iterator[Any], is_named: bool) -> Iterator[Any]:
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
def _open(path: Path) -> Iterator[BinaryIO]:
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


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError('.parquet and .zst files need pyarrow: pip install "gptjax[data]"') from error
    return pyarrow


def _read_text(path: Path, text_field: str) -> Iterator[Document | Problem]:
    """One document, in pieces where it is long: known to be UTF-8 to its end before the first of them is given."""
    with _open(path) as stream:
        block = stream.read(BLOCK_BYTES)
        whole = len(block) < BLOCK_BYTES
    if not whole:
        if problem := _undecodable(path):
            yield problem
        else:
            yield from _pieces(path)
        return
    try:
        text = block.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Problem("undecodable files", f"{path} is not UTF-8: byte {_bad_byte(error, block)}")
        return
    if text.strip():
        yield Document(text, str(path))


def _blocks(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Blocks of a file, and whether each is the last; the last may be empty."""
    with _open(path) as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block, False
    yield b"", True


def _undecodable(path: Path) -> Problem | None:
    decoder, before = codecs.getincrementaldecoder("utf-8-sig")(), 0
    for block, last in _blocks(path):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(block, last)
        except UnicodeDecodeError as error:
            position = before - pending + error.start
            return Problem(
                "undecodable files", f"{path} is not UTF-8: byte {position} is 0x{error.object[error.start]:02x}"
            )
        before += len(block)
    return None


def _pieces(path: Path) -> Iterator[Document]:
    decoder, text, first = codecs.getincrementaldecoder("utf-8-sig")(), "", True
    for block, last in _blocks(path):
        text += decoder.decode(block, last)
        *pieces, text = split_text(text, MAX_PIECE_CHARACTERS)
        for piece in pieces:
            yield Document(piece, str(path), first, False)
            first = False
    yield Document(text, str(path), first, True)


def _read_lines(path: Path, text_field: str) -> Iterator[Document | Problem]:
    for item in _read_objects(path):
        yield item if isinstance(item, Problem) else _text_of_record(item, text_field)


def _read_objects(path: Path) -> Iterator[Record | Problem]:
    """The objects of a `.jsonl`, one a line."""
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _read_object(line, f"{path}:{number}")


def _read_object(line: bytes, origin: str) -> Record | Problem:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Problem("undecodable lines", f"{origin} is not UTF-8: byte {_bad_byte(error, line)} of the line")
    except (ValueError, RecursionError) as error:
        return Problem("broken lines", f"{origin} is not JSON: {error}")
    return _as_record(values, origin)


def _as_record(values: object, origin: str) -> Record | Problem:
    if isinstance(values, dict):
        return Record(values, origin)
    return Problem("broken lines", f"{origin} holds a JSON {type(values).__name__}, not an object")


def _text_of_record(record: Record, text_field: str) -> Document | Problem:
    if text_field not in record.values:
        fields = ", ".join(record.values) or "none"
        return Problem("lines without text field", f"{record.origin} has no field {text_field!r}, but {fields}")
    return _text_of_field(record.values[text_field], text_field, record.origin)


def _read_array(path: Path) -> Iterator[Record | Problem]:
    """The objects of a `.json` that is one array of them."""
    with _open(path) as stream:
        raw = stream.read()
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield Problem("undecodable files", f"{path} is not UTF-8: byte {_bad_byte(error, raw)}")
    except (ValueError, RecursionError) as error:
        yield Problem("broken files", f"{path} is not JSON: {error}")
    else:
        if isinstance(values, list):
            yield from (_as_record(value, f"{path}:{number}") for number, value in enumerate(values, start=1))
        else:
            kind = type(values).__name__
            yield Problem("broken files", f"{path} holds a JSON {kind}, not an array of objects; one a line is .jsonl")


def _read_rows(path: Path) -> Iterator[Record | Problem]:
    """The rows of a `.parquet`."""
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS, use_threads=False):
                for values in batch.to_pylist():
                    row += 1
                    yield Record(values, f"{path}:{row}")
    except pyarrow.ArrowInvalid as error:
        yield Problem("unreadable files", f"{path} is no parquet file: {' '.join(str(error).split())}")


def _text_of_field(text: object, text_field: str, origin: str) -> Document | Problem:
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        return Problem("lines without text", f"{origin}: field {text_field!r} is {kind}, not a text")
    if _SURROGATE.search(text):
        return Problem("broken lines", f"{origin}: field {text_field!r} holds half a surrogate pair, which is no text")
    return Document(text, origin) if text.strip() else Problem("empty lines", f"{origin} is empty", expected=True)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document | Problem]:
    pyarrow = _pyarrow()
    if path.suffix.lower() != ".parquet":
        yield Problem("unreadable files", f"{path} is compressed outside, but parquet is inside: unpack it")
        return
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                reason = f"{path} has no field {text_field!r}, but {', '.join(names) or 'none'}"
                yield Problem("files without text field", reason)
                return
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[text_field], use_threads=False):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _text_of_field(text, text_field, f"{path}:{row}")
    except pyarrow.ArrowInvalid as error:
        yield Problem("unreadable files", f"{path} is no parquet file: {' '.join(str(error).split())}")


def _bad_byte(error: UnicodeDecodeError, raw: bytes) -> str:
    position = error.start + len(raw) - len(error.object)  # the codec leaves a byte-order mark out of its count
    return f"{position} is 0x{raw[position]:02x}"
