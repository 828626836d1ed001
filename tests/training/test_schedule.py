"""Schedules are pure functions of exact progress: their ends, their continuity, and the ramp of the batch."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import OptimizerConfig, TrainingConfig
from gptjax.training.schedule import Progress, batch_size, final_progress, learning_rate, steps_for

SCHEDULES = ("cosine", "linear", "constant", "wsd")
CONFIG = OptimizerConfig(peak_learning_rate=2.0, warmup_steps=10, decay_steps=110, final_learning_rate_fraction=0.25)


def at_step(config, step):
    return learning_rate(config, Progress(step=step, sequences=step, tokens=100 * step))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends(schedule):
    """Step n of a warm-up of 10 uses (n+1)/10 of the peak; at decay_steps, and after, it is the final fraction."""
    config = dataclasses.replace(CONFIG, schedule=schedule)
    assert [at_step(config, step) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    final = 2.0 if schedule == "constant" else 0.5
    assert [at_step(config, step) for step in (110, 111, 10**9)] == pytest.approx([final] * 3)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("linear", 60, 0.5 * (2 + 0.5)),
        ("cosine", 35, 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4))),
        ("wsd", 90, 2.0),
        ("wsd", 100, 0.5 * (2 + 0.5)),
    ],
)
def test_formulas(schedule, step, expected):
    assert at_step(dataclasses.replace(CONFIG, schedule=schedule), step) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "units",
    [
        {"warmup_steps": 100, "decay_steps": 1000},
        {"warmup_steps": 0, "warmup_tokens": 10_000, "decay_tokens": 100_000},
        {"warmup_steps": 0, "warmup_tokens": 10_000, "decay_steps": 1000},
        {"warmup_steps": 100, "decay_tokens": 100_000},
    ],
    ids=str,
)
def test_continuous_and_falling(schedule, units):
    """No step jumps by more than the steepest slope, also where warm-up and decay are counted in different units,
    and after the warm-up the rate never rises."""
    config = dataclasses.replace(CONFIG, schedule=schedule, **units)
    rates = [at_step(config, step) for step in range(1101)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 1.01 * 2.0 / 100
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert max(rates) <= 2.0


def test_units_agree():
    """Counting in tokens is counting in steps where steps are of one size."""
    tokens = dataclasses.replace(CONFIG, warmup_steps=0, warmup_tokens=1000, decay_tokens=11_000)
    for step in (10, 50, 110, 200):
        assert at_step(tokens, step) == pytest.approx(at_step(CONFIG, step))


def test_exact_beyond_32_bits():
    """300 billion tokens are counted exactly: the last token of a warm-up is told from the one before."""
    config = dataclasses.replace(CONFIG, warmup_steps=0, warmup_tokens=3 * 10**11, schedule="constant")
    assert learning_rate(config, Progress(tokens=3 * 10**11 - 1)) == 2.0
    assert learning_rate(config, Progress(tokens=3 * 10**11 - 2)) < 2.0


@given(
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 8),
    st.integers(1, 10**12),
    st.lists(st.integers(0, 2 * 10**12)),
)
def test_batch_ramp(micro, start, growth, ramp_tokens, tokens):
    """The batch is a multiple of the micro-batch, starts and ends where it says, and never shrinks."""
    full = micro * (start + growth)
    config = TrainingConfig(
        batch_size=full, micro_batch_size=micro, batch_ramp_start=micro * start, batch_ramp_tokens=ramp_tokens
    )
    sizes = [batch_size(config, Progress(tokens=n)) for n in sorted([0, *tokens, ramp_tokens])]
    assert sizes == sorted(sizes)
    assert all(size % micro == 0 for size in sizes)
    assert sizes[0] == micro * start
    assert batch_size(config, Progress(tokens=ramp_tokens)) == full == max(sizes)


def test_batch_ramp_is_linear_in_tokens():
    config = TrainingConfig(batch_size=32, micro_batch_size=4, batch_ramp_start=8, batch_ramp_tokens=1200)
    assert [batch_size(config, Progress(tokens=n)) for n in (0, 199, 200, 600, 1199, 1200)] == [8, 8, 12, 20, 28, 32]
    assert batch_size(TrainingConfig(batch_size=6), Progress()) == 6


def test_progress_counts_exactly():
    progress = Progress().advance(3, 1024).advance(5, 1024)
    assert progress == Progress(step=2, sequences=8, tokens=8 * 1024)


@given(
    micro=st.integers(1, 8),
    growth=st.integers(0, 30),
    ramp_tokens=st.integers(1, 10**5),
    steps=st.integers(1, 200),
    sequence_tokens=st.integers(1, 512),
)
def test_steps_and_sequences_are_two_names_of_one_length(micro, growth, ramp_tokens, steps, sequence_tokens):
    """What a run's steps see takes just these steps, one sequence less takes a part of the last one, and the loop
    that advances step by step ends where the formula says."""
    config = TrainingConfig(
        steps=steps,
        batch_size=micro * (1 + growth),
        micro_batch_size=micro,
        batch_ramp_start=micro,
        batch_ramp_tokens=ramp_tokens,
    )
    progress = Progress()
    for _ in range(steps):
        progress = progress.advance(batch_size(config, progress), sequence_tokens)
    assert final_progress(config, sequence_tokens) == progress
    assert steps_for(config, sequence_tokens, progress.sequences) == steps
    assert steps - 1 <= steps_for(config, sequence_tokens, progress.sequences - 1) < steps
