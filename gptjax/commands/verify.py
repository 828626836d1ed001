"""`python -m gptjax verify RUN`: whether anything of a run at rest is damaged."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptjax import cli
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.config import Config

EXIT_DAMAGED = 1


@dataclass(frozen=True)
class VerifyArguments:
    """What `python -m gptjax verify` was asked for."""

    json: str | None = None
    """File for what was found as one JSON object; - is standard output. None: a table."""


class Part(NamedTuple):
    """What was found of a part of a run."""

    part: str
    status: str
    """verified: as it was saved. readable: there are no checksums of it, but it can be read. unverified: there are
    none, and nothing is known. unknown: it is not here. damaged. foreign: whole, but with files beside it that a run
    would stumble over. set aside: damaged, and replaced by now."""
    detail: str


def main(arguments: Sequence[str]) -> int:
    """Check a run's files, its checkpoints and its data; the exit status is 1 if anything is damaged."""
    import tyro

    arguments = list(arguments)
    run = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    description = "Compare every checkpoint of a run and its token shards with their checksums. Nothing is changed."
    parsed = tyro.cli(VerifyArguments, args=arguments, prog="python -m gptjax verify RUN", description=description)
    if run is None:
        raise UserError("no run given; write: python -m gptjax verify RUN")
    cli.check_output("--json", parsed.json)

    from gptjax.parallel import platform

    platform.configure()
    parts = list(check_run(Path(run)))
    damaged = any(part.status in ("damaged", "foreign") for part in parts)
    cli.write_json(parsed.json, {"run": run, "damaged": damaged, "parts": [part._asdict() for part in parts]})
    if parsed.json != "-":
        table = cli.make_table("", "part", "status", "")
        table.columns[1].justify = table.columns[2].justify = "left"
        for part in parts:
            table.add_row(*part)
        cli.print_wide(table)
    return EXIT_DAMAGED if damaged else 0


def check_run(directory: Path) -> Iterator[Part]:
    """All parts of a run, one after the other.

    Raises:
        UserError: the folder is no run.
    """
    from gptjax.interop.places import is_foreign
    from gptjax.training import run_dir
    from gptjax.training.checkpoint import all_steps, read_metadata
    from gptjax.training.metrics import METRICS_FILE, read_metrics
    from gptjax.training.summary import read_summary

    config = None
    try:
        config, _ = run_dir.load_run_config(directory)
        yield Part(run_dir.CONFIG_FILE, "readable", "")
    except UserError as error:
        if is_foreign(directory) or not (directory / run_dir.CONFIG_FILE).is_file():
            raise
        yield Part(run_dir.CONFIG_FILE, "damaged", str(error))
    checkpoints = directory / run_dir.CHECKPOINTS
    steps = all_steps(checkpoints)
    found = {step: _check_step(checkpoints, step) for step in steps}
    steps = [step for step in steps if (checkpoints / str(step)).is_dir()]  # a run that trains removes some meanwhile
    whole = [step for step in steps if found[step].status == "verified"]
    metadata = read_metadata(checkpoints, whole[-1]) if whole else {}
    yield _check_tokenizer(directory, metadata)
    if any(steps) or (directory / METRICS_FILE).exists():  # an imported run has step 0 alone, and logged nothing
        yield _check_readable(METRICS_FILE, lambda: f"{len(read_metrics(directory / METRICS_FILE)):,} lines")
    else:
        yield Part(METRICS_FILE, "unknown", "nothing was logged yet")
    if (directory / run_dir.SUMMARY_FILE).is_file():
        yield _check_readable(run_dir.SUMMARY_FILE, lambda: f"{read_summary(directory)['stopped']}")
    yield from (found[step] for step in steps)
    for aside in sorted([*checkpoints.glob("*.damaged*"), *checkpoints.glob("*.rolled-back*")]):
        yield Part(f"{checkpoints.name}/{aside.name}", "set aside", "no longer used")
    yield _check_data(config, metadata)


def _check_readable(part: str, read: Any) -> Part:
    try:
        return Part(part, "readable", read())
    except (UserError, OSError) as error:
        return Part(part, "damaged", str(error))


def _check_step(checkpoints: Path, step: int) -> Part:
    from gptjax.training.recovery import verify_step

    try:
        status, reason = verify_step(checkpoints, step)
    except UserError as error:
        status, reason = "unknown", str(error)
    size = sum(path.stat().st_size for path in (checkpoints / str(step)).rglob("*") if path.is_file())
    return Part(f"{checkpoints.name}/{step}", status, reason or f"{size / 1e6:,.1f} MB")


def _check_tokenizer(directory: Path, metadata: dict[str, Any]) -> Part:
    """Each checkpoint holds the tokenizer, too: with one that is whole, the file can be compared."""
    from gptjax.text.tokenizer import Tokenizer
    from gptjax.training.run_dir import TOKENIZER_FILE

    path = directory / TOKENIZER_FILE
    if "tokenizer" in metadata and path.is_file():
        same = path.read_bytes() == metadata["tokenizer"].encode()
        reason = "" if same else "it is not the tokenizer that the checkpoints hold"
        return Part(TOKENIZER_FILE, "verified" if same else "damaged", reason)
    return _check_readable(TOKENIZER_FILE, lambda: f"vocabulary {Tokenizer.load(path).vocab_size:,}")


def _check_data(config: "Config | None", metadata: dict[str, Any]) -> Part:
    """The token shards that the run was trained on, if they are on this machine."""
    from gptjax.data.shards import INDEX_FILE, Index, open_prepared

    if config is None:
        return Part("data", "unknown", "the configuration would say where it is")
    if "data" not in metadata:
        return Part("data", "unknown", "no checkpoint says which tokens it was trained on")
    given = [Path(path) for path in config.data.path if (Path(path) / INDEX_FILE).is_file()]
    made = sorted(path.parent for path in Path(config.data.prepared_dir).glob(f"*/{INDEX_FILE}"))
    for folder in given or made:
        try:
            if Index.load(folder).content_fingerprint != metadata["data"]:
                continue
        except UserError:
            continue
        try:
            index = open_prepared(folder, verify=True).index
        except (UserError, OSError) as error:
            return Part("data", "damaged", str(error))
        return Part("data", "verified", f"{folder}, {len(index.shards)} shards")
    return Part("data", "unknown", f"there are none of this run's tokens in {config.data.prepared_dir}")
