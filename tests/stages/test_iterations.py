"""Iterations of reinforcement: whole dispatches, whatever else happens at intervals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.stages.iterations import configure
from gptjax.stages.rl import AnswerStream, Prompts
from gptjax.stages.stage import Data
from gptjax.training.ledger import Ledger
from gptjax.training.loop import Callbacks, fit
from gptjax.training.profile import Profiler
from gptjax.training.schedule import Progress

INTERVALS = [
    (section.name, field.name)
    for section in dataclasses.fields(Config)
    if dataclasses.is_dataclass(getattr(Config(), section.name))
    for field in dataclasses.fields(getattr(Config(), section.name))
    if "every" in field.name or field.name == "profile_steps"
]
"""All fields that say at which steps something happens."""


def test_the_intervals_are_those_that_the_loop_knows():
    assert len(INTERVALS) == 6


class Rows:
    """As many rows as are asked for, which are written down."""

    on_policy = True

    def __init__(self):
        self.asked, self.metrics = [], {}

    def take(self, num_rows, state):
        self.asked.append(num_rows)
        return np.zeros((num_rows, 5), np.int32)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(1, 11), min_size=len(INTERVALS), max_size=len(INTERVALS)),
    steps=st.integers(8, 30),
    inner_epochs=st.integers(1, 3),
)
def test_nothing_cuts_an_iteration_in_two(values, steps, inner_epochs):
    """Whatever the intervals, each dispatch learns from all answers of one iteration."""
    config = Config(stage="grpo")
    sections = {
        "training": {"steps": 4 * steps, "batch_size": 4},
        "grpo": {"group_size": 4},
        "optimizer": {"decay_steps": 9},
    }
    sections["rl"] = {"answers": 16, "inner_epochs": inner_epochs}
    for (section, name), value in zip(INTERVALS, values, strict=True):
        value = f"{value}:{value + 2}" if name == "profile_steps" else value
        sections[section] = sections.get(section, {}) | {name: value}
    for section, fields in sections.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    config = configure(config)
    assert configure(config) == config
    training, rows, traced = config.training, Rows(), []

    def train_step(state, *arguments):
        metrics = dict.fromkeys(("loss", "grad_norm", "skipped", "skipped_in_a_row"), jnp.zeros(len(arguments[1])))
        return state + arguments[-1], metrics

    class Traced(Profiler):
        def begin(self, step):
            traced.append(step)
            super().begin(step)

        def end(self, step, program):
            traced.append(step)
            super().end(step, program)

    profiler = Traced(training.profile_window, None, lambda line: None)
    nothing = dict.fromkeys(("report", "save", "sample"), lambda *_: None)
    callbacks = Callbacks(evaluate=lambda state: {}, should_stop=lambda: False, **nothing)
    state, progress = fit(
        config, jnp.zeros((), jnp.int32), Progress(), train_step, rows, callbacks, Ledger(), None, profiler
    )
    assert set(rows.asked) == {16 * inner_epochs}
    assert progress.step == training.steps == state
    assert tuple(traced) == training.profile_window, "what is asked for is traced, in whole iterations"


def test_an_iteration_is_a_dispatch(stage_config):
    made = configure(
        stage_config(
            "grpo",
            "x",
            rl={"answers": 64, "inner_epochs": 2},
            training={"steps": 20, "eval_every_steps": 3, "log_every_steps": 9},
            checkpoint={"every_steps": 0},
        )
    )
    training = made.training
    assert (training.steps_per_dispatch, training.steps, training.log_every_steps) == (8, 24, 16)
    assert (training.eval_every_steps, made.checkpoint.every_steps) == (8, 0)
    assert configure(made) == made
    for field, value, expected in (
        ("answers", 40, "rl.answers 40 is not a multiple of training.batch_size 16; the nearest is 32"),
        ("answers", 16 * 3, None),
    ):
        changed = stage_config("grpo", "x", rl={field: value})
        if expected:
            with pytest.raises(UserError, match=expected):
                configure(changed)
        else:
            configure(changed)
    ramp = {"batch_ramp_start": 8, "batch_ramp_tokens": 1, "micro_batch_size": 8}
    for training, expected in (
        (ramp, "training.batch_ramp_start 8 is less than training.batch_size 16, but an iteration"),
        ({"profile_steps": "1:2"}, "an iteration has 4 steps, and the first one compiles; with training.steps 8 it"),
    ):
        with pytest.raises(UserError, match=expected):
            configure(stage_config("grpo", "x", training=training))
    with pytest.raises(UserError, match="the size of a group 5; the nearest is 30"):
        configure(stage_config("grpo", "x", rl={"answers": 32}, grpo={"group_size": 5}))


@pytest.mark.parametrize(("position", "rows"), [(0, 16), (32, 48), (16, 32)])
def test_half_an_iteration_is_refused(stage_config, position, rows):
    """Its answers would be drawn anew with the same keys, and its first rows learned from twice."""
    config = stage_config("grpo", "x", rl={"answers": 32})
    data = Data(None, "", "", 1, None, Prompts(None, ["only"], [], 1))
    stream = AnswerStream(config, data, None, None, None, position)
    with pytest.raises(UserError, match=f"{rows} rows after the first {position} are no iteration of 32; give the run"):
        stream.take(rows, None)
