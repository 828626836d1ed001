"""The run directory: its name, its `config.json`, and what a run may change when it goes on.

`config.json` holds the sections of the configuration and, under `environment`, what else decides the
bits: versions, devices and the revision of the source.
"""

import contextlib
import dataclasses
import difflib
import fnmatch
import importlib.metadata
import itertools
import os
import platform
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from gptjax.checks import require
from gptjax.config import Config
from gptjax.config_files import (
    HOW_TO_USE,
    differences,
    flat,
    opened,
    replace_fields,
    require_own,
    saved_config,
    to_dict,
)
from gptjax.errors import UserError
from gptjax.parallel.platform import processor_fingerprint
from gptjax.plain_files import named, read_json, to_json
from gptjax.training.metrics import metrics_line, read_metrics

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
SAMPLES_FILE = "samples.md"
SUMMARY_FILE = "summary.json"
PLOT_FILE = "loss.png"
CHECKPOINTS = "checkpoints"
PROFILE = "profile"
PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tokenizers", "tokamax")

MAY_CHANGE = (
    "run_dir",
    "data.prepared_dir",
    "mesh.*",
    "model.scan_layers",
    "model.remat",
    "model.attention_kernel",
    "training.steps",
    "training.epochs",
    "training.log_every_steps",
    "training.eval_every_steps",
    "training.eval_sequences",
    "training.sample_*",
    "training.steps_per_dispatch",
    "training.loss_chunk_tokens",
    "training.log_to",
    "training.profile_steps",
    "guard.*",
    "checkpoint.*",
)


def next_run_dir(name: str, root: str | os.PathLike = "runs") -> Path:
    """The first of `root/name`, `root/name-2`, `root/name-3`, ... that does not exist or is an empty folder."""
    candidates = itertools.chain([named(name, "")], (named(name, f"-{number}") for number in itertools.count(2)))
    return next(
        path
        for path in (Path(root) / candidate for candidate in candidates)
        if not path.exists() or (path.is_dir() and not any(path.iterdir()))
    )


