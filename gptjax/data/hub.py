"""Data sets of the Hugging Face Hub: `hf://OWNER/NAME[/glob]`."""

import fnmatch
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gptjax.errors import UserError

SCHEME = "hf://"


class HubFile(NamedTuple):
    """A file in the Hub's cache, and OWNER/NAME@COMMIT/FILE."""

    path: Path
    name: str


def is_hub(entry: str) -> bool:
    """Whether an entry of `data.path` names a data set of the Hub."""
    return entry.startswith(SCHEME)


@functools.cache  # one commit for the whole of a process, though a branch may move on
def download(entry: str, is_text: Callable[[str], bool]) -> list[HubFile]:
    """Files of a data set, sorted by name, downloaded into the Hub's own cache where they are not there already.

    Without a network, what the cache holds is used.

    Args:
        entry: `hf://OWNER/NAME`, all its files that `is_text` knows; `hf://OWNER/NAME/GLOB`, those that match, where
            `*` also crosses folders; `@REVISION` after the name asks for a branch, tag or commit.
        is_text: whether a file of that name is read.

    Raises:
        UserError: huggingface_hub is missing, the Hub cannot be reached, or it has no such data set or files.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(f'{entry} needs huggingface_hub: pip install "gptjax[hub]"') from error

    owner, _, rest = entry.removeprefix(SCHEME).partition("/")
    name, _, pattern = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise UserError(f"data.path {entry} is no data set; write hf://OWNER/NAME or hf://OWNER/NAME/*.parquet")
    repository = f"{owner}/{name}"

    def chosen(files: list[str]) -> list[str]:
        matches = sorted(f for f in files if (fnmatch.fnmatch(f, pattern) if pattern else is_text(f)))
        if not matches:
            some = ", ".join(sorted(files)[:5]) or "none"
            raise UserError(f"data.path {entry} matches none of the {len(files)} files there: {some}, ...")
        return matches

    where = {"repo_type": "dataset", "revision": revision or None}
    try:
        info = hub.HfApi().dataset_info(repository, revision=revision or None, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        files = chosen(list(sizes))
        size = sum(sizes[f] for f in files)
        print(f"data: {len(files)} files of {repository}, {size / 1e9:,.2f} GB, into the Hub's cache", file=sys.stderr)
        paths = [Path(hub.hf_hub_download(repository, f, **where)) for f in files]
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(f"data.path {entry} is gated: accept its terms on its page, and run `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"data.path {entry}: the Hub has no such data set or revision, or it is private") from error
    except Exception as error:  # the library's HTTP client has changed between versions, and its errors with it
        try:
            folder = Path(hub.snapshot_download(repository, **where, local_files_only=True))
        except Exception:
            raise UserError(
                f"data.path {entry}: the Hub cannot be reached ({type(error).__name__}) and its cache has no copy; "
                "give local files as data.path, or try again with a network"
            ) from error
        files = chosen([p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()])
        paths = [folder / f for f in files]
    commits = [path.parents[f.count("/")].name for path, f in zip(paths, files, strict=True)]  # snapshots/COMMIT/FILE
    return [HubFile(path, f"{repository}@{c}/{f}") for path, c, f in zip(paths, commits, files, strict=True)]
