"""One file to its documents: text, JSON and `.parquet`, compressed by gzip or Zstandard or not."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gptjax.data import records
from gptjax.data.records import Problem, Record
from gptjax.text.splitting import split_text

BLOCK_BYTES = 2**20
MAX_PIECE_CHARACTERS = 2**20
"""A text file longer than this comes in pieces."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a pair that stands for one character: what JSON can escape, and no encoding can write."""


class Document(NamedTuple):
    """One text and where it came from, a file or a file and line; or a piece of a text too long to hold."""

    text: str
    origin: str
    first: bool = True
    last: bool = True


def read(path: Path, text_field: str, is_named: bool) -> Iterator[Document | Problem]:
    """The documents of a file, and what in it is none.

    Args:
        text_field: field of a JSON object, or column of a `.parquet` file, that holds the text.
        is_named: whether the user named this very file, so that its emptiness is a fault.

    Raises:
        UserError: a package that this format needs is missing.
    """
    readers = dict.fromkeys(records.JSON_SUFFIXES, _read_json) | {".parquet": _read_parquet}
    yield from records.guarded(path, readers.get(records.form(path), _read_text)(path, text_field), is_named)


def _read_text(path: Path, text_field: str) -> Iterator[Document | Problem]:
    """One document, in pieces where it is long: known to be UTF-8 to its end before the first of them is given."""
    with records.opened(path) as stream:
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
        yield Problem("undecodable files", f"{path} is not UTF-8: byte {records.bad_byte(error, block)}")
        return
    if text.strip():
        yield Document(text, str(path))


def _blocks(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Blocks of a file, and whether each is the last; the last may be empty."""
    with records.opened(path) as stream:
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


def _read_json(path: Path, text_field: str) -> Iterator[Document | Problem]:
    for item in records.read_json(path):
        yield item if isinstance(item, Problem) else _text_of_record(item, text_field)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document | Problem]:
    for item in records.read_parquet(path, text_field):
        yield item if isinstance(item, Problem) else _text_of_record(item, text_field)


def _text_of_record(record: Record, text_field: str) -> Document | Problem:
    values, origin = record
    if text_field not in values:
        fields = ", ".join(values) or "none"
        return Problem("lines without text field", f"{origin} has no field {text_field!r}, but {fields}")
    text = values[text_field]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        return Problem("lines without text", f"{origin}: field {text_field!r} is {kind}, not a text")
    if SURROGATE.search(text):
        return Problem("broken lines", f"{origin}: field {text_field!r} holds half a surrogate pair, which is no text")
    return Document(text, origin) if text.strip() else Problem("empty lines", f"{origin} is empty", expected=True)
