"""What a run says when it starts and when it ends."""

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from gptjax.config import Config, MeshConfig
from gptjax.data.loader import Rows
from gptjax.errors import UserError
from gptjax.model import kernels
from gptjax.model.accounting import parameter_counts
from gptjax.model.workload import Networks, described, sequence_tokens
from gptjax.stages.stage import Data
from gptjax.training import run_dir
from gptjax.training.metrics import METRICS_FILE, plot_loss
from gptjax.training.schedule import Progress, final_progress


def description(config: Config, held: Networks, progress: Progress, of_stage: Sequence[str]) -> str:
    """What is about to run, in a few lines, the last ones the stage's own."""
    device, model, training = jax.devices()[0], config.model, config.training
    counts = parameter_counts(model)
    tokens = final_progress(training, sequence_tokens(held)).tokens
    return "\n".join(
        (
            f"model: {counts['total']:,} parameters ({counts['embedding']:,} of them embedding), "
            f"{model.num_layers} layers, context {model.context_length}, {model.compute_dtype}",
            f"devices: {jax.device_count()} × {device.device_kind}, mesh {axes(config.mesh)}",
            f"attention: {attention_kernels(config)}",
            f"training: steps {progress.step} to {training.steps} of {training.batch_size} sequences of "
            f"{described(held)}, {tokens:,} tokens, in {config.run_dir}",
            *of_length(config),
            *of_stage,
        )
    )


def of_length(config: Config) -> list[str]:
    """That rows are not as long as the model's context, where they are not."""
    length, context = config.sequence_length, config.model.context_length
    if length == context:
        return []
    compared, then = ("shorter", "") if length < context else ("longer", ", where samples end")
    return [f"rows: training.sequence_length {length} is {compared} than the model's context of {context}{then}"]


def of_rows(config: Config, data: Data, sources: dict[str, Rows], held_out: Rows) -> list[str]:
    """How often each source is seen, and how much of what is held out.

    Args:
        sources: rows of the training split, by the source's name.
        held_out: rows of the validation split.
    """
    tokens = data.rows.count * data.rows.num_tokens
    sequences = final_progress(config.training, tokens).sequences
    return [
        *_epochs(sources, config.data.weights or (1.0,), sequences, tokens),
        of_evaluation(config, len(held_out), "validation sequences"),
    ]


def of_evaluation(config: Config, total: int, what: str) -> str:
    """How much of what is held out every evaluation reads."""
    limit = config.training.eval_sequences
    if not limit or limit >= total:
        return f"evaluation: all {total:,} {what}"
    return f"evaluation: {limit:,} of {total:,} {what}, evenly spaced (training.eval_sequences)"


def attention_kernels(config: Config) -> str:
    """Which kernels training takes on this machine, and why.

    Raises:
        UserError: the one that `model.attention_kernel` forces cannot run.
    """
    calls = kernels.training_calls(
        config.model, config.sequence_length, documents=config.separates_documents, context=config.mesh.context
    )
    return kernels.describe(config.model, calls, kernels.this_machine())


def axes(mesh: MeshConfig) -> str:
    """A mesh's axes that there are today: data 2 × fsdp 4 × context 1 × tensor 1."""
    return " × ".join(f"{name} {size}" for name, size in dataclasses.asdict(mesh).items() if name != "expert")


def _epochs(sources: dict[str, Rows], weights: Sequence[float], sequences: int, sequence_tokens: int) -> Iterator[str]:
    relative = [weight / max(weights) for weight in weights]  # the sum of the weights themselves may overflow
    for (name, rows), weight in zip(sources.items(), relative, strict=True):
        share = weight / sum(relative)
        epochs = share * sequences / len(rows)
        yield f"  {100 * share:.3g} % from {name}: {len(rows) * sequence_tokens:,} tokens, {epochs:.2g} epochs"


def closing(summary: dict[str, Any], directory: Path, config: Config) -> str:
    """What a user wants to know at the end, where everything lies, and the exact next command. Draws the plot."""
    lines = [f"{summary['stopped']} at step {summary['step']} after {summary['wall_seconds']:.0f} s"]
    if summary["val_perplexity"] is not None:
        lines.append(
            f"validation: {summary['val_loss']:.4f} nats/token, {summary['val_bits_per_byte']:.4f} bits/byte, "
            f"perplexity {summary['val_perplexity']:.2f}"
        )
    try:
        plot_loss(directory, directory / run_dir.PLOT_FILE)
    except (UserError, OSError) as error:
        lines.append(f"no {run_dir.PLOT_FILE}: {error}")
    files = (run_dir.CONFIG_FILE, run_dir.TOKENIZER_FILE, run_dir.CHECKPOINTS, METRICS_FILE, run_dir.SAMPLES_FILE)
    files = (*files, run_dir.SUMMARY_FILE, run_dir.PLOT_FILE)
    lines.append(f"in {directory}: {', '.join(name for name in files if (directory / name).exists())}")
    return "\n".join([*lines, next_command(directory, config, summary["stopped"])])


def next_command(directory: Path, config: Config, stopped: str) -> str:
    """How to sample a finished run, or to continue another."""
    run = shlex.quote(str(directory))
    if stopped == "finished" and config.stage == "reward":
        source = shlex.quote(config.model.init_from or "RUN")
        return (
            "next, a policy that it judges: python train.py configs/ppo.py "
            f"--model.init-from {source} --rl.reward {run} --data.path {shlex.join(config.data.path)}"
        )
    if stopped == "finished" and config.stage != "pretrain":
        return f"next: python sample.py {run}"
    if stopped == "finished":
        prompt = config.training.sample_prompt
        option = f" --prompt {shlex.quote(prompt)}" if prompt.strip() else ""  # the default starts a new line, too
        return f"next: python sample.py {run}{option}"
    return f"continue with: python train.py {run}"
