"""How a run goes on: what may differ from before, where it stood, and what its logs say of steps to come again."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from gptjax.config import Config
from gptjax.config_files import saved_config
from gptjax.errors import UserError
from gptjax.parallel import distributed
from gptjax.resolve import refit_mesh
from gptjax.stages.stage import Data, Stage
from gptjax.text.tokenizer import Tokenizer
from gptjax.training import checkpoint, recovery, run_dir
from gptjax.training.guard import forget
from gptjax.training.loop import Callbacks, is_due
from gptjax.training.metrics import METRICS_FILE, Console, read_metrics
from gptjax.training.schedule import Progress
from gptjax.training.state import TrainState
from gptjax.training.summary import read_summary


def merge_with_saved(config: Config, directory: Path, accepted: Collection[str], console: Console) -> Config:
    """The configuration with which the run in this folder goes on; what changes is said.

    Raises:
        UserError: as `run_dir.merge_resume`.
    """
    saved, environment = run_dir.load_run_config(directory)
    if "imported" in environment:
        raise UserError(
            f"{directory} was imported: it has no training to go on with; start a run from it with --model.init-from "
            f"{directory} and another --run-dir"
        )
    config = dataclasses.replace(config, mesh=refit_mesh(saved.mesh, config.mesh, jax.device_count()))
    config, changes = run_dir.merge_resume(saved, config, accepted)
    for field, (old, new) in changes.items():
        console.message(f"changed for this run: {field} {old} → {new}")
    rounding = [field for field in changes if field.startswith(("mesh.", "model."))]
    for line in [*rounding, *run_dir.environment_changes(environment, run_dir.environment())]:
        console.message(f"from here on not bit-identical to an uninterrupted run: {line}")
    if "training.steps" in changes:
        floor = config.optimizer.peak_learning_rate * config.optimizer.final_learning_rate_fraction
        console.message(f"the learning rate keeps its schedule to step {config.optimizer.decay_steps}, then {floor:g}")
    return config


def check_same_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """
    Raises:
        UserError: it is not the run's.
    """
    if Tokenizer.load(directory / run_dir.TOKENIZER_FILE).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the text of data.path makes another tokenizer than the one {directory} was trained with; "
            "give the data it was trained on, or start a new run with another --run-dir"
        )


def start(
    config: Config,
    stage: Stage,
    directory: Path,
    data: Data,
    console: Console,
    accepted: Collection[str],
) -> tuple[TrainState, Progress, dict[str, float]]:
    """The state of the newest checkpoint that is not damaged, or a fresh one; its progress; its seconds by kind.

    Args:
        accepted: fields that may be others than the checkpoint was made with; with `data.path` the text may be.

    Raises:
        UserError: others are; or as `checkpoint.restore`.
    """
    checkpoints = directory / run_dir.CHECKPOINTS
    if not recovery.agreed_steps(checkpoints):
        return stage.new_state(), Progress(), {}
    verify = config.checkpoint.verify
    choice = recovery.choose(checkpoints, checkpoint.steps_by_age, verify=verify, glance=True)
    metadata = checkpoint.read_metadata(checkpoints, choice.step)
    # What config.json says may have been changed since, by hand or by a bad disk; a checkpoint has checksums.
    run_dir.merge_resume(saved_config(metadata["config"]), config, accepted)
    if metadata["data"] != data.fingerprint and "data.path" not in accepted:
        raise UserError(
            f"the tokens in {data.place} are not those that {directory} was trained on: the text of data.path has "
            "changed; bring it back, start a new run with another --run-dir, or go on with --accept-changes data.path"
        )
    state, _ = checkpoint.restore(checkpoints, choice.step, stage.abstract_state)
    with distributed.together():
        if distributed.is_first():
            for line in recovery.tidy(checkpoints, choice):
                console.message(line)
    if accepted:
        state = state._replace(guard=forget(state.guard))
    progress = Progress(**metadata["progress"])
    left_out = distributed.from_first(lambda: _left_out(directory, progress))
    return state, progress._replace(left_out=left_out), metadata["seconds"]


def _left_out(directory: Path, progress: Progress) -> int:
    """The sequences to leave out, those included of rollbacks to this step that no checkpoint knows of yet."""
    told = [r["left_out"] for r in _records(directory) if "left_out" in r and r["step"] == progress.step]
    return max([progress.left_out, *told])


def tried_rollbacks(directory: Path, step: int) -> list[int]:
    """The steps that the run went back to and has not come beyond: its newest checkpoint is of this step."""
    return distributed.from_first(
        lambda: [r["step"] for r in _records(directory) if "rolled_back_from" in r and r["step"] >= step]
    )


def _records(directory: Path) -> list[dict[str, Any]]:
    """What the run's metrics say, which process 0 alone reads: others may see an older file."""
    path = directory / METRICS_FILE
    return read_metrics(path) if path.exists() else []


def count_lost(directory: Path, step: int, seconds: dict[str, float]) -> dict[str, float]:
    """The seconds of a run so far, with those that an earlier process reported after the checkpoint as lost.

    A checkpoint cannot know how long its own save took. A process that stopped at this step has written that down.
    """
    summary = read_summary(directory)
    if summary and summary["step"] == step and sum(summary.get("seconds", {}).values()) > sum(seconds.values()):
        seconds = summary["seconds"]
    if not (records := _records(directory)):
        return seconds
    told = [record["seconds"] for record in records if "seconds" in record]
    lost = max(0.0, (told or [0.0])[-1] - sum(seconds.values()))
    return seconds | {"lost": seconds.get("lost", 0.0) + lost}


def cut_back(directory: Path, step: int) -> None:
    """Drop what the run's logs say of steps after the restored one: they come again."""
    run_dir.cut_metrics(directory / METRICS_FILE, step)
    samples = directory / run_dir.SAMPLES_FILE
    if samples.exists():
        text = samples.read_text(encoding="utf-8", errors="replace")  # a kill may have cut a character
        sections = re.split(r"^(?=## step \d+$)", text, flags=re.MULTILINE)
        kept = [s for s in sections if not (match := re.match(r"## step (\d+)", s)) or int(match[1]) <= step]
        run_dir.write_text(samples, "".join(kept))


def make_up_evaluation(
    config: Config, directory: Path, state: TrainState, progress: Progress, calls: Callbacks
) -> None:
    """Evaluate the restored step if the run was told to stop at it, just before its evaluation."""
    if progress.step == 0 or not is_due(config.training.eval_every_steps, progress.step, config.training.steps):
        return
    if not distributed.from_first(
        lambda: any(r["step"] == progress.step and "val_loss" in r for r in _records(directory))
    ):
        calls.report({"step": progress.step, "tokens": progress.tokens, **calls.evaluate(state)})
