"""Where a run's seconds go."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

KINDS = ("start", "compile", "data", "rollout", "evaluation", "sample", "checkpoint", "profile", "lost")
"""What is counted. `start` is everything before the loop; `data` is waiting for data: reading while the device computes
is part of the step; `rollout` is drawing and judging answers; `profile` is starting, ending and reading a trace; `lost`
are steps that were undone, and all since the checkpoint that a killed run went back to."""


class Ledger:
    """Wall-clock seconds by kind of work. What no block counts is the training steps', so the kinds sum to the wall.

    Example:
        ledger = Ledger()
        with ledger("evaluation"):
            evaluate()
        ledger.seconds["evaluation"]
    """

    def __init__(self, before: Mapping[str, float] | None = None, started: float | None = None):
        """Count from now.

        Args:
            before: the seconds that earlier processes spent on the same run, as their `seconds` said.
            started: when this process began, as `time.perf_counter` says it; the time until now is its `start`.
        """
        self._before = before or {}
        self._counted = dict.fromkeys(KINDS, 0.0)
        now = time.perf_counter()
        self._start = now if started is None else started
        self._counted["start"] = now - self._start

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

    def lose(self, since: Mapping[str, float]) -> None:
        """The steps since `seconds` said this were undone: their time is `lost`."""
        self._counted["lost"] += self.seconds["step"] - since["step"]

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
        """Seconds of training steps, waiting for their data and drawing answers included."""
        seconds = self.seconds
        return seconds["step"] + seconds["data"] + seconds["rollout"]
