"""What changes over a run, as pure functions of its exact progress: learning rate and batch size.

They are computed on the host, in Python's integers: 300 billion tokens do not fit a 32-bit counter,
and the value that is logged is the value that was used, without asking the device.
"""

import math
from typing import NamedTuple

from gptjax.config import OptimizerConfig, TrainingConfig


class Progress(NamedTuple):
    """How far a run is: everything the schedules and the data order depend on."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    """That the trained model has read, padding included (`workload.sequence_tokens`). A run that began when each
    sequence was counted as one row of text goes on from the count that it has saved."""
    left_out: int = 0
    """Sequences that were passed over, because the run diverged on them."""

    @property
    def position(self) -> int:
        """Of the next sequence, in the order of the data."""
        return self.sequences + self.left_out

    def advance(self, sequences: int, sequence_length: int) -> "Progress":
        """The progress after one more step of so many sequences."""
        return self._replace(
            step=self.step + 1,
            sequences=self.sequences + sequences,
            tokens=self.tokens + sequences * sequence_length,
        )


def learning_rate(config: OptimizerConfig, progress: Progress) -> float:
    """The learning rate of the step that starts at `progress`.

    Linear warm-up that reaches the peak with its last step (or token); then the schedule down to
    `final_learning_rate_fraction` of the peak at `decay_steps` (or `decay_tokens`), and that from there on.
    `wsd` is warm-up, stable, decay (Hägele et al. 2024).
    """
    warmup = 1.0
    if config.warmup_tokens:
        warmup = min(1.0, (progress.tokens + 1) / config.warmup_tokens)
    elif config.warmup_steps:
        warmup = min(1.0, (progress.step + 1) / config.warmup_steps)
    # A product, because a warm-up in tokens and a decay in steps may overlap.
    return config.peak_learning_rate * warmup * _decay(config, _fraction_decayed(config, progress))


def _fraction_decayed(config: OptimizerConfig, progress: Progress) -> float:
    if config.decay_tokens:
        now, start, end = progress.tokens, config.warmup_tokens, config.decay_tokens
    else:
        now, start, end = progress.step, config.warmup_steps, config.decay_steps
    return min(1.0, max(0.0, (now - start) / max(1, end - start)))


def _decay(config: OptimizerConfig, fraction: float) -> float:
    floor = config.final_learning_rate_fraction
    match config.schedule:
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fraction))
        case "linear":
            return 1 - (1 - floor) * fraction
        case "wsd":
            stable = 1 - config.wsd_decay_fraction
            return 1.0 if fraction <= stable else 1 - (1 - floor) * (fraction - stable) / (1 - stable)
        case "constant":
            return 1.0


def batch_size(config: TrainingConfig, progress: Progress) -> int:
    """Sequences of the step that starts at `progress`: a multiple of the micro-batch, growing linearly in tokens."""
    start, full = config.resolved_batch_ramp_start, config.batch_size
    if start == full or progress.tokens >= config.batch_ramp_tokens:
        return full
    micro = config.resolved_micro_batch_size
    grown = start + (full - start) * progress.tokens / config.batch_ramp_tokens
    return max(micro, int(grown) // micro * micro)


def final_progress(config: TrainingConfig, sequence_tokens: int) -> Progress:
    """The progress at the end of a run, its batch ramp included.

    Args:
        sequence_tokens: of one sequence of a batch, as far as the model reads them.
    """
    progress = Progress()
    while progress.step < config.steps and (size := batch_size(config, progress)) < config.batch_size:
        progress = progress.advance(size, sequence_tokens)
    left = config.steps - progress.step
    sequences = progress.sequences + left * config.batch_size
    return Progress(config.steps, sequences, sequences * sequence_tokens)


def steps_for(config: TrainingConfig, sequence_tokens: int, sequences: float) -> float:
    """Steps that so many sequences take, the batch ramp included: the reverse of `final_progress`.

    A step that needs only part of its batch counts as that part.
    """
    progress = Progress()
    while (size := batch_size(config, progress)) < config.batch_size and progress.sequences + size <= sequences:
        progress = progress.advance(size, sequence_tokens)
    return progress.step + (sequences - progress.sequences) / size
