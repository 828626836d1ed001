"""Which steps count, that a skipped one leaves no trace, and that a step comes out alike twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import OptimizerConfig
from gptjax.training.guard import WINDOW, forget, init_guard, judge
from gptjax.training.optimizer import make_optimizer
from gptjax.training.rerun import run_twice
from gptjax.training.state import TrainState
from gptjax.training.step import make_train_step

judge = jax.jit(judge, static_argnames="spike_sigmas")
DRAW = np.random.default_rng(0)


def after(losses, norms=None, spike_sigmas=6.0):
    """The guard after these steps, and which of them counted."""
    guard, verdicts = init_guard(), []
    for loss, norm in zip(losses, norms if norms is not None else np.ones_like(losses), strict=True):
        counts, guard = judge(guard, jnp.float32(loss), jnp.float32(norm), spike_sigmas=spike_sigmas)
        verdicts.append(bool(counts))
    return guard, verdicts


@pytest.fixture(scope="module")
def usual():
    """Losses around 3 with a deviation of 0.1, enough to know what is usual; and the guard that has seen them."""
    losses = 3 + 0.1 * DRAW.standard_normal(WINDOW)
    guard, verdicts = after(losses, 1 + 0.01 * DRAW.standard_normal(WINDOW))
    assert all(verdicts)
    return losses, guard


@settings(deadline=None, max_examples=50)
@given(offset=st.floats(-5, 5))
def test_the_limit_is_mean_plus_six_deviations(usual, offset):
    """A step is skipped exactly from six standard deviations of the last 128 on; however low it may be."""
    losses, guard = usual
    limit = losses.mean() + 6 * losses.std()
    value = limit + offset
    counts, _ = judge(guard, jnp.float32(value), jnp.float32(1.0), spike_sigmas=6.0)
    assert bool(counts) == (value <= limit) or abs(offset) < 1e-4


def test_what_is_not_learned_yet_is_learned_where_the_rest_is_known_by_heart():
    """Epochs of small data: of 32 rows one still has a loss of 2.5, the others have almost none."""
    losses = np.abs(0.02 + 0.01 * DRAW.standard_normal(WINDOW))
    guard, _ = after(losses)
    value = (31 * 0.02 + 2.5) / 32
    assert value > losses.mean() + 6 * losses.std(), "by deviations alone it would be skipped"
    counts, _ = judge(guard, jnp.float32(value), jnp.float32(1.0), spike_sigmas=6.0)
    assert counts
    counts, _ = judge(guard, jnp.float32(losses.mean() + 0.11), jnp.float32(1.0), spike_sigmas=6.0)
    assert not counts


@pytest.mark.parametrize("bad", [(np.nan, 1.0), (3.0, np.nan), (np.inf, 1.0), (3.0, np.inf), (-np.inf, 1.0)])
@pytest.mark.parametrize("spike_sigmas", [0.0, 6.0])
@pytest.mark.parametrize("seen", ["nothing", "much"])
def test_what_is_no_number_never_counts(usual, bad, spike_sigmas, seen):
    guard = init_guard() if seen == "nothing" else usual[1]
    counts, later = judge(guard, *map(jnp.float32, bad), spike_sigmas=spike_sigmas)
    assert not counts
    assert int(later.in_a_row) == 1
    np.testing.assert_array_equal(later.losses_W, guard.losses_W)
    np.testing.assert_array_equal(later.grad_norms_W, guard.grad_norms_W)


def test_a_leap_of_the_gradient_alone_is_skipped(usual):
    """At five times the mean and six deviations: here the first is further up; with wilder norms the second."""

    def counts(guard, norm, spike_sigmas=6.0):
        return bool(judge(guard, jnp.float32(3.0), jnp.float32(norm), spike_sigmas=spike_sigmas)[0])

    losses, calm = usual
    assert counts(calm, 4.9)
    assert not counts(calm, 5.1)
    assert counts(calm, 5.1, spike_sigmas=0.0)
    norms = np.where(np.arange(WINDOW) % 16, 0.1, 10.0)
    wild, verdicts = after(losses, norms)
    assert all(verdicts)
    limit = norms.mean() + 6 * norms.std()
    assert limit > 5 * norms.mean()
    assert counts(wild, limit - 0.01)
    assert not counts(wild, limit + 0.01)


def test_nothing_is_unusual_before_the_window_is_full():
    _, verdicts = after([*np.full(WINDOW - 1, 3.0), 1000.0])
    assert all(verdicts)


def test_leaps_never_become_usual(usual):
    """However many follow one another, all are skipped and counted, and one usual step ends their row."""
    guard = usual[1]
    for number in range(1, 2 * WINDOW):
        counts, guard = judge(guard, jnp.float32(9.0), jnp.float32(1.0), spike_sigmas=6.0)
        assert not counts
        assert int(guard.in_a_row) == number
    counts, guard = judge(guard, jnp.float32(3.0), jnp.float32(1.0), spike_sigmas=6.0)
    assert counts
    assert (int(guard.in_a_row), int(guard.seen), int(guard.skipped)) == (0, WINDOW + 1, 2 * WINDOW - 1)


def test_what_was_usual_can_be_forgotten(usual):
    counts, guard = judge(forget(usual[1]), jnp.float32(9.0), jnp.float32(1.0), spike_sigmas=6.0)
    assert counts
    assert int(guard.seen) == 1


def test_what_is_usual_moves_with_the_training():
    """A loss that falls, and one that rises slowly, are followed; only the last 128 steps matter."""
    noise = 0.05 * DRAW.standard_normal(1000)
    for trend in (10 - 6 * np.linspace(0, 1, 1000), 4 + 2 * np.linspace(0, 1, 1000)):
        _, verdicts = after(trend + noise)
        assert all(verdicts)


def test_false_alarms_are_rare():
    """Fewer than one in 1,000, of 3,000 steps of plain noise with the long tail that gradient norms have."""
    _, verdicts = after(3 + 0.1 * DRAW.standard_normal(3000), np.exp(0.2 * DRAW.standard_normal(3000)))
    assert sum(verdicts) >= 0.999 * 3000


OPTIMIZER = make_optimizer(OptimizerConfig())


def toy_state():
    params = {"w": jnp.arange(12, dtype=jnp.float32).reshape(3, 4)}
    return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params), init_guard())


def toy_step(spike_sigmas=6.0):
    """Draws `w` towards the batch; `factor` of the batch multiplies its gradient, `leap` its loss."""

    def loss(params, batch, key):
        nll = jnp.square(params["w"] - batch["x"]).sum()
        weight = jnp.ones(())
        return nll * batch["factor"].sum(), {"loss": nll * batch["leap"].sum(), "weight": weight}

    settings = {"dropout_seed": None, "accumulates": False, "steps_per_dispatch": 2}
    return make_train_step(loss, OPTIMIZER, spike_sigmas=spike_sigmas, **settings)


def two_steps(factor=(1.0, 1.0), leap=(1.0, 1.0)):
    """Batch, counts and rates of a dispatch of two steps."""
    x = DRAW.standard_normal((2, 1, 3, 4)).astype(np.float32)
    scales = {
        name: np.reshape(value, (2, 1, 1)).astype(np.float32) for name, value in (("factor", factor), ("leap", leap))
    }
    return {"x": x, **scales}, np.ones(2, np.int32), np.full(2, 1e-3, np.float32)


def trained(step):
    """The state after as many steps as it takes to know what is usual."""
    state = toy_state()
    for _ in range(WINDOW // 2):
        state, metrics = step(state, *two_steps(), 2)
    assert int(metrics["skipped"][-1]) == 0
    return state


@pytest.mark.parametrize(
    "bad", [{"factor": np.nan}, {"factor": np.inf}, {"leap": np.nan}, {"leap": 1e3}, {"factor": 1e3}], ids=str
)
def test_a_skipped_step_changes_nothing(bad):
    """In a dispatch of a bad step and a good one, parameters and moments are those of a dispatch with the good one
    alone; the skipped step is counted, so that its dropout and data are not used again."""
    step = toy_step()
    state = trained(step)
    batch, counts, rates = two_steps(**{name: (value, 1.0) for name, value in bad.items()})
    good = jax.tree.map(lambda x: x[::-1], batch)
    expected, _ = step(jax.tree.map(jnp.copy, state), good, counts, rates, 1)
    state, metrics = step(state, batch, counts, rates, 2)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.optimizer), (expected.params, expected.optimizer))
    assert int(state.step) == WINDOW + 2
    assert metrics["skipped"].tolist() == [1, 1]
    assert metrics["skipped_in_a_row"].tolist() == [1, 0]


def test_leaps_are_let_through_where_nobody_guards_against_them():
    step = toy_step(spike_sigmas=0.0)
    assert step(trained(step), *two_steps(factor=(1e3, 1e3)), 2)[1]["skipped"].tolist() == [0, 0]


@pytest.mark.parametrize("bit", [0, 12, 30])
def test_a_flipped_bit_shows_in_a_second_run(bit):
    """One bit of one parameter, flipped in the first of the two runs of a step; and an honest machine shows nothing."""
    step, arguments, calls = toy_step(), (*two_steps(), 2), []
    expected = step(toy_state(), *arguments)

    def faulty(state, *arguments):
        calls.append(state)
        state, metrics = step(state, *arguments)
        if len(calls) == 1:
            raw = np.array(state.params["w"]).view(np.uint32)
            raw[1, 2] ^= 1 << bit
            state = state._replace(params={"w": jnp.asarray(raw.view(np.float32))})
        return state, metrics

    *_, differing = run_twice(faulty, toy_state(), *arguments)
    assert differing == ["params.w"]
    *result, differing = run_twice(step, toy_state(), *arguments)
    assert differing == []
    jax.tree.map(np.testing.assert_array_equal, tuple(result), expected)
