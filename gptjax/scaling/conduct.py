"""A study from its first run to its comparison: what is left to do is done, and nothing is done twice.

The folder of a study has `study.json` (every run's configuration), `runs/NAME/` (ordinary runs), `logs/`,
`results.csv`, and, where sizes are predicted, `prediction.json`, which is written once and before their training.
"""

import csv
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config_files import differences, from_dict, to_dict
from gptjax.errors import UserError
from gptjax.plain_files import read_json
from gptjax.scaling.study import PlannedRun, Study, expand
from gptjax.training.run_dir import write_json
from gptjax.training.summary import read_summary

STUDY_FILE = "study.json"
RESULTS_FILE = "results.csv"
PREDICTION_FILE = "prediction.json"
COLUMNS = ("run", "size", "parameters", "tokens", "flops", "budget", "loss", "bits_per_byte", "seconds", "status")
"""Of results.csv; the fields of the grid come after them."""

ENDED = ("finished", "diverged")
"""How runs end that are not tried again."""
STOPPED = (75, 130)
"""Exit statuses after SIGTERM and after Ctrl-C."""

Say = Callable[[str], None]
Launcher = Callable[[Sequence[str], Path], dict[str, int]]
"""Runs the chains of these names, and gives the exit status of each."""


class Result(NamedTuple):
    """What has become of a planned run."""

    run: PlannedRun
    status: str
    """`finished`, `diverged`, `failed`, `waiting`, or as whatever else its summary has it."""
    loss: float | None
    """Validation loss at the end, in nats a token; None where there is none."""
    bits_per_byte: float | None
    seconds: float | None
    """Wall time that its process counted."""


def open_folder(study: Study, folder: Path, *, extend: bool) -> list[PlannedRun]:
    """The runs of a study, after `study.json` was compared with them or written.

    Args:
        extend: whether runs may have come to those that the study began with.

    Raises:
        UserError: the study began with other runs: what differs, and what can be done.
    """
    runs, path = expand(study), folder / STUDY_FILE
    card = {
        "question": study.question,
        "counts": study.counts,
        "predict": list(study.predict),
        "grid": list(study.grid),
        "runs": {run.name: to_dict(run.config) for run in runs},
    }
    if path.is_file():
        _require_same(_read(path), card, folder, extend)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, card)
    return runs


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, extend: bool) -> None:
    other = f"; bring the file back, or begin another study with --dir (this one is {folder})"
    for name in ("counts", "predict", "grid"):
        if before[name] != now[name]:
            raise UserError(f"the study began with {name} {before[name]}, and its file now has {now[name]}{other}")
    for name, saved in before["runs"].items():
        if name not in now["runs"]:
            raise UserError(f"the study's file no longer has the run {name} that the study began with{other}")
        if changed := differences(from_dict(saved), from_dict(now["runs"][name])):
            listed = ", ".join(f"{field} {old} → {new}" for field, (old, new) in changed.items())
            raise UserError(f"the study's file has changed since it began: {name}: {listed}{other}")
    added = [name for name in now["runs"] if name not in before["runs"]]
    if added and not extend:
        raise UserError(f"the study's file has {len(added)} new runs, {added[0]} the first; --extend adds them")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path)


def results(runs: Sequence[PlannedRun], folder: Path, failed: Collection[str] = ()) -> list[Result]:
    """What has become of the runs so far.

    Args:
        failed: trunks whose process ended badly, so that what has not ended of them failed.
    """

    def result(run: PlannedRun) -> Result:
        summary, waiting = read_summary(folder / "runs" / run.name), "failed" if run.trunk in failed else "waiting"
        if summary is None:
            return Result(run, waiting, None, None, None)
        loss, status = summary.get("val_loss"), summary["stopped"]
        if status == "finished" and summary["step"] < run.config.training.steps:
            status = waiting
        return Result(run, status, loss, summary.get("val_bits_per_byte"), summary.get("wall_seconds"))

    return [result(run) for run in runs]


def write_results(found: Sequence[Result], grid: Sequence[str], folder: Path) -> None:
    """`results.csv`: a table that `python -m gptjax fit` and anybody's tools can read."""
    temporary = folder / f"{RESULTS_FILE}.tmp"
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*COLUMNS, *grid))
        for run, status, loss, bits, seconds in found:
            section = to_dict(run.config)
            values = [section[name.split(".")[0]][name.split(".")[1]] for name in grid]
            numbers = (run.parameters, run.tokens, run.flops, run.budget, loss, bits, seconds)
            writer.writerow((run.name, run.size, *numbers, status, *values))
    os.replace(temporary, folder / RESULTS_FILE)


def conduct(
    runs: Sequence[PlannedRun],
    grid: Sequence[str],
    folder: Path,
    launch: Launcher,
    predict: Callable[[list[Result], list[PlannedRun]], dict[str, Any]],
    say: Say,
) -> list[Result]:
    """Train what is not trained yet; where sizes are predicted, write the prediction between the others and them.

    Args:
        grid: fields of the grid, for the table.
        launch: trains the chains of these names in a folder.
        predict: makes what `prediction.json` holds of the results of the others and the runs to be predicted.

    Returns:
        The results. Where some failed, those that were to be predicted from them have not begun.

    Raises:
        UserError: as `predict`: there is too little to predict from.
        Stopped: a signal ended the study; what is done is kept.
    """
    failed: set[str] = set()
    for held_out in (False, True):
        wave = [run for run in runs if run.predicted == held_out]
        if not wave or failed:
            continue
        if held_out:
            _register(runs, folder, predict, say)
        waiting = {result.run.trunk for result in results(wave, folder) if result.status not in ENDED}
        done = sum(run.trunk not in waiting for run in wave)
        say(f"{len(wave)} runs{' that are predicted' if held_out else ''}, {done} of them done before")
        chains = [*dict.fromkeys(run.trunk for run in wave if run.trunk in waiting)]
        statuses = launch(chains, folder) if chains else {}
        failed = {name for name, status in statuses.items() if status}
        write_results(results(runs, folder, failed), grid, folder)
        stopped = next((status for status in statuses.values() if status in STOPPED), None)
        if stopped is not None:
            raise Stopped(stopped)
    return results(runs, folder, failed)


class Stopped(Exception):
    """A signal ended the study; `status` is the exit status that says so."""

    def __init__(self, status: int):
        super().__init__(f"stopped with status {status}")
        self.status = status


def _register(runs: Sequence[PlannedRun], folder: Path, predict: Callable, say: Say) -> None:
    """Write `prediction.json` unless it is there: what has been predicted stays."""
    path = folder / PREDICTION_FILE
    if path.exists():
        say(f"the prediction in {path} was made before and stays")
        return
    begun = [run.name for run in runs if run.predicted and (folder / "runs" / run.name).exists()]
    if begun:
        raise UserError(f"{begun[0]} was trained before there was a prediction; move {folder / 'runs' / begun[0]} away")
    found = [result for result in results(runs, folder) if not result.run.predicted]
    prediction = predict(found, [run for run in runs if run.predicted])
    write_json(path, {"made": datetime.now(UTC).isoformat(timespec="seconds")} | prediction)
    for line in prediction["runs"]:
        say(f"predicted {line['run']}: {line['loss']:.4f} nats a token, {line['low']:.4f} to {line['high']:.4f}")
    say(f"written to {path} before any of them is trained")
