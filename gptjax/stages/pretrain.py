"""Pretraining: raw text in, a run directory out. The first of the stages that share step, loop and checkpoints."""

import dataclasses
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from gptjax.config import Config, DataConfig, resolve, to_dict
from gptjax.data.loader import RowStream, TokenRows, evaluation_rows
from gptjax.data.prepare import prepare
from gptjax.data.shards import PreparedData
from gptjax.errors import UserError
from gptjax.evaluation.perplexity import evaluate
from gptjax.model.accounting import mfu, parameter_counts, peak_flops, training_flops_per_token
from gptjax.model.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.generate import generate
from gptjax.text.tokenizer import Tokenizer
from gptjax.training import checkpoint, run_dir
from gptjax.training.ledger import Ledger
from gptjax.training.loop import Callbacks, fit
from gptjax.training.losses import language_model_loss
from gptjax.training.metrics import METRICS_FILE, Console, MetricsLog, plot_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.schedule import Progress
from gptjax.training.signals import stop_on_signals
from gptjax.training.state import TrainState, abstract_state, init_state
from gptjax.training.step import TrainStep, make_train_step
from gptjax.training.summary import Diverged, read_summary, summarize

SAMPLES_FILE = "samples.md"
TOKENIZER_FILE = "tokenizer.json"
CHECKPOINTS = "checkpoints"


def train(config: Config, *, name: str = "run", console: Console | None = None) -> dict[str, Any]:
    """Train a model on the text of `data.path`, or continue the run in `run_dir` exactly where it stood.

    Args:
        config: fields left None are derived; `run_dir` None takes the next free name under `runs/`.
        name: what a new run is called after.
        console: where progress is shown; standard output by default.

    Returns:
        What the run's `summary.json` holds.

    Raises:
        UserError: configuration, data or the run's folder do not fit; before anything is compiled, and
            without changing what is there.
    """
    directory = Path(config.run_dir) if config.run_dir else run_dir.next_run_dir(name)
    config = dataclasses.replace(config, run_dir=str(directory))
    with console or Console() as console:
        continued = (directory / run_dir.CONFIG_FILE).is_file()
        if continued:
            config = _merge_with_saved(config, directory, console)
            summary = read_summary(directory)
            if summary and summary["stopped"] == "finished" and summary["step"] >= config.training.steps:
                console.message(
                    f"{directory} is finished: {summary['step']} steps.\n{_next_commands(directory, config)}"
                )
                return summary
        run_dir.check_writable(directory)
        if config.data.path == DataConfig().path:
            console.message("no --data.path: training on the source code of Python's standard library")
        data = prepare(config.data, config.tokenizer, log=console.message)
        if continued:
            _check_same_tokenizer(directory, data.tokenizer)
        config = resolve(config, jax.devices(), data.tokenizer)
        with jax.set_mesh(make_mesh(config.mesh)):
            return _pretrain(config, directory, data, console)


def _pretrain(config: Config, directory: Path, data: PreparedData, console: Console) -> dict[str, Any]:
    """Everything from the first array to the summary, under the mesh."""
    rows = _rows(data, "train", config)
    held_out = _rows(data, "validation", config)
    model, optimizer = GPT(config.model), make_optimizer(config.optimizer)
    with (
        checkpoint.open_checkpoints(directory / CHECKPOINTS, config.checkpoint) as manager,
        stop_on_signals() as stop,
    ):
        state, progress, seconds_before = _start(model, optimizer, config, directory, data)
        run_dir.save_config(directory, config, run_dir.environment())
        data.tokenizer.save(directory / TOKENIZER_FILE)
        _cut_back(directory, progress.step)
        console.message(_description(config, data, rows, held_out, progress))
        ledger = Ledger(before=seconds_before)
        stream = RowStream(rows, config.training.seed, progress.sequences)
        callbacks = Callbacks(
            report=_reporter(config, MetricsLog(directory / METRICS_FILE), console),
            evaluate=_evaluator(config, held_out, data.tokenizer),
            sample=_sampler(config, directory, data.tokenizer, console),
            save=_saver(config, manager, data, ledger),
            should_stop=stop,
        )
        try:
            state, progress = fit(
                *(config, state, progress, _compile_step(config, model, optimizer), stream, callbacks, ledger),
                mfu_per_token_rate=_mfu_per_token_rate(config),
            )
            stopped = stop.outcome or "finished"
        except Diverged as error:
            console.message(str(error))
            stopped = "diverged"
        finally:
            stream.close()
        with ledger("checkpoint"):
            manager.wait_until_finished()
    if progress.step == config.training.steps and stopped != "diverged":
        stopped = "finished"
    summary = summarize(directory, stopped, progress, ledger, parameter_counts(config.model)["total"])
    run_dir.write_json(directory / "summary.json", summary)
    console.message(_closing(summary, directory, config))
    return summary


