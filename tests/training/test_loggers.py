"""Where metrics go beside metrics.jsonl: what TensorBoard's files hold, and what W&B and trackio are told."""

import dataclasses
import math
import struct
import sys
from types import ModuleType

import pytest
from tensorboardX.proto.event_pb2 import Event

from gptjax.config import Config, TrainingConfig
from gptjax.errors import UserError
from gptjax.training.loggers import open_loggers

RECORDS = [
    {"step": 10, "loss": 3.5, "mfu": None, "grad_norm": math.inf},
    {"step": 20, "loss": 3.25, "mfu": 0.5, "grad_norm": 1.0},
]


def config(*kinds: str) -> Config:
    return Config(training=TrainingConfig(log_to=kinds))


def tensorboard_events(folder) -> list[Event]:
    """The records of TFRecord files: length, checksum, event, checksum."""
    events = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack("<Q", raw[at : at + 8])
            events.append(Event.FromString(raw[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def log(directory, kinds, records, step=0):
    warnings = []
    with open_loggers(directory, config(*kinds), step, warnings.append) as loggers:
        for record in records:
            for logger in loggers:
                logger.log(record)
    return warnings


def test_tensorboard_holds_every_finite_number(tmp_path):
    assert log(tmp_path, ["tensorboard"], RECORDS) == []
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in tensorboard_events(tmp_path / "tensorboard")
        for value in event.summary.value
    ]
    assert scalars == [(10, "loss", 3.5), (20, "loss", 3.25), (20, "mfu", 0.5), (20, "grad_norm", 1.0)]


def test_tensorboard_forgets_what_a_continued_run_does_again(tmp_path):
    """A run that goes on from step 10 tells TensorBoard to drop what is logged of step 11 and later."""
    log(tmp_path, ["tensorboard"], RECORDS)
    log(tmp_path, ["tensorboard"], RECORDS[1:], step=10)
    starts = [e.step for e in tensorboard_events(tmp_path / "tensorboard") if e.session_log.status == 1]
    assert starts[-1] == 11


def test_tensorboard_forgets_what_a_rollback_undid(tmp_path):
    """The same while it is open: steps up to 10 stay, 20 is told to be dropped and comes again."""
    with open_loggers(tmp_path, config("tensorboard"), 0, pytest.fail) as loggers:
        for action in (lambda log: log.log(RECORDS[0]), lambda log: log.log(RECORDS[1]), lambda log: log.go_back(10)):
            action(loggers[0])
        loggers[0].log(RECORDS[1] | {"loss": 3.0})
    events = tensorboard_events(tmp_path / "tensorboard")
    assert [e.step for e in events if e.session_log.status == 1] == [1, 11]
    losses = [(e.step, value.simple_value) for e in events for value in e.summary.value if value.tag == "loss"]
    assert losses == [(10, 3.5), (20, 3.25), (20, 3.0)]


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    """A stand-in for the package, which notes its calls."""
    module = ModuleType(request.param)
    module.calls = []

    def noting(what):
        return lambda *arguments, **options: module.calls.append((what, arguments, options))

    module.init, module.log, module.finish = noting("init"), noting("log"), noting("finish")
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_trackers_go_on_under_the_same_name(tracker, tmp_path):
    """Every number under its step; a continued run resumes the run that the first one opened, another does not."""
    kind = tracker.__name__
    assert log(tmp_path, [kind], RECORDS) == []
    (init, _, first), *logs, (finish, _, _) = tracker.calls
    assert (init, finish) == ("init", "finish")
    assert [(a[0], k["step"]) for _, a, k in logs] == [
        ({"loss": 3.5}, 10),
        ({"loss": 3.25, "mfu": 0.5, "grad_norm": 1.0}, 20),
    ]
    assert first["resume"] == "allow"
    assert first["config"]["training"]["log_to"] == [kind]
    assert first["name"].startswith(tmp_path.name)
    tracker.calls.clear()
    log(tmp_path, [kind], [], step=10)
    assert tracker.calls[0][2] == first
    (tmp_path / "other").mkdir()
    log(tmp_path / "other", [kind], [])
    assert tracker.calls[-2][2]["name"] != first["name"]


def test_a_logger_that_fails_is_left_out_with_one_line(tracker, tmp_path):
    attempts = []

    def fail(*arguments, **options):
        attempts.append(1)
        raise ConnectionError("network\nis down")

    tracker.log = fail
    assert log(tmp_path, [tracker.__name__], RECORDS) == [
        f"{tracker.__name__} is left out from here on: network is down"
    ]
    assert len(attempts) == 1


def test_a_logger_that_cannot_start_is_an_error_before_training(tracker, tmp_path):
    def refuse(**options):
        raise RuntimeError("no api key")

    tracker.init = refuse
    with pytest.raises(UserError, match=f"training.log_to {tracker.__name__} cannot be opened: no api key"):
        log(tmp_path, [tracker.__name__], [])


@pytest.mark.parametrize(("kind", "extra"), [("tensorboard", "log"), ("wandb", "wandb"), ("trackio", "trackio")])
def test_a_missing_package_names_its_extra(kind, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX"}.get(kind, kind), None)
    with pytest.raises(UserError, match=rf'pip install "gptjax\[{extra}\]"'):
        log(tmp_path, [kind], [])


def test_unknown_loggers_are_refused():
    with pytest.raises(UserError, match="log_to"):
        dataclasses.replace(config(), training=TrainingConfig(log_to=("tensorbord",)))
