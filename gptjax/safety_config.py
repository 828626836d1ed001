"""The settings of what keeps a run safe, as frozen dataclasses; `config.py` has all others.

Only the standard library is imported.
"""

import math
from dataclasses import dataclass

from gptjax.checks import require_range, require_types


@dataclass(frozen=True)
class GuardConfig:
    """What keeps a bad batch or a bad device from ruining a run."""

    spike_sigmas: float = 6.0
    """Skip a step whose loss, or norm if also fivefold, is so many deviations above 128 steps' mean. 0: only NaN."""
    max_skipped: int = 10
    """Skipped steps in a row after which the run counts as diverged."""
    max_rollbacks: int = 3
    """Times that a diverged run goes back to a checkpoint and leaves out the batches since, before it ends."""
    rerun_every_steps: int = 0
    """Steps between those computed twice and compared bit for bit, which takes room for a second state. 0: none."""

    def __post_init__(self):
        require_types("guard.", self)
        require_range("guard.", self, 0, math.inf, "spike_sigmas", "max_rollbacks", "rerun_every_steps")
        require_range("guard.", self, 1, math.inf, "max_skipped")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every_steps: int = 250
    """Steps between checkpoints. 0: only at the end or when told to stop."""
    keep_newest: int = 2
    """Newest checkpoints kept: one that turns out damaged has one before it."""
    keep_best: int = 1
    """Checkpoints of the lowest validation loss kept."""
    verify: bool = True
    """Compare a checkpoint's checksums before a run goes on from it."""

    def __post_init__(self):
        require_types("checkpoint.", self)
        require_range("checkpoint.", self, 0, math.inf, "every_steps", "keep_best")
        require_range("checkpoint.", self, 1, math.inf, "keep_newest")
