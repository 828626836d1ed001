"""Where a run's seconds go."""

from gptjax.training.ledger import Ledger


def test_seconds_go_on_from_earlier_processes(monkeypatch):
    """The kinds sum to the wall time of all processes; what no block counts is the steps'; and the time of steps that
    are undone is lost."""
    clock = [5.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    ledger = Ledger(before={"data": 10.0, "step": 100.0, "lost": 20.0}, started=-3.0)
    with ledger("data"):
        clock[0] += 2
    with ledger(lambda: None):
        clock[0] += 3
    with ledger("evaluation"):
        clock[0] += 4
    clock[0] += 1
    expected = {"start": 8, "compile": 0, "data": 12, "rollout": 0, "evaluation": 4, "sample": 0, "checkpoint": 0}
    assert ledger.seconds == expected | {"profile": 0, "lost": 20, "step": 104}
    assert ledger.wall_seconds == 148
    assert ledger.productive_seconds == 116
    at_the_checkpoint = ledger.seconds
    clock[0] += 7
    ledger.lose(since=at_the_checkpoint)
    assert ledger.seconds == expected | {"profile": 0, "lost": 27, "step": 104}
    assert ledger.wall_seconds == 155
