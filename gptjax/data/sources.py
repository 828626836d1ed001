"""Documents from files, folders, globs, `.jsonl` and the standard library of the running Python."""

import difflib
import glob
import hashlib
import json
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gptjax.config import DataConfig
from gptjax.errors import UserError

STDLIB = "stdlib://"
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm"),
    *(
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".java",
        ".js",
        ".ts",
        ".go",
        ".rs",
        ".rb",
        ".jl",
        ".sh",
    ),
    ".jsonl",
)
"""What is read of a folder. A file that is named, itself or by a glob, may have any suffix."""

# Tests and installed packages are not the library; a folder of that name is left out at any depth.
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One text, and where it came from: a file, or a file and line number."""

    text: str
    origin: str


class SourceFile(NamedTuple):
    """A file to read, its name below the entry of `data.path`, and whether that entry named it directly."""

    path: Path
    name: str
    entry: str

    @property
    def is_named(self) -> bool:
        return self.entry == str(self.path)


def source_files(data: DataConfig) -> list[SourceFile]:
    """All files of `data.path`, in the order of its entries, each folder sorted; hidden ones are left out.

    Raises:
        UserError: a path that does not exist, with the nearest that does, or a folder or glob without text.
    """
    return [file for entry in data.path for file in _files_of_entry(entry)]


def read_documents(data: DataConfig, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of `data.path`, lazily and always in the same order.

    Memory holds one file at a time, of `.jsonl` one line.

    Args:
        skipped: counts what is left out, by reason. Files of the standard library that are no UTF-8 and
            empty ones in a folder always are; broken ones are under `data.on_error` "skip".

    Raises:
        UserError: what cannot be read, by file and, in `.jsonl`, line.
    """
    for file in source_files(data):
        lenient = data.on_error == "skip" or file.entry == STDLIB
        read = _read_lines if file.path.suffix == ".jsonl" else _read_whole
        for item in read(file, data.text_field):
            if isinstance(item, Document):
                yield item
            elif item.expected or lenient:
                skipped[item.reason] += 1
            else:
                raise UserError(f"{item.message} (--data.on-error skip leaves such out)")


def source_fingerprint(data: DataConfig) -> str:
    """sha256, in hex, of names, sizes and modification times of all files, and of how they are read.

    Of the standard library the Python version stands for the times, so that a reinstallation changes nothing.
    """
    entries = []
    for file in source_files(data):
        status = file.path.stat()
        version = platform.python_version() if file.entry == STDLIB else status.st_mtime_ns
        entries.append((file.name, status.st_size, version))
    settings = {"files": entries, "text_field": data.text_field, "on_error": data.on_error}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class _Problem(NamedTuple):
    """Something that gives no document; `expected` where it is no fault."""

    reason: str
    message: str
    expected: bool = False


def _files_of_entry(entry: str) -> list[SourceFile]:
    if entry == STDLIB:
        return _stdlib_files()
    path = Path(entry)
    if path.is_dir():
        files = [SourceFile(p, p.relative_to(path).as_posix(), entry) for p in _text_files_below(path)]
        if not files:
            raise UserError(f"data.path {entry} has no text; files that end in {' '.join(TEXT_SUFFIXES)} would be read")
        return files
    if path.is_file():
        return [SourceFile(path, path.name, str(path))]
    if glob.has_magic(entry):
        found = [Path(p) for p in sorted(glob.glob(entry, recursive=True)) if os.path.isfile(p)]
        if not found:
            raise UserError(f"data.path {entry} matches no file")
        return [SourceFile(p, p.as_posix(), entry) for p in found]
    raise UserError(f"data.path {entry} does not exist{_nearest(path)}")


def _text_files_below(folder: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in left_out)
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(TEXT_SUFFIXES):
                yield Path(directory, name)


def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in _text_files_below(root, _NOT_STDLIB) if p.suffix == ".py"]
    files = [SourceFile(p, p.relative_to(root).as_posix(), STDLIB) for p in found]
    if not files:
        raise UserError(f"{STDLIB}: this Python has no library source at {root}; give data.path")
    return files


def _nearest(path: Path) -> str:
    parent = next(p for p in path.absolute().parents if p.is_dir())
    wanted = path.absolute().relative_to(parent).parts[0]
    near = difflib.get_close_matches(wanted, os.listdir(parent), n=1)
    shown = path.parent if parent == path.parent.absolute() else parent
    return f"; did you mean {shown / near[0]}?" if near else f"; nothing in {shown} is called so"


def _read_whole(file: SourceFile, text_field: str) -> Iterator[Document | _Problem]:
    origin = str(file.path)
    try:
        raw = file.path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        yield _Problem("unreadable files", f"{origin} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        yield _Problem("undecodable files", f"{origin} is not UTF-8: byte {_bad_byte(error, raw)}")
    else:
        if text.strip():
            yield Document(text, origin)
        else:
            yield _Problem("empty files", f"{origin} is empty", expected=not file.is_named)


def _read_lines(file: SourceFile, text_field: str) -> Iterator[Document | _Problem]:
    lines = 0
    try:
        with file.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    lines += 1
                    yield _read_line(line, text_field, f"{file.path}:{number}")
    except OSError as error:
        yield _Problem("unreadable files", f"{file.path} cannot be read: {error.strerror}")
        return
    if not lines:
        yield _Problem("empty files", f"{file.path} is empty", expected=not file.is_named)


def _read_line(line: bytes, text_field: str, origin: str) -> Document | _Problem:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _Problem("undecodable lines", f"{origin} is not UTF-8: byte {_bad_byte(error, line)} of the line")
    except (ValueError, RecursionError) as error:
        return _Problem("broken lines", f"{origin} is not JSON: {error}")
    if not isinstance(record, dict):
        return _Problem("broken lines", f"{origin} holds a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        fields = ", ".join(record) or "none"
        return _Problem(
            "lines without text field", f"{origin} has no field {text_field!r} (data.text_field), but {fields}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        return _Problem("lines without text", f"{origin}: field {text_field!r} is a {type(text).__name__}, not a text")
    if _SURROGATE.search(text):
        return _Problem("broken lines", f"{origin}: field {text_field!r} holds half a surrogate pair, which is no text")
    return Document(text, origin) if text.strip() else _Problem("empty lines", f"{origin} is empty", expected=True)


def _bad_byte(error: UnicodeDecodeError, raw: bytes) -> str:
    position = error.start + len(raw) - len(error.object)  # the codec leaves a byte-order mark out of its count
    return f"{position} is 0x{raw[position]:02x}"
