"""A checksum for every file of a checkpoint: Orbax 0.12.8 restores flipped bits, and says nothing.

`manifest.json` lies in a step's folder and holds each file's size and sha256, and its own. It is written just before
the step gets its name, so that a step is never there without one, unless an older gptjax saved it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptjax.errors import UserError
from gptjax.training.run_dir import write_text

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax writes after the manifest, to say when a step was committed. A step without them is restored the same."""
THREADS = 8
"""Files hashed at once: hashlib lets go of Python's lock, and disks like several readers."""


class Verdict(NamedTuple):
    """What was found of a checkpoint."""

    status: Literal["verified", "unverified", "damaged", "foreign"]
    """`unverified`: nothing is known, as there is no manifest; `foreign`: whole, but with files that it was not saved
    with."""
    reason: str = ""
    """Which files, and what is wrong with them; empty if verified."""


def write_manifest(folder: str | os.PathLike) -> None:
    """Hash all files below a folder, and write its `manifest.json`.

    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    folder = Path(folder)
    names = sorted(_names(folder))
    with ThreadPoolExecutor(THREADS) as threads:
        digests = threads.map(_sha256, (folder / name for name in names))
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }
    write_text(folder / MANIFEST_FILE, _sealed({"format_version": FORMAT_VERSION, "files": files}))


def check_manifest(folder: str | os.PathLike, max_bytes: int | None = None) -> Verdict:
    """Compare all files below a folder with its `manifest.json`.

    Args:
        max_bytes: of larger files the size alone is compared. None: all are read.

    Raises:
        UserError: the manifest is of a newer format, or this user may not read a file.
    """
    folder = Path(folder)
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return Verdict("unverified", f"it has no {MANIFEST_FILE}")
    except (OSError, ValueError) as error:
        return Verdict("damaged", f"{MANIFEST_FILE} cannot be read ({_words(error)})")
    manifest = _unsealed(text)
    if manifest is None:
        return Verdict("damaged", f"{MANIFEST_FILE} was changed: its own sha256 is another")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST_FILE} has format {manifest['format_version']}, this gptjax reads {FORMAT_VERSION}; "
            "use the gptjax that saved it"
        )
    saved, found = manifest["files"], set(_names(folder))
    present = sorted(saved.keys() & found)
    with ThreadPoolExecutor(THREADS) as threads:
        differences = threads.map(lambda name: _difference(folder / name, saved[name], max_bytes), present)
        changed = [f"{name} {what}" for name, what in zip(present, differences, strict=True) if what]
    missing = [f"{name} is missing" for name in sorted(saved.keys() - found)]
    if wrong := [*missing, *changed, *_unreadable_json(folder)]:
        return Verdict("damaged", _first_of(wrong))
    if strangers := sorted(found - saved.keys()):
        return Verdict("foreign", _first_of([f"{name} was not saved with it" for name in strangers]))
    return Verdict("verified")


def _names(folder: Path) -> Iterator[str]:
    """The files that a manifest lists, as relative paths with forward slashes."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        # Files that are deleted while somebody has them open stay on NFS for a while, as .nfs and a number.
        if name != MANIFEST_FILE and name not in WRITTEN_LATER and not path.is_dir() and path.name[:4] != ".nfs":
            yield name


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _difference(path: Path, saved: Mapping[str, Any], max_bytes: int | None) -> str:
    """What is wrong with a file; empty: nothing."""
    try:
        size = path.stat().st_size
        if size != saved["bytes"]:
            return f"has {size:,} bytes instead of {saved['bytes']:,}"
        same = (max_bytes is not None and size > max_bytes) or _sha256(path) == saved["sha256"]
        return "" if same else "was changed: its sha256 is another"
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except OSError as error:  # a disk that is failing says so here
        return f"cannot be read ({_words(error)})"


def _unreadable_json(folder: Path) -> Iterator[str]:
    """Of what Orbax writes later, that which stops it from opening any step of the run."""
    name = WRITTEN_LATER[0]
    try:
        if isinstance(json.loads((folder / name).read_text(encoding="utf-8")), dict):
            return
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        pass
    yield f"{name} is no JSON object"


def _sealed(values: Mapping[str, Any]) -> str:
    """A JSON object as text, its own sha256 within."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _unsealed(text: str) -> dict[str, Any] | None:
    """The object that `_sealed` wrote; None: not one character is trusted. All formats are sealed like this."""
    try:
        values = json.loads(text)
        del values["sha256"]
    except (ValueError, TypeError, KeyError):
        return None
    return values if _sealed(values) == text else None


def _first_of(problems: list[str]) -> str:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
