"""Where a run's seconds go."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

KINDS = ("compile", "data", "evaluation", "sample", "checkpoint")
"""What is counted. `data` is waiting for data: reading while the device computes is part of the step."""


class Ledger:
    """Wall-clock seconds by kind of work. What no block counts is the training steps', so the kinds sum to the wall.

    Example:
        ledger = Ledger()
        with ledger("evaluation"):
            evaluate()
        ledger.seconds["evaluation"]
    """

    def __init__(self, before: Mapping[str, float] | None = None):
        """`before`: the seconds that earlier processes spent on the same run, as their `seconds` said."""
        self._before = before or {}
        self._counted = dict.fromkeys(KINDS, 0.0)
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, kind: str | Callable[[], str | None]) -> Iterator[None]:
        """Count the block's seconds; a function is asked for the kind when the block has ended, None: a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            name = kind if isinstance(kind, str) else kind()
            if name is not None:
                self._counted[name] += time.perf_counter() - start

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by kind since the run's first start, `step` among them, without the time between processes."""
        step = time.perf_counter() - self._start - sum(self._counted.values())
        return {name: value + self._before.get(name, 0.0) for name, value in (self._counted | {"step": step}).items()}

    @property
    def wall_seconds(self) -> float:
        """Their sum."""
        return sum(self.seconds.values())

    @property
    def productive_seconds(self) -> float:
        """Seconds of training steps, waiting for their data included."""
        seconds = self.seconds
        return seconds["step"] + seconds["data"]
