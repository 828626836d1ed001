"""What the loop calls: reports, evaluations, samples and checkpoints.

All processes evaluate, sample and save together; the first alone writes what is not a checkpoint.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from gptjax.config import Config, ModelConfig
from gptjax.config_files import to_dict
from gptjax.data.loader import Rows, Share, evaluation_rows
from gptjax.errors import UserError
from gptjax.evaluation.perplexity import evaluate
from gptjax.model.gpt import GPT, Params
from gptjax.parallel import distributed, sharding
from gptjax.sampling.config import SamplingConfig
from gptjax.stages.stage import Data
from gptjax.text.tokenizer import Tokenizer
from gptjax.training import checkpoint, run_dir
from gptjax.training.ledger import Ledger
from gptjax.training.loggers import Logger
from gptjax.training.losses import Loss, language_model_loss
from gptjax.training.metrics import Console, MetricsLog
from gptjax.training.schedule import Progress
from gptjax.training.state import TrainState


def separator(config: Config, tokenizer: Tokenizer) -> int | None:
    """The token between documents that do not see each other; None where they do."""
    return tokenizer.document_start[-1] if config.data.separate_documents else None


def opening(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every text; None: nothing stands there."""
    return tokenizer.opening[-1] if tokenizer.opening else None


def text_loss(config: Config, model: GPT, tokenizer: Tokenizer) -> Loss:
    """The loss of rows of text, wherever they are learned from."""
    training = config.training
    return language_model_loss(
        *(model, training.z_loss, separator(config, tokenizer), training.loss_chunk_tokens),
        opening=opening(tokenizer),
    )


def share(config: Config) -> Share | None:
    """The rows of each micro-batch that this process reads; None: all."""
    if distributed.num_processes() == 1:
        return None
    size = config.training.resolved_micro_batch_size
    return Share(sharding.local_rows(size), size)


def reporter(
    config: Config, log: MetricsLog, loggers: Sequence[Logger], console: Console
) -> Callable[[dict[str, Any]], None]:
    """Metrics to `metrics.jsonl`, the loggers and the console; of the first process alone."""

    def report(metrics: dict[str, Any]) -> None:
        if not distributed.is_first():
            return
        log.write(metrics)
        for logger in loggers:
            logger.log(metrics)
        if any(name.startswith("val_") for name in metrics):
            console.log_evaluation(metrics)
            return
        console.log(metrics, config.training.steps)

    return report


def evaluator(
    config: Config, rows: Rows, tokenizer: Tokenizer, whole: Callable[[Params], Params]
) -> Callable[[TrainState], dict[str, float]]:
    """`training.eval_sequences` of the validation split, the same every time.

    Args:
        whole: the model's parameters, from those that are trained.
    """
    token_bytes = np.array([len(raw) for raw in tokenizer.token_bytes()])
    batch_size, limit = config.training.resolved_micro_batch_size, config.training.eval_sequences
    chunk_tokens = config.training.loss_chunk_tokens

    def evaluate_state(state: TrainState) -> dict[str, float]:
        batches = evaluation_rows(rows, batch_size, limit, share(config))
        found = evaluate(
            as_used(config.model),
            whole(state.params),
            batches,
            token_bytes,
            separator(config, tokenizer),
            batch_size,
            chunk_tokens,
            packed=config.stage == "sft",
            opening=opening(tokenizer),
        )
        return {
            "val_loss": found.nats_per_token,
            "val_bits_per_byte": found.bits_per_byte,
            "val_perplexity": found.perplexity,
        }

    return evaluate_state


def as_used(model: ModelConfig) -> ModelConfig:
    """What is trained in eight bits is used without, by `load_run` too: the losses here are those of that model."""
    return dataclasses.replace(model, fp8=False)


def sampler(
    directory: Path, write: Callable[[TrainState], str], log: Callable[[str], None]
) -> Callable[[TrainState, Progress], None]:
    """What the model writes, to `samples.md` and the console.

    Args:
        write: all processes call it.
    """

    def sample(state: TrainState, progress: Progress) -> None:
        text = write(state)
        if not distributed.is_first():
            return
        try:
            with (directory / run_dir.SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.write(f"## step {progress.step}\n\n```\n{text}\n```\n\n")
        except OSError as error:
            raise UserError(f"cannot write {directory / run_dir.SAMPLES_FILE}: {error.strerror}") from error
        log(f"sample at step {progress.step}:\n" + "\n".join(f"  | {line}" for line in text.splitlines()))

    return sample


def sample_settings(config: Config) -> SamplingConfig:
    """How the samples of a run are drawn."""
    training = config.training
    return SamplingConfig(max_tokens=training.sample_tokens, temperature=0.7, top_p=0.95, seed=training.seed)


def watcher(
    stop: Callable[[], bool], manager: ocp.CheckpointManager, require_folder: Callable[[], None]
) -> Callable[[], bool]:
    """Whether to stop; and at once, not at the next save, that the last one failed or the run's folder is gone."""

    def should_stop() -> bool:
        require_folder()
        checkpoint.raise_failed_save(manager)
        return stop()

    return should_stop


def saver(
    config: Config, manager: ocp.CheckpointManager, data: Data, ledger: Ledger
) -> Callable[[TrainState, Progress, dict[str, float] | None], None]:
    """State, progress and all that a run needs to go on."""

    def save(state: TrainState, progress: Progress, metrics: dict[str, float] | None) -> None:
        metadata = {
            "progress": progress._asdict(),
            "seconds": ledger.seconds,
            "data": data.fingerprint,
            "config": to_dict(config),
            "tokenizer": data.tokenizer.to_json(),
        }
        checkpoint.save(manager, progress.step, state, metadata, metrics)

    return save
