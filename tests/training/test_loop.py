"""The loop, fed with a step and a stream that write down what happens to them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import CheckpointConfig, Config, GuardConfig, ModelConfig, OptimizerConfig, TrainingConfig
from gptjax.training.ledger import Ledger
from gptjax.training.loop import Callbacks, Corrupted, Diverged, fit
from gptjax.training.schedule import Progress, batch_size, learning_rate

T, MICRO = 4, 2
CLOCK = [0.0]
"""Seconds that the toy's steps have taken."""


def make_config(steps=20, log=5, evaluate=0, sample=0, save=0, per_dispatch=1, ramp_tokens=0):
    return Config(
        model=ModelConfig(context_length=T),
        optimizer=OptimizerConfig(warmup_steps=3, decay_steps=steps),
        training=TrainingConfig(
            steps=steps,
            batch_size=8,
            micro_batch_size=MICRO,
            batch_ramp_start=2 if ramp_tokens else 8,
            batch_ramp_tokens=ramp_tokens,
            log_every_steps=log,
            eval_every_steps=evaluate,
            sample_every_steps=sample,
            steps_per_dispatch=per_dispatch,
        ),
        checkpoint=CheckpointConfig(every_steps=save),
    )


class CountingStream:
    """Rows whose tokens are their number in the training order."""

    def __init__(self, position):
        self.position, self.metrics, self.on_policy = position, {}, False

    def take(self, n, state):
        first, self.position = self.position, self.position + n
        return np.repeat(np.arange(first, first + n, dtype=np.int32)[:, None], T + 1, axis=1)


