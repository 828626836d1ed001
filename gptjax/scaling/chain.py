"""The runs of a study that share a trunk, one after the other in this process: what a job of a study is."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from gptjax.config import Config
from gptjax.config_files import replace_fields
from gptjax.errors import UserError
from gptjax.plain_files import named
from gptjax.scaling.conduct import ENDED
from gptjax.scaling.study import PlannedRun
from gptjax.stages.train import train
from gptjax.training.run_dir import CONFIG_FILE
from gptjax.training.summary import read_summary

BRANCHED = ("optimizer.schedule", "optimizer.decay_steps")
"""What a branch changes of its trunk: until the decay begins both schedules are the same."""


def run_chain(runs: Sequence[PlannedRun], folder: Path, *, branch: bool) -> str:
    """Train all of these that have not ended, from the smallest budget to the largest.

    Args:
        runs: of one trunk.
        folder: of the study; each run gets its own under `runs/`.
        branch: train the trunk once, and let each run go on from a copy of it where its decay begins.

    Returns:
        How it ended: `finished` if all runs did or diverged, or why the last one was stopped.
    """
    for run in runs:
        directory = folder / "runs" / run.name
        if ended(directory):
            continue
        if branch and not (directory / CONFIG_FILE).is_file():
            stopped = _grow_branch(run, folder)
            if stopped != "finished":
                return stopped
        accepted = BRANCHED if branch else ()
        summary = train(_placed(run.config, directory), name=run.name, accept_changes=accepted)
        if summary["stopped"] not in ENDED:
            return summary["stopped"]
    return "finished"


def ended(directory: Path) -> bool:
    """Whether a run's folder holds one that is done, well or badly."""
    summary = read_summary(directory)
    return summary is not None and summary["stopped"] in ENDED


def decay_start(config: Config) -> int:
    """The first step of a run whose learning rate is below the peak: where its schedule leaves its trunk's."""
    optimizer, steps = config.optimizer, config.training.steps
    stable = (1 - optimizer.wsd_decay_fraction) * (steps - optimizer.warmup_steps)
    return min(steps, optimizer.warmup_steps + max(0, int(stable)))


def _grow_branch(run: PlannedRun, folder: Path) -> str:
    """Train the trunk to where this run's decay begins, and copy it there; how that ended.

    A run whose trunk has grown past that point, because the run's folder was lost, is trained from its own beginning,
    which comes to the same.
    """
    directory, trunk = folder / "runs" / run.name, folder / "trunks" / run.trunk
    step, summary = decay_start(run.config), read_summary(trunk)
    grown = 0 if summary is None else summary["step"]
    if step == 0 or grown > step:
        return "finished"
    if grown < step or summary["stopped"] != "finished":
        schedule = {"optimizer.schedule": "constant", "optimizer.decay_steps": None, "training.steps": step}
        stopped = train(_placed(replace_fields(run.config, schedule), trunk), name=run.trunk)["stopped"]
        if stopped != "finished":
            return stopped
    _copy_run(trunk, directory)
    return "finished"


def _copy_run(source: Path, target: Path) -> None:
    """Copy a run's folder, so that the target is whole or not there; its summary is not the copy's."""
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(named(f".{target.name}", ".copy"))
    shutil.rmtree(half, ignore_errors=True)
    try:
        shutil.copytree(source, half, ignore=shutil.ignore_patterns("summary.json", "*.lock", "samples.md", "loss.png"))
        os.replace(half, target)
    except OSError as error:
        raise UserError(f"cannot copy {source} to {target}: {error}") from error


def _placed(config: Config, directory: Path) -> Config:
    return dataclasses.replace(config, run_dir=str(directory))