def _merge_with_saved(config: Config, directory: Path, console: Console) -> Config:
    saved, environment = run_dir.load_run_config(directory)
    config, changes = run_dir.merge_resume(saved, config)
    for field, (old, new) in changes.items():
        console.message(f"changed for this run: {field} {old} → {new}")
    for line in run_dir.environment_changes(environment, run_dir.environment()):
        console.message(f"from here on not bit-identical to an uninterrupted run: {line}")
    return config


def _check_same_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    if Tokenizer.load(directory / TOKENIZER_FILE).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the text of data.path makes another tokenizer than the one {directory} was trained with; "
            "give the data it was trained on, or start a new run with another --run-dir"
        )


def _rows(data: PreparedData, split: str, config: Config) -> TokenRows:
    try:
        return TokenRows(data.tokens(split), config.model.context_length)
    except UserError as error:
        raise UserError(
            f"{split} split (data.validation_fraction {config.data.validation_fraction:g}): {error}"
        ) from None


def _start(
    model: GPT, optimizer: optax.GradientTransformation, config: Config, directory: Path, data: PreparedData
) -> tuple[TrainState, Progress, float]:
    """The state of the newest checkpoint, or a fresh one; its progress; and the seconds it took so far."""
    steps = checkpoint.all_steps(directory / CHECKPOINTS)
    if not steps:
        return init_state(model, optimizer, config.training.seed), Progress(), 0.0
    metadata = checkpoint.read_metadata(directory / CHECKPOINTS, steps[-1])
    if metadata["data"] != data.index.content_fingerprint:
        raise UserError(
            f"the tokens in {data.folder} are not those that {directory} was trained on: the text of data.path has "
            "changed; bring it back, or start a new run with another --run-dir"
        )
    state, _ = checkpoint.restore(directory / CHECKPOINTS, steps[-1], abstract_state(model, optimizer))
    return state, Progress(**metadata["progress"]), metadata["seconds"]


def _cut_back(directory: Path, step: int) -> None:
    """Drop what the run's logs say of steps after the restored one: they come again."""
    run_dir.cut_metrics(directory / METRICS_FILE, step)
    samples = directory / SAMPLES_FILE
    if samples.exists():
        sections = re.split(r"^(?=## step \d+$)", samples.read_text(encoding="utf-8"), flags=re.MULTILINE)
        kept = [s for s in sections if not (match := re.match(r"## step (\d+)", s)) or int(match[1]) <= step]
        samples.write_text("".join(kept), encoding="utf-8")


def _compile_step(config: Config, model: GPT, optimizer: optax.GradientTransformation) -> TrainStep:
    c, training = config.model, config.training
    drops = c.embedding_dropout or c.attention_dropout or c.residual_dropout
    return make_train_step(
        language_model_loss(model, training.z_loss),
        optimizer,
        compute_dtype=c.compute_dtype,
        dropout_seed=training.seed if drops else None,
        accumulates=training.batch_size > training.resolved_micro_batch_size,
        steps_per_dispatch=training.steps_per_dispatch,
    )


def _mfu_per_token_rate(config: Config) -> float | None:
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind, device.platform)
    return mfu(1.0, training_flops_per_token(config.model).total, jax.device_count(), peak)


def _reporter(config: Config, log: MetricsLog, console: Console) -> Callable[[dict[str, Any]], None]:
    def report(metrics: dict[str, Any]) -> None:
        log.write(metrics)
        if "val_loss" in metrics:
            console.log_evaluation(metrics)
            return
        console.log(metrics, config.training.steps)
        if not math.isfinite(metrics["loss"]):
            raise Diverged(f"step {metrics['step']}: the loss is {metrics['loss']}; the checkpoints are from before")

    return report


