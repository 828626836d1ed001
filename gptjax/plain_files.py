"""Text and JSON in files: read however a user's program has written them, written so that any program reads them."""

import codecs
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.errors import UserError

MAX_NAME_BYTES = 255
"""Of a file's name, on nearly every file system: 255 letters, or 85 Chinese ones."""


def named(name: str, ending: str) -> str:
    """A file's name with an ending: of a name that is too long for it as much as fits, told apart by a hash."""
    if len(os.fsencode(name + ending)) <= MAX_NAME_BYTES:
        return name + ending
    ending = f"~{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}{ending}"
    return os.fsencode(name)[: MAX_NAME_BYTES - len(os.fsencode(ending))].decode(errors="ignore") + ending


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 that begins with its byte order mark; without the mark.

    Lines end as Python has them.

    Raises:
        UserError: it has another encoding, or cannot be read.
        FileNotFoundError, NotADirectoryError: there is none.
    """
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in raw and not wide:
        raise UserError(f"{path} has zero bytes, so it is no text, or UTF-16 without its mark; save it as UTF-8")
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + raw[: error.start].count(b"\n")
        raise UserError(
            f"{path} is not UTF-{16 if wide else 8}: byte 0x{raw[error.start]:02X} in line {line}; save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: it is no JSON; or as `read_text`.
        FileNotFoundError, NotADirectoryError: there is none.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def to_json(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """Plain data as JSON, which has no NaN and no infinity: they become null. NumPy and JAX scalars are numbers.

    Letters stay as they are, but for names of files that are in no encoding.
    """
    text = json.dumps(_plain(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return to_json(value, indent=indent, ascii_only=True)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
