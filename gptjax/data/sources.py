"""Documents from files, folders, globs, the Hugging Face Hub, and the standard library of the running Python."""

import difflib
import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gptjax.config import DataConfig
from gptjax.data import formats, hub
from gptjax.data.formats import Document
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
    *(".jsonl", ".ndjson", ".parquet"),
)
"""What is read of a folder, compressed by .gz or .zst or not. A file that is named may have any suffix."""
COMPRESSED_ONLY = (".json.gz", ".json.zst")
"""Read of a folder, too: a corpus (C4, Dolma), where a bare .json may be the settings of something."""

MODEL_SUFFIXES = (".gguf", ".safetensors")

# Tests and installed packages are not the library; a folder of that name is left out at any depth.
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class SourceFile(NamedTuple):
    """A file to read, its name below the entry of `data.path`, and that entry."""

    path: Path
    name: str
    entry: str

    @property
    def is_named(self) -> bool:
        return self.entry == str(self.path)


def source_files(
    data: DataConfig, suffixes: tuple[str, ...] = TEXT_SUFFIXES, skipped: Counter[str] | None = None
) -> list[SourceFile]:
    """All files of `data.path`, in the order of its entries, each folder sorted; hidden ones are left out.

    Those of the Hub are downloaded into its own cache. What links in a folder lead to is read as what lies there, once.

    Args:
        suffixes: what is taken of a folder.
        skipped: counts the other files of folders.

    Raises:
        UserError: a path that does not exist, with the nearest that does, or a folder or glob without text.
    """
    skipped = Counter() if skipped is None else skipped
    return [file for entry in data.path for file in _files_of_entry(entry, suffixes, skipped)]


def read_documents(
    data: DataConfig, skipped: Counter[str], *, text_field_option: str = "--data.text-field", can_skip: bool = True
) -> Iterator[Document]:
    """The documents of `data.path`, lazily and always in the same order; long ones in pieces.

    Memory holds a megabyte or so of a text file, of `.jsonl` one line, of `.parquet` some rows.

    Args:
        skipped: counts what is left out, by reason. Files of the standard library that are no UTF-8 and
            empty ones in a folder always are; broken ones are under `data.on_error` "skip".
        text_field_option: how the user of the command at hand writes `data.text_field`.
        can_skip: whether that command has `data.on_error`.

    Raises:
        UserError: what cannot be read, by file and, in `.jsonl` and `.parquet`, line or row.
    """
    files, found = source_files(data, skipped=skipped), False
    for file in files:
        lenient = data.on_error == "skip" or file.entry == STDLIB
        for item in formats.read(file.path, data.text_field, file.is_named):
            if isinstance(item, Document):
                found = True
                yield item
            elif item.expected or lenient:
                skipped[item.reason] += 1
            else:
                remedies = [f"{text_field_option} NAME reads another"] * item.lacks_field
                if can_skip and (found or file != files[-1] or not item.is_file):  # else nothing would be left
                    remedies.append("--data.on-error skip leaves such out")
                raise UserError(item.message + (f" ({'; '.join(remedies)})" if remedies else ""))


def source_fingerprint(data: DataConfig) -> str:
    """sha256, in hex, of names, sizes and modification times of all files, and of how they are read.

    Of the standard library the Python version stands for the times, so that a reinstallation changes nothing; the
    names of files of the Hub contain their commit.
    """
    entries = []
    for file in source_files(data):
        try:
            status = file.path.stat()
        except OSError:  # a link to nothing, which reading tells or skips
            entries.append((file.name, None, None))
            continue
        version = platform.python_version() if file.entry == STDLIB else status.st_mtime_ns
        entries.append((file.name, status.st_size, None if hub.is_hub(file.entry) else version))
    settings = {"files": entries, "text_field": data.text_field, "on_error": data.on_error}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _files_of_entry(entry: str, suffixes: tuple[str, ...], skipped: Counter[str]) -> list[SourceFile]:
    if entry == STDLIB:
        return _stdlib_files()
    if hub.is_hub(entry):
        return [SourceFile(path, name, entry) for path, name in hub.download(entry)]
    path = Path(entry)
    if path.suffix in MODEL_SUFFIXES or all((path / name).is_file() for name in ("config.json", "tokenizer.json")):
        raise UserError(f"data.path {entry} is a model or a run, whose files are no text to learn from")
    if path.is_dir():
        files = [
            SourceFile(p, p.relative_to(path).as_posix(), entry) for p in _text_files_below(path, suffixes, skipped)
        ]
        if not files:
            raise UserError(f"data.path {entry} has no text; files that end in {' '.join(suffixes)} would be read")
        return files
    if path.is_file():
        return [SourceFile(path, path.name, str(path))]
    if glob.has_magic(entry):
        found = [Path(p) for p in sorted(glob.glob(entry, recursive=True)) if not os.path.isdir(p)]
        if not found:
            raise UserError(f"data.path {entry} matches no file")
        return [SourceFile(p, p.as_posix(), entry) for p in found]
    if path.exists():
        raise UserError(
            f"data.path {entry} is a pipe or a device, which gives its text only once, and it is read several times; "
            "write it into a file first"
        )
    raise UserError(f"data.path {entry} does not exist{_nearest(path)}")


def _text_files_below(
    folder: Path, suffixes: tuple[str, ...], skipped: Counter[str], left_out: frozenset[str] = frozenset()
) -> Iterator[Path]:
    seen = set()
    for directory, folders, names in os.walk(folder, followlinks=True):
        place = os.stat(directory)
        if (place.st_dev, place.st_ino) in seen:  # two links to one folder, or one to a folder that it is in
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in left_out)
        for name in sorted(name for name in names if not name.startswith(".")):
            whole = name.lower()
            if whole.removesuffix(".gz").removesuffix(".zst").endswith(suffixes) or whole.endswith(COMPRESSED_ONLY):
                yield Path(directory, name)
            else:
                skipped["files of other kinds"] += 1


def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in _text_files_below(root, TEXT_SUFFIXES, Counter(), _NOT_STDLIB) if p.suffix == ".py"]
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
