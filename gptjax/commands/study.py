"""`python -m gptjax study STUDY.py`: a scaling study, trained, fitted, predicted and compared."""

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptjax import cli
from gptjax.errors import UserError
from gptjax.plain_files import named
from gptjax.scaling.study import PlannedRun, Study, expand, load_study

EXIT_FAILED = 1


@dataclass(frozen=True)
class StudyArguments:
    """What `python -m gptjax study` was asked for."""

    dir: str | None = None
    """Folder of the study. None: studies/ and the name of its file."""
    jobs: int = 1
    """Runs at a time on this machine, each with its share of the cores."""
    launcher: Literal["local", "slurm"] = "local"
    """local: processes of this machine; slurm: an array of jobs, by submitit."""
    slurm: tuple[str, ...] = ()
    """submitit's parameters, NAME=VALUE: timeout_min=60 gpus_per_node=1 slurm_partition=gpu."""
    extend: bool = False
    """Add runs that have come to the study's file since it began."""
    dry_run: bool = False
    """Say what would be trained, and how much, and stop."""
    chain: str | None = None
    """Train the runs of this trunk alone, in this process: what jobs call. None: all."""
    parent: int = 0
    """Process without which this one stops, as jobs give it. 0: none."""
    json: str | None = None
    """File for the runs and what became of them as a JSON list; - is standard output. None: a table."""

    def __post_init__(self):
        if self.jobs < 1:
            raise UserError(f"jobs is {self.jobs}, but must be at least 1")
        for setting in self.slurm:
            if "=" not in setting:
                raise UserError(f"--slurm {setting} is not NAME=VALUE, such as timeout_min=60")


def main(arguments: Sequence[str]) -> int:
    """Train a scaling study's runs, predict what is to be predicted, and compare; go on where it was stopped."""
    import tyro

    arguments = list(arguments)
    file = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    parsed = tyro.cli(StudyArguments, args=arguments, prog="python -m gptjax study STUDY.py", description=main.__doc__)
    if file is None:
        raise UserError("no study given; write: python -m gptjax study configs/studies/NAME.py")
    cli.check_output("--json", parsed.json)
    study, folder = load_study(file), Path(parsed.dir or Path("studies") / Path(file).stem)
    runs = expand(study)
    if parsed.dry_run:
        _show_plan(study, runs)
        return 0

    from gptjax.parallel import platform

    platform.configure()

    from gptjax.scaling.conduct import ENDED, Stopped, conduct, open_folder

    if parsed.chain is not None:
        return _train_chain(study, runs, folder, parsed)
    runs = open_folder(study, folder, extend=parsed.extend)
    say = cli.print_to_stderr if parsed.json == "-" else _say

    from gptjax.scaling.predict import comparison, predict

    try:
        launch, predictor = _launcher(file, folder, parsed, say), functools.partial(predict, counts=study.counts)
        found = conduct(runs, [*study.grid], folder, launch, predictor, say)
    except Stopped as stop:
        say(f"stopped; the same command goes on: {_command(file, parsed)}")
        return stop.status
    failed = [result for result in found if result.status not in ENDED]
    cli.write_json(parsed.json, [_row(result) for result in found])
    if parsed.json != "-":
        _show_results(found)
    for row in comparison(found, folder):
        if row["error"] is not None:
            say(
                f"{row['run']}: predicted {row['loss']:.4f} ({row['low']:.4f} to {row['high']:.4f}), measured "
                f"{row['measured']:.4f}: {100 * row['error']:+.2f} %"
            )
    for result in failed:
        say(f"{result.status}: {result.run.name}, log in {folder / 'logs' / named(result.run.trunk, '.log')}")
    if not failed:
        say(f"next: python -m gptjax report {folder}")
    return EXIT_FAILED if failed else 0


def _train_chain(study: Study, runs: Sequence[PlannedRun], folder: Path, parsed: StudyArguments) -> int:
    from gptjax.scaling.chain import run_chain
    from gptjax.scaling.launchers import end_with_parent

    chain = [run for run in runs if run.trunk == parsed.chain]
    if not chain:
        raise UserError(f"no run of the study has the trunk {parsed.chain}; there are: {', '.join(_trunks(runs))}")
    if parsed.parent:
        end_with_parent(parsed.parent)
    return cli.EXIT_OF[run_chain(chain, folder, branch=study.branch_cooldowns)]


def _launcher(file: str, folder: Path, parsed: StudyArguments, say):
    from gptjax.scaling.launchers import local_launcher, slurm_launcher

    command = [sys.executable, "-m", "gptjax", "study", os.path.abspath(file), "--dir", os.path.abspath(folder)]
    if parsed.launcher == "slurm":
        values = dict(setting.split("=", 1) for setting in parsed.slurm)
        parameters = {name: int(value) if value.isdecimal() else value for name, value in values.items()}
        return slurm_launcher([*command, "--chain"], parameters, say)
    return local_launcher([*command, "--parent", str(os.getpid()), "--chain"], parsed.jobs, say)


def _command(file: str, parsed: StudyArguments) -> str:
    place = f" --dir {parsed.dir}" if parsed.dir else ""
    return f"python -m gptjax study {file}{place}"


def _trunks(runs: Sequence[PlannedRun]) -> list[str]:
    return [*dict.fromkeys(run.trunk for run in runs)]


def _say(text: str) -> None:
    print(text, flush=True)


def _show_plan(study: Study, runs: Sequence[PlannedRun]) -> None:
    table = cli.make_table(study.question, "run", f"parameters ({study.counts})", "tokens", "steps", "FLOPs", "")
    for run in runs:
        note = "predicted" if run.predicted else ""
        numbers = f"{run.parameters:,}", f"{run.tokens:,}", f"{run.config.training.steps:,}", f"{run.flops:.3g}"
        table.add_row(run.name, *numbers, note)
    cli.print_wide(table)
    print(f"{len(runs)} runs in {len(_trunks(runs))} chains")


def _row(result) -> dict:
    run = result.run
    card = {name: getattr(run, name) for name in ("name", "size", "parameters", "tokens", "flops", "predicted")}
    return card | {name: getattr(result, name) for name in ("status", "loss", "bits_per_byte", "seconds")}


def _show_results(found) -> None:
    table = cli.make_table("", "run", "parameters", "tokens", "loss", "bits/byte", "seconds", "status")
    for run, status, loss, bits, seconds in found:
        forms = (loss, ".4f"), (bits, ".4f"), (seconds, ".0f")
        numbers = ("–" if value is None else f"{value:{form}}" for value, form in forms)
        table.add_row(run.name, f"{run.parameters:,}", f"{run.tokens:,}", *numbers, status)
    cli.print_wide(table)
