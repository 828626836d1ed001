"""Data sets of the Hugging Face Hub: `hf://OWNER/NAME[@REVISION][/GLOB]`."""

import fnmatch
import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.errors import UserError

SCHEME = "hf://"
JSON_LINES = ("jsonl", "jsonl.gz", "jsonl.zst", "ndjson", "ndjson.gz", "json.gz", "json.zst")
DEFAULT_GLOBS = ("*.parquet", *(f"*.{suffix}" for suffix in JSON_LINES))
"""What is read where no glob is given. Other text, such as a README, is most often about the data."""


class HubFile(NamedTuple):
    """A file in the Hub's cache, and OWNER/NAME@COMMIT/FILE."""

    path: Path
    name: str


def is_hub(entry: str) -> bool:
    """Whether an entry of `data.path` names a data set of the Hub."""
    return entry.startswith(SCHEME)


@functools.cache  # one commit for the whole of a process, though a branch may move on
def download(entry: str) -> list[HubFile]:
    """Files of a data set, sorted by name, downloaded into the Hub's own cache where they are not there already.

    Without a network, what the cache holds is used.

    Args:
        entry: `hf://OWNER/NAME`, all its files that match `DEFAULT_GLOBS`; `hf://OWNER/NAME/GLOB`, those that match
            it, where `*` also crosses folders; `@REVISION` after the name asks for a branch, tag or commit.

    Raises:
        UserError: huggingface_hub is missing, the Hub cannot be reached, or it has no such data set or files.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(f'{entry} needs huggingface_hub: pip install "gptjax[hub]"') from error

    owner, _, rest = entry.removeprefix(SCHEME).partition("/")
    name, _, glob = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise UserError(f"data.path {entry} is no data set; write hf://OWNER/NAME or hf://OWNER/NAME/*.parquet")
    repository, globs = f"{owner}/{name}", (glob,) if glob else DEFAULT_GLOBS
    snapshot = functools.partial(
        hub.snapshot_download, repository, repo_type="dataset", revision=revision or None, allow_patterns=list(globs)
    )
    listed: list[str] = []
    try:
        info = hub.HfApi().dataset_info(repository, revision=revision or None, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        listed = _matching(sizes, globs, entry)
        size = sum(sizes[file] for file in listed)
        _say(f"{len(listed)} files of {repository}, {size:,} bytes, into the Hub's cache where they are not there yet")
        folder = Path(snapshot())
    except errors.GatedRepoError as error:
        raise UserError(f"data.path {entry} is gated: accept its terms on its page, and run `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"data.path {entry}: the Hub has no such data set or revision, or it is private") from error
    except UserError:
        raise
    except Exception as error:  # the library's HTTP client has changed between versions, and its errors with it
        if listed:
            reason = " ".join(str(error).split())
            raise UserError(f"data.path {entry} was not downloaded whole; start again to go on: {reason}") from error
        try:
            folder = Path(snapshot(local_files_only=True))
        except Exception:
            raise UserError(
                f"data.path {entry}: the Hub cannot be reached ({type(error).__name__}) and its cache has no whole "
                "copy; give local files as data.path, or try again with a network"
            ) from error
        _say(f"the Hub cannot be reached ({type(error).__name__}); {repository}@{folder.name} of its cache is used")
    present = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = _matching(present, globs, entry)
    if missing := set(listed) - set(files):
        raise UserError(f"data.path {entry}: {min(missing)} was listed, but is not in {folder}; start again")
    return [HubFile(folder / file, f"{repository}@{folder.name}/{file}") for file in files]


def _matching(files: Iterable[str], globs: Sequence[str], entry: str) -> list[str]:
    files = sorted(files)
    matches = [file for file in files if any(fnmatch.fnmatchcase(file, glob) for glob in globs)]
    if not matches:
        some = ", ".join(files[:5]) + ", ..." * (len(files) > 5)
        raise UserError(
            f"data.path {entry}: none of the {len(files)} files there match {' '.join(globs)}; "
            f"they are {some or 'none'}"
        )
    return matches


def _say(line: str) -> None:
    print(f"data: {line}", file=sys.stderr)