def _evaluator(config: Config, rows: TokenRows, tokenizer: Tokenizer) -> Callable[[TrainState], dict[str, float]]:
    token_bytes = np.array([len(raw) for raw in tokenizer.token_bytes()])
    batch_size, limit = config.training.resolved_micro_batch_size, config.training.eval_sequences

    def evaluate_state(state: TrainState) -> dict[str, float]:
        found = evaluate(config.model, state.params, evaluation_rows(rows, batch_size, limit), token_bytes)
        return {
            "val_loss": found.nats_per_token,
            "val_bits_per_byte": found.bits_per_byte,
            "val_perplexity": found.perplexity,
        }

    return evaluate_state


def _sampler(
    config: Config, directory: Path, tokenizer: Tokenizer, console: Console
) -> Callable[[TrainState, Progress], None]:
    training = config.training
    sampling = SamplingConfig(max_tokens=training.sample_tokens, seed=training.seed)

    def sample(state: TrainState, progress: Progress) -> None:
        (completion,) = generate(config.model, state.params, tokenizer, [training.sample_prompt], sampling)
        text = completion.prompt + completion.text
        with (directory / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            file.write(f"## step {progress.step}\n\n```\n{text}\n```\n\n")
        console.message(f"sample at step {progress.step}:\n" + "\n".join(f"  | {line}" for line in text.splitlines()))

    return sample


def _saver(
    config: Config, manager: ocp.CheckpointManager, data: PreparedData, ledger: Ledger
) -> Callable[[TrainState, Progress, dict[str, float] | None], None]:
    def save(state: TrainState, progress: Progress, metrics: dict[str, float] | None) -> None:
        metadata = {
            "progress": progress._asdict(),
            "seconds": ledger.wall_seconds,
            "data": data.index.content_fingerprint,
            "config": to_dict(config),
            "tokenizer": data.tokenizer.to_json(),
        }
        checkpoint.save(manager, progress.step, state, metadata, metrics)

    return save


def _description(config: Config, data: PreparedData, rows: TokenRows, held_out: TokenRows, progress: Progress) -> str:
    """What is about to run, in a few lines."""
    device, training = jax.devices()[0], config.training
    counts = parameter_counts(config.model)
    tokens = data.index.splits["train"].tokens
    epochs = training.steps * training.batch_size / len(rows)
    evaluated = min(training.eval_sequences, len(held_out)) or len(held_out)
    mesh = " × ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(config.mesh).items())
    return "\n".join(
        (
            f"model: {counts['total']:,} parameters ({counts['embedding']:,} of them embedding), "
            f"{config.model.num_layers} layers, context {config.model.context_length}, {config.model.compute_dtype}",
            f"devices: {jax.device_count()} × {device.device_kind}, mesh {mesh}",
            f"training: steps {progress.step} to {training.steps} of {training.batch_size} sequences, "
            f"{epochs:.2g} epochs of {tokens:,} tokens, in {config.run_dir}",
            f"evaluation: {evaluated:,} of {len(held_out):,} validation sequences, from the first",
        )
    )


def _closing(summary: dict[str, Any], directory: Path, config: Config) -> str:
    """What a user wants to know at the end, and the exact next command."""
    lines = [f"{summary['stopped']} at step {summary['step']} after {summary['wall_seconds']:.0f} s"]
    if summary["val_loss"] is not None:
        lines.append(
            f"validation: {summary['val_loss']:.4f} nats/token, {summary['val_bits_per_byte']:.4f} bits/byte, "
            f"perplexity {summary['val_perplexity']:.2f}"
        )
    try:
        plot_loss(directory, directory / "loss.png")
        plot = "loss.png"
    except UserError as error:
        plot = f"no loss.png: {error}"
    lines.append(
        f"in {directory}: {run_dir.CONFIG_FILE}, {TOKENIZER_FILE}, {CHECKPOINTS}/, {METRICS_FILE}, {SAMPLES_FILE}, "
        f"summary.json, {plot}"
    )
    return "\n".join([*lines, _next_commands(directory, config, summary["stopped"])])


def _next_commands(directory: Path, config: Config, stopped: str = "finished") -> str:
    run = shlex.quote(str(directory))
    if stopped != "finished":
        return f"continue with: python train.py {run}"
    return (
        f"next: python sample.py {run} --prompt {shlex.quote(config.training.sample_prompt)}\n"
        f"or train on: python train.py {run} --training.steps {2 * config.training.steps}"
    )