def check_writable(path: str | os.PathLike) -> None:
    """Create the folder and write a file there, now rather than after an hour of training.

    Raises:
        UserError: one of the two does not work.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder with --run-dir") from error


@contextlib.contextmanager
def writable(path: str | os.PathLike) -> Iterator[None]:
    """A folder that was checked to be writable; a refusal or an interruption leaves none behind that holds nothing.

    Raises:
        UserError: as `check_writable`.
    """
    check_writable(path)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it holds something
            Path(path).rmdir()
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write plain data as JSON, as `write_text` does."""
    write_text(Path(path), to_json(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, and a power cut loses neither.

    Raises:
        UserError: it cannot be written: the disk is full, say. The old text stays.
    """
    temporary = path.with_name(named(path.name, ".tmp"))
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def environment() -> dict[str, dict[str, Any]]:
    """What decides a run's bits beside its configuration: `versions`, `devices` and `source`.

    A version is None where the package is not installed, and the revision where the source is no checkout.
    """
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "devices": {
            "platform": device.platform,
            "device_kind": device.device_kind,
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
            "cpu_cores": cores,
            "processor": processor_fingerprint(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        },
    } | software()


def software() -> dict[str, dict[str, Any]]:
    """`versions` and `source`, without starting JAX."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    return {"versions": versions, "source": _source_revision()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_revision() -> dict[str, Any]:
    """The commit that this file is part of, and whether tracked files differ from it."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            command = ("git", "-C", str(here.parent), *arguments)
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    # An installed copy may lie inside somebody else's repository, which does not track it.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return {"git_revision": None, "git_dirty": None}
    return {
        "git_revision": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def environment_changes(saved: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each difference between two environments that may change the bits of a run."""
    relevant = [("versions", name) for name in now["versions"]]
    relevant += [
        ("devices", name) for name in ("platform", "device_kind", "device_count", "cpu_cores", "processor", "xla_flags")
    ]
    return [
        f"{name.replace('_', ' ')} {saved.get(section, {}).get(name)} → {now[section][name]}"
        for section, name in relevant
        if saved.get(section, {}).get(name) != now[section][name]
    ]


def save_config(run: str | os.PathLike, config: Config, environment: Mapping[str, Any]) -> None:
    """Write a run's `config.json`."""
    write_json(Path(run) / CONFIG_FILE, to_dict(config) | {"environment": environment})


def load_run_config(run: str | os.PathLike) -> tuple[Config, dict[str, Any]]:
    """Read a run's configuration and environment.

    Raises:
        UserError: the folder is no run, or its `config.json` cannot be understood.
    """
    path = Path(run) / CONFIG_FILE
    try:
        values = read_json(path)
    except NotADirectoryError as error:
        hint = f"; {HOW_TO_USE.format(run)}" if path.parent.suffix == ".gguf" else ""
        raise UserError(f"{run} is not a run, but a file{hint}") from error
    except FileNotFoundError as error:
        raise UserError(f"{run} is not a run: it has no {CONFIG_FILE}; runs beside it: {_runs_beside(path)}") from error
    require_own(values, path)
    return saved_config(values), values.get("environment", {})


def _runs_beside(path: Path) -> str:
    """The names most like the one asked for, at most five."""
    runs = sorted(config.parent.name for config in path.parent.parent.glob(f"*/{CONFIG_FILE}"))
    return ", ".join(difflib.get_close_matches(path.parent.name, runs, n=5, cutoff=0)) or "none"


def merge_resume(
    saved: Config, requested: Config, accepted: Collection[str] = ()
) -> tuple[Config, dict[str, tuple[Any, Any]]]:
    """The configuration with which a run goes on.

    Fields that the request leaves open are the saved run's, except those that are derived anew: of `mesh`, from the
    devices at hand, and what followed from other fields (`opened`). The learning rate keeps its schedule when
    `training.steps` grows; the steps follow `training.epochs` where that alone changes.

    Args:
        accepted: fields that may change although they decide what the run has learned so far.

    Returns:
        The configuration, and the fields that change as `{"section.field": (saved, requested)}`.

    Raises:
        UserError: fields differ that decide what the run has learned so far, all of which are listed; or a field is
            accepted that there is not.
    """
    # A run of an older version has no value of fields that are newer; what they are derived from, it has.
    data = dataclasses.replace(saved.data, chat_date=saved.data.chat_date or requested.data.chat_date)
    changes = differences(dataclasses.replace(saved, model=saved.model.filled(), data=data), requested)
    left_open = {name: before for name, (before, after) in changes.items() if after is None}
    followed, follows = ({n for n, v in flat(opened(config)).items() if v is None} for config in (saved, requested))
    left_open = {name: before for name, before in left_open.items() if not name.startswith("mesh.")}
    left_open = {name: before for name, before in left_open.items() if name not in followed}
    changes = {name: change for name, change in changes.items() if change[1] is not None}
    known = flat(saved)
    for name in accepted:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        require(name in known, f"--accept-changes {name} names no field of the configuration; did you mean {near}?")
    may_change = (*MAY_CHANGE, *accepted)
    refused = [
        name
        for name in changes
        if not (name in followed and name in follows)  # what it follows from is what has changed
        and not any(fnmatch.fnmatch(name, pattern) for pattern in may_change)
    ]
    if refused:
        listed = ", ".join(f"{name} {changes[name][0]} → {changes[name][1]}" for name in refused)
        raise UserError(
            f"{requested.run_dir or saved.run_dir} was made with another configuration: {listed}; "
            f"leave these as they were, choose another --run-dir, or go on with --accept-changes {' '.join(refused)}"
        )
    if "training.epochs" in changes and "training.steps" not in changes:
        left_open["training.steps"] = None
    return replace_fields(requested, left_open), changes


def cut_metrics(path: str | os.PathLike, step: int) -> None:
    """Drop what a `metrics.jsonl` says of later steps, and a half-written last line: they will come again.

    That the run has gone back stays.

    Does nothing where the file is not there.
    """
    path = Path(path)

    def keep(record: Mapping[str, Any]) -> bool:
        return record["step"] <= step or "rolled_back_from" in record

    if path.exists():
        write_text(path, "".join(metrics_line(record) for record in read_metrics(path) if keep(record)))