def run(config, start=Progress(), stop_after=None):  # noqa: B008
    """Train with a step that only counts; a step's loss is its number, and its validation loss one half more.

    Returns:
        The events in order, as (kind, step); the lines of training metrics; for each step (its rows, its learning
        rate); and the final progress.
    """
    events, lines, steps = [], [], {}

    def train_step(state, batch, num_micro_K, learning_rate_K, num_steps):
        assert batch["tokens"].shape == (config.training.steps_per_dispatch, 8 // MICRO, MICRO, T + 1)
        tokens = np.asarray(batch["tokens"])
        for k in range(num_steps):
            state += 1
            steps[state] = tokens[k, : num_micro_K[k], :, 0].ravel().tolist(), float(learning_rate_K[k])
        events.append(("dispatch", state))
        CLOCK[0] += num_steps
        numbers = np.arange(state - num_steps + 1, state - num_steps + 1 + len(learning_rate_K), dtype=np.float32)
        metrics = dict.fromkeys(("loss", "grad_norm", "weight"), jnp.asarray(numbers))
        return state, metrics | dict.fromkeys(("skipped", "skipped_in_a_row"), jnp.zeros(len(numbers), jnp.int32))

    def evaluate(state):
        events.append(("evaluate", state))
        return {"val_loss": state + 0.5}

    def sample(state, progress):
        assert state == progress.step
        events.append(("sample", state))

    def save(state, progress, evaluation):
        assert state == progress.step
        assert evaluation == ({"val_loss": state + 0.5} if ("evaluate", state) in events else None)
        events.append(("save", state))

    def report(line):
        if "val_loss" in line:
            assert (line["val_loss"], events[-1]) == (line["step"] + 0.5, ("evaluate", line["step"]))
            return
        lines.append(line)
        events.append(("report", line["step"]))

    def should_stop():
        return stop_after is not None and events[-1][1] >= stop_after

    callbacks = Callbacks(report=report, evaluate=evaluate, save=save, sample=sample, should_stop=should_stop)
    stream = CountingStream(start.sequences)
    state, progress = fit(config, start.step, start, train_step, stream, callbacks, Ledger(), mfu_per_token_rate=1e-9)
    assert state == progress.step
    assert stream.position == progress.sequences
    return events, lines, steps, progress


def steps_of(events, kind):
    return [step for name, step in events if name == kind]


intervals = st.integers(1, 9)
configs = st.builds(
    make_config,
    steps=st.integers(1, 30),
    log=intervals,
    evaluate=st.just(0) | intervals,
    sample=st.just(0) | intervals,
    save=st.just(0) | intervals,
    per_dispatch=st.integers(1, 8),
    ramp_tokens=st.sampled_from([0, 100, 1000]),
)


def due(config, kind):
    """Steps at which an interval ends, and the last."""
    training = config.training
    every = {
        "report": training.log_every_steps,
        "evaluate": training.eval_every_steps,
        "sample": training.sample_every_steps,
        "save": config.checkpoint.every_steps,
    }[kind]
    return [s for s in range(1, training.steps + 1) if s == training.steps or (every and s % every == 0)]


@settings(max_examples=60, deadline=None)
@given(configs)
def test_intervals_cut_dispatches(config):
    """Whatever the intervals and the steps of a dispatch, everything happens at the multiples of its interval and at
    the end, once, with the state of just that step; no dispatch is longer than allowed, nor shorter than need be."""
    events, lines, _, _ = run(config)
    for kind in ("report", "evaluate", "sample", "save"):
        assert steps_of(events, kind) == due(config, kind)
    assert [line["loss"] for line in lines] == due(config, "report")
    ends = steps_of(events, "dispatch")
    boundaries = {step for kind in ("report", "evaluate", "sample", "save") for step in due(config, kind)}
    for before, after in itertools.pairwise([0, *ends]):
        assert after - before == config.training.steps_per_dispatch or after in boundaries
        assert after - before <= config.training.steps_per_dispatch


@settings(max_examples=40, deadline=None)
@given(configs)
def test_metrics_are_late_but_never_behind_a_checkpoint(config):
    """Metrics are fetched when the next interval's steps are on their way, so that the device never waits; but an
    evaluation, a sample or a checkpoint finds all lines of the steps before it written."""
    events, _, _, _ = run(config)
    at_rest = set(steps_of(events, "evaluate") + steps_of(events, "sample") + steps_of(events, "save"))
    for index, (kind, step) in enumerate(events):
        if kind == "report" and step not in at_rest:
            assert any(s > step for s in steps_of(events[:index], "dispatch"))
        if kind in ("evaluate", "sample", "save"):
            assert steps_of(events[:index], "report") == [s for s in due(config, "report") if s <= step]


@settings(max_examples=40, deadline=None)
@given(configs, st.data())
def test_resumed_runs_continue(config, data):
    """From the progress at any step, the same rows, rates and calls follow as in the run that was never stopped,
    also while the batch ramps up; and rows are consumed in order without a gap."""
    events, lines, steps, end = run(config)
    rows = [row for number in sorted(steps) for row in steps[number][0]]
    assert rows == list(range(end.sequences))
    progress = Progress()
    for _ in range(data.draw(st.integers(0, config.training.steps - 1), "resumed at")):
        progress = progress.advance(batch_size(config.training, progress), T)
    later_events, later_lines, later_steps, later_end = run(config, start=progress)
    assert later_end == end
    assert later_steps == {step: value for step, value in steps.items() if step > progress.step}
    for kind in ("report", "evaluate", "sample", "save"):
        assert steps_of(later_events, kind) == [s for s in steps_of(events, kind) if s > progress.step]
    same = ("step", "tokens", "loss", "learning_rate", "grad_norm")
    expected = [{name: line[name] for name in same} for line in lines if line["step"] > progress.step]
    assert [{name: line[name] for name in same} for line in later_lines] == expected


def test_rates_and_tokens_are_those_of_the_step():
    """Each step uses the learning rate and batch of the progress before it; its line names the tokens after it."""
    config = make_config(steps=12, log=1, ramp_tokens=100, per_dispatch=3)
    _, lines, steps, _ = run(config)
    progress = Progress()
    for number, line in zip(range(1, 13), lines, strict=True):
        size, rate = batch_size(config.training, progress), learning_rate(config.optimizer, progress)
        assert len(steps[number][0]) == size
        assert steps[number][1] == pytest.approx(rate) == line["learning_rate"]
        progress = progress.advance(size, T)
        assert line["tokens"] == progress.tokens
    assert len(steps[1][0]) == 2
    assert len(steps[12][0]) == 8


@pytest.mark.parametrize("per_dispatch", [1, 3])
@pytest.mark.parametrize("save", [0, 7])
def test_stop_saves_once_and_ends(save, per_dispatch):
    """A request to stop is heard after the running dispatch: its last step is reported, saved once, and the last."""
    events, lines, _, progress = run(make_config(save=save, per_dispatch=per_dispatch), stop_after=7)
    assert progress.step == max(steps_of(events, "dispatch"))
    assert 7 <= progress.step < 7 + per_dispatch
    assert steps_of(events, "save") == [progress.step]
    assert steps_of(events, "evaluate") == []
    assert lines[-1]["step"] == progress.step
    assert events.index(("report", progress.step)) < events.index(("save", progress.step))


def test_a_finished_run_does_nothing():
    config = make_config(steps=3)
    *_, end = run(config)
    assert run(config, start=end) == ([], [], {}, end)


def test_lines_have_the_names_of_the_documentation():
    """Scripts read these names; unknown speed, before a step beyond the compiling one, is None and no number."""
    _, lines, _, _ = run(make_config(steps=1, log=1))
    names = ("step", "tokens", "loss", "learning_rate", "grad_norm", "skipped_steps", "tokens_per_second", "mfu")
    assert list(lines[0]) == [*names, "data_wait_fraction", "seconds"]
    assert lines[0]["tokens_per_second"] is lines[0]["mfu"] is lines[0]["data_wait_fraction"] is None


@pytest.mark.parametrize("evaluate", [0, 1, 3])
@pytest.mark.parametrize("log", [1, 2])
def test_speed_counts_each_token_and_second_once(log, evaluate, monkeypatch):
    """Where each step takes a second of the clock and nothing else does, every line says one batch a second, also
    around evaluations, where two lines are fetched at one moment."""
    monkeypatch.setattr("time.perf_counter", lambda: CLOCK[0])
    _, lines, _, _ = run(make_config(steps=8, log=log, evaluate=evaluate))
    assert {line["tokens_per_second"] for line in lines[1:]} == {8 * T}


@pytest.mark.parametrize("evaluate", [0, 1, 3])
@pytest.mark.parametrize("log", [1, 2])
def test_speed_where_the_model_draws_its_rows(log, evaluate, monkeypatch):
    """The time of drawing rows counts to the step that they are for, also around evaluations, however long the device
    takes: it is never done with a step when the next line is due."""
    monkeypatch.setattr("time.perf_counter", lambda: CLOCK[0])
    monkeypatch.setattr("gptjax.training.loop._is_done", lambda metrics: False)
    take = CountingStream.take

    def draw(self, n, state):
        self.on_policy = True
        CLOCK[0] += 2
        return take(self, n, state)

    monkeypatch.setattr(CountingStream, "take", draw)
    _, lines, _, _ = run(make_config(steps=8, log=log, evaluate=evaluate))
    assert [line["tokens_per_second"] for line in lines[1:]] == [pytest.approx(8 * T / 3)] * (8 // log - 1)


def test_waiting_for_data_shows(monkeypatch):
    """Where reading a batch takes as long as a step, and the device has nothing to do meanwhile, half is waiting."""
    monkeypatch.setattr("time.perf_counter", lambda: CLOCK[0])
    take = CountingStream.take

    def slow_take(self, n, state):
        CLOCK[0] += 1
        return take(self, n, state)

    monkeypatch.setattr(CountingStream, "take", slow_take)
    _, lines, _, _ = run(make_config(steps=8, log=2))
    assert {line["data_wait_fraction"] for line in lines[1:]} == {0.5}


def fit_skipping(config, skipped, evaluate=lambda state: {}):
    """Train with a step that skips the steps for which `skipped` is true; the steps that are saved, and the lines."""
    saved, lines = [], []
    row = [0]

    def train_step(state, batch, num_micro_K, learning_rate_K, num_steps):
        in_a_row = np.zeros(len(learning_rate_K), np.int32)
        for k in range(num_steps):
            row[0] = row[0] + 1 if skipped(state + k + 1) else 0
            in_a_row[k] = row[0]
        values = {"skipped_in_a_row": in_a_row, "skipped": in_a_row, "loss": np.where(in_a_row, np.nan, 1.0)}
        values["grad_norm"] = np.ones_like(values["loss"])
        return state + num_steps, jax.tree.map(jnp.asarray, values)

    callbacks = Callbacks(
        report=lines.append,
        evaluate=evaluate,
        save=lambda state, progress, evaluation: saved.append(state),
        sample=lambda state, progress: None,
        should_stop=lambda: False,
    )
    try:
        fit(config, 0, Progress(), train_step, CountingStream(0), callbacks, Ledger(), mfu_per_token_rate=None)
    except Diverged as error:
        return saved, lines, error
    return saved, lines, None


@pytest.mark.parametrize("log", [1, 2, 7])
@pytest.mark.parametrize("per_dispatch", [1, 3])
def test_a_run_that_skips_step_after_step_has_diverged(log, per_dispatch):
    """With ten in a row, noticed at the next line or two; in the meantime nothing is saved, for it may be ruined."""
    config = make_config(steps=60, log=log, save=4, per_dispatch=per_dispatch)
    saved, _, error = fit_skipping(config, lambda step: step >= 6)
    assert saved == [4]
    assert 15 <= error.progress.step <= 15 + 2 * log + per_dispatch
    assert "steps in a row were skipped; the loss is nan" in str(error)


def test_a_save_waits_for_a_step_that_counts():
    """A checkpoint that falls on skipped steps is made after them, and the others where they belong."""
    saved, lines, error = fit_skipping(make_config(steps=20, log=1, save=4), lambda step: 7 <= step <= 9)
    assert error is None
    assert saved == [4, 10, 12, 16, 20]
    assert [line["skipped_steps"] for line in lines if "loss" in line][5:11] == [0, 1, 2, 3, 0, 0]


def test_what_was_skipped_last_is_saved_at_the_end():
    assert fit_skipping(make_config(steps=6, save=4), lambda step: step >= 5)[0] == [4, 6]


def test_an_evaluation_that_is_no_number_is_a_divergence():
    config = make_config(steps=9, evaluate=3, save=3)
    saved, _, error = fit_skipping(config, lambda step: False, lambda state: {"val_loss": [1.0, np.nan][state > 3]})
    assert saved == [3]
    assert error.progress.step == 6


@pytest.mark.parametrize("per_dispatch", [1, 4])
def test_steps_are_computed_twice_at_their_interval(per_dispatch, monkeypatch):
    """Whatever else cuts dispatches; and a difference ends the run at once."""
    twice = []

    def run_twice(train_step, state, *arguments):
        state, metrics = train_step(state, *arguments)
        twice.append(state)
        return state, metrics, ["params.w", "params.b"] if state == 15 else []

    monkeypatch.setattr("gptjax.training.loop.run_twice", run_twice)
    config = make_config(steps=20, log=7, save=3, per_dispatch=per_dispatch)
    config = dataclasses.replace(config, guard=GuardConfig(rerun_every_steps=5))
    with pytest.raises(Corrupted, match=r"step 15, .* two params.w and 1 more") as error:
        run(config)
    assert error.value.progress.step == 15
    assert twice == [5, 10, 15]
