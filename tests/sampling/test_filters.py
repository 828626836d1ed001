"""Filters against plain NumPy references that loop over rows as the definitions read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gptjax.config import MeshConfig
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.sampling import filters
from gptjax.sampling.config import SamplingConfig

B, V = 3, 13
# Multiples of 1/4: ties are common, and what is no tie is far from one.
LOGITS = hnp.arrays(np.float32, (B, V), elements=st.integers(-20, 20).map(lambda n: n / 4))


def row_values(low: float, high: float):
    return hnp.arrays(np.float32, B, elements=st.floats(low, high, width=32))


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()


def survivors(logits_BV: jax.Array) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(logits_BV)]


@settings(max_examples=40, deadline=None)
@given(LOGITS, hnp.arrays(np.int32, B, elements=st.integers(1, 16)))
def test_top_k(logits, k):
    """The k largest, largest first, and of equals the first; the other places of a row are not to be drawn."""
    kept = np.stack([filters.ranks(16)[:16] & (np.arange(16) < n) for n in k])
    got = filters.top_k(jnp.asarray(logits), kept)
    for b, n in enumerate(k):
        order = np.argsort(-logits[b], kind="stable")
        left = np.flatnonzero(np.isfinite(got.logits_BC[b]))
        assert np.asarray(got.ids_BC[b])[left].tolist() == order[:n].tolist()
        np.testing.assert_array_equal(np.asarray(got.logits_BC[b])[left], logits[b][order[:n]])


def test_ranks():
    assert [int(filters.ranks(k).sum()) for k in (1, 16, 17, 200)] == [1, 16, 17, 200]
    assert [len(filters.ranks(k)) for k in (1, 16, 17, 200)] == [16, 16, 32, 256]


@pytest.mark.parametrize("find", [filters.threshold_by_halving, filters.threshold_by_sorting])
@settings(max_examples=30, deadline=None)
@given(logits=LOGITS, p=row_values(0, 1))
def test_top_p(find, logits, p):
    """The set reaches p, is made of the likeliest, and without the last of them (and its equals) would not reach it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "cpu" if find is filters.threshold_by_halving else "gpu")
        rows = survivors(filters.top_p(jnp.asarray(logits), jnp.asarray(p)))
    for row, kept, wanted in zip(logits, rows, p, strict=True):
        probabilities = softmax(row)
        inside = np.array([probabilities[i] for i in kept])
        outside = [probabilities[i] for i in range(V) if i not in kept]
        assert kept
        assert inside.sum() >= wanted - 1e-5
        assert all(x < inside.min() for x in outside)
        assert wanted == 1 or inside[inside > inside.min()].sum() < wanted + 1e-5 or inside.min() == inside.max()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_mesh_keeps_the_same(backend, rows, monkeypatch):
    """One row, as a run samples, or one for each device: by the way of the CPU and by that of all else."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    sampling = SamplingConfig(temperature=0.8, top_k=20, top_p=0.7, seed=1)
    logits = jax.random.normal(jax.random.key(0), (rows, 50))

    def drawn(logits):
        found = filters.apply_filters(logits, None, filters.filter_settings(sampling))
        return found.logits_BC, found.tokens(jnp.argmax(found.logits_BC, axis=-1))

    expected = jax.jit(drawn)(logits)
    with jax.set_mesh(make_mesh(MeshConfig(data=rows), jax.devices()[:rows])):
        kept, tokens = jax.jit(drawn)(sharding.reshard(logits, "batch", "features"))
    np.testing.assert_allclose(kept, expected[0], rtol=1e-6)
    np.testing.assert_array_equal(tokens, expected[1])


def test_thresholds_agree_on_a_large_vocabulary():
    """Searched or sorted, the same tokens are left, but for what rounding at the threshold decides."""
    logits = jax.random.normal(jax.random.key(0), (4, 5_001)) * jnp.array([[0.1], [1.0], [3.0], [9.0]])
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    for p in (0.1, 0.5, 0.95, 0.999):
        share = jnp.full((4, 1), p)
        searched, sorted_ = (f(weights, share) for f in (filters.threshold_by_halving, filters.threshold_by_sorting))
        np.testing.assert_allclose(searched, sorted_, rtol=3e-3)
        counts = [(weights >= t).sum(axis=-1) for t in (searched, sorted_)]
        np.testing.assert_allclose(*counts, rtol=2e-3, atol=1)


@settings(max_examples=40, deadline=None)
@given(LOGITS, row_values(0, 1))
def test_min_p(logits, p):
    got = survivors(filters.min_p(jnp.asarray(logits), jnp.asarray(p)))
    for row, kept, share in zip(logits, got, p, strict=True):
        ratio = softmax(row) / softmax(row).max()
        assert {i for i in range(V) if ratio[i] > share * (1 + 1e-5)} <= kept
        assert kept <= {i for i in range(V) if ratio[i] >= share * (1 - 1e-5)}


@settings(max_examples=40, deadline=None)
@given(LOGITS, hnp.arrays(bool, (B, V)), row_values(0.5, 2))
def test_repetition_penalty(logits, seen, penalty):
    got = filters.repetition_penalty(jnp.asarray(logits), jnp.asarray(seen), jnp.asarray(penalty))
    for b, v in np.ndindex(B, V):
        x = logits[b, v]
        expected = x if not seen[b, v] else x / penalty[b] if x > 0 else x * penalty[b]
        assert got[b, v] == pytest.approx(expected, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(LOGITS, row_values(0.125, 4))
def test_temperature(logits, value):
    got = jax.nn.softmax(filters.temperature(jnp.asarray(logits), jnp.asarray(value)), axis=-1)
    for row, out, t in zip(logits, np.asarray(got), value, strict=True):
        np.testing.assert_allclose(out, softmax(row / t), atol=1e-6)


def test_temperature_zero_is_greedy_and_tiny_does_not_overflow():
    logits = jnp.array([[1.0, 80.0, 80.0], [3.0, -60.0, 2.0]])
    assert survivors(filters.temperature(logits, 0.0)) == [{1}, {0}]
    cold = jax.nn.softmax(filters.temperature(logits, 1e-37), axis=-1)
    np.testing.assert_array_equal(cold, [[0, 0.5, 0.5], [1, 0, 0]])


def test_off_keeps_all_exactly():
    """Rows without a filter share a batch with rows that have it."""
    logits = jax.random.normal(jax.random.key(0), (2, 500)) * 10
    for keep, off in ((filters.top_p, 1.0), (filters.min_p, 0.0)):
        np.testing.assert_array_equal(keep(logits, off), logits)
        mixed = keep(logits, jnp.array([off, 0.5]))
        np.testing.assert_array_equal(mixed[0], logits[0])
        assert len(survivors(mixed)[1]) < 500


def test_settings_name_only_filters_that_are_on():
    assert filters.filter_settings(SamplingConfig(temperature=0, top_k=5, top_p=0.5, min_p=0.1)) == {}
    assert set(filters.filter_settings(SamplingConfig(top_p=0.5))) == {"temperature", "top_p"}
    assert set(filters.filter_settings(SamplingConfig(temperature=0, repetition_penalty=1.2))) == {"repetition_penalty"}


def test_order():
    """Temperature comes before top-p: at a high temperature the same p keeps more tokens."""
    logits, seen = jnp.log(jnp.array([[0.6, 0.2, 0.1, 0.1]])), jnp.array([[False, True, False, False]])
    kept = survivors(filters.apply_filters(logits, seen, {"top_p": 0.5, "temperature": 50.0}).logits_BC)
    assert kept == [{0, 1}]
    # ... and the penalty before both: token 1, seen, has become the least likely.
    settings = {"top_k": filters.ranks(2), "temperature": 1.0, "repetition_penalty": 9.0}
    logits_BC, ids_BC = filters.apply_filters(logits, seen, settings)
    assert set(np.asarray(ids_BC)[np.isfinite(logits_BC)]) == {0, 2}


def test_settings_are_traced():
    apply = jax.jit(filters.apply_filters)
    logits, seen = jnp.zeros((2, V)), jnp.zeros((2, V), bool)
    for sampling in (SamplingConfig(temperature=0.5, top_p=0.9), SamplingConfig(temperature=1, top_p=0.1)):
        apply(logits, seen, filters.filter_settings(sampling))
    assert apply._cache_size() == 1
