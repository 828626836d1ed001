"""Signals as requests; that several processes stop at the same step is tests/test_processes.py's."""

import os
import signal
import threading
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from jax.experimental import multihost_utils

from gptjax.config import CheckpointConfig
from gptjax.parallel import distributed
from gptjax.training.checkpoint import open_checkpoints, save
from gptjax.training.signals import stop_on_signals


class MadeService:
    """JAX's preemption service in one process: what is asked, and what it agreed on."""

    def __init__(self):
        self.asked: list[int] = []
        self.agreed: int | None = None

    def reached(self, number: int) -> bool:
        self.asked.append(number)
        return number == self.agreed

    def agree(self) -> None:
        """As the service does after a signal: on the number after the newest question's."""
        self.agreed = max(self.asked, default=0) + 1


@pytest.fixture
def service(monkeypatch) -> MadeService:
    """A preemption service between two processes."""
    made = MadeService()
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", made.reached)
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    return made


@pytest.mark.parametrize(
    ("number", "outcome"), [(signal.SIGTERM, "preempted"), (signal.SIGINT, "interrupted")], ids=["SIGTERM", "SIGINT"]
)
def test_a_process_alone_stops_when_it_is_told(number, outcome):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert (stop(), stop.outcome) == (False, None)
        os.kill(os.getpid(), number)
        assert (stop(), stop.outcome) == (True, outcome)
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), stop_on_signals():  # noqa: PT012 -- the second of the two lines raises
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_no_signal_is_taken():
    found = []

    def work() -> None:
        with stop_on_signals() as stop:
            found.extend([stop(), stop.outcome])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, None]
    assert signal.getsignal(signal.SIGTERM) is before


def test_several_processes_stop_at_the_dispatch_that_they_agree_on(service):
    """Each dispatch asks with the next number, so that the one after the furthest is one that all come to."""
    with stop_on_signals() as stop:
        assert [stop() for _ in range(3)] == [False] * 3
        service.agree()
        assert (stop(), stop.outcome) == (True, "preempted")
        assert stop(), "from then on"
    assert service.asked == [1, 2, 3, 4]


def test_of_several_processes_an_interrupted_one_passes_it_on_as_sigterm(service, monkeypatch):
    """SIGTERM is what the preemption service listens to; our own handler would take it away from it."""
    sent = []
    monkeypatch.setattr("gptjax.training.signals.os", SimpleNamespace(kill=lambda *to: sent.append(to), getpid=int))
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        signal.raise_signal(signal.SIGINT)
        assert stop.outcome == "interrupted"
    assert sent == [(0, signal.SIGTERM)]


def test_a_save_leaves_the_preemption_service_alone(service, tmp_path):
    """A run continued at step 1000 stops at its next dispatch, also when the signal came during a save.

    Orbax would ask with the step: the processes would agree on 1001, which the loop's count does not reach.
    """
    with open_checkpoints(tmp_path, CheckpointConfig()) as manager, stop_on_signals() as stop:
        stop()
        save(manager, 1000, {"x": jnp.zeros(3)}, {})
        service.agree()
        assert stop()
