"""Asking a run to stop: it saves, then ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """Called, it says whether a signal has come; `outcome` is what that makes of the run."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def outcome(self) -> str | None:
        """`preempted` after SIGTERM, `interrupted` after Ctrl-C, else None."""
        return {None: None, signal.SIGTERM: "preempted", signal.SIGINT: "interrupted"}[self.signal]


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or Ctrl-C into a request; a second Ctrl-C interrupts at once.

    Outside the main thread Python delivers no signals, and the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: object) -> None:
        if request() and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
