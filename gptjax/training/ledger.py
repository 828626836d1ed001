"""Where a run's seconds go."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Ledger:
    """Wall-clock seconds by kind of work; kinds are not nested, so their sum is at most the wall time.

    Example:
        ledger = Ledger()
        with ledger("data"):
            rows = stream.take(32)
        ledger.seconds["data"]
    """

    def __init__(self, before: float = 0.0):
        """`before`: seconds that earlier processes spent on the same run."""
        self.seconds: dict[str, float] = dict.fromkeys(
            ("compile", "data", "step", "evaluation", "sample", "checkpoint"), 0.0
        )
        self._before = before
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, kind: str | Callable[[], str]) -> Iterator[None]:
        """Count the block's seconds; a function is asked for the kind when the block has ended."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind if isinstance(kind, str) else kind()] += time.perf_counter() - start

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run's first start, without the time between its processes."""
        return self._before + time.perf_counter() - self._start

    @property
    def productive_seconds(self) -> float:
        """Seconds of this process that went into training steps, waiting for their data included."""
        return self.seconds["step"] + self.seconds["data"]
