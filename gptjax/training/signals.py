"""Asking a run to stop: it saves, then ends."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from jax.experimental import multihost_utils

from gptjax.parallel import distributed


class StopRequest:
    """Called after each dispatch, it says whether to stop; `outcome` is what that makes of the run.

    Several processes stop at the same dispatch, whichever of them was told to: JAX's preemption service agrees on the
    next one that none has passed, without a word between devices.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._calls = 0
        self._agreed = False

    def __call__(self) -> bool:
        if distributed.num_processes() == 1:
            return self.signal is not None
        self._calls += 1
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(self._calls)
        return self._agreed

    @property
    def outcome(self) -> str | None:
        """`preempted` after SIGTERM, `interrupted` after Ctrl-C, else None."""
        if self.signal is None:
            return "preempted" if self._agreed else None
        return {signal.SIGTERM: "preempted", signal.SIGINT: "interrupted"}[self.signal]


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or Ctrl-C into a request; a second Ctrl-C interrupts at once.

    Outside the main thread Python delivers no signals, and the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    several = distributed.num_processes() > 1

    def ask(number: int, frame: object) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)
        if several:  # the preemption service listens to SIGTERM alone
            os.kill(os.getpid(), signal.SIGTERM)

    # With several processes SIGTERM is the preemption service's, which has been listening since they connected.
    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
