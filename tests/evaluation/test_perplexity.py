"""Perplexity against NumPy, on rows that count and rows that only fill up a batch."""

import math

import jax
import numpy as np
import optax
import pytest

from gptjax.config import MeshConfig
from gptjax.evaluation.perplexity import DISPATCHED_BATCHES, Perplexity, evaluate
from gptjax.model.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.training.state import abstract_state

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.integers(0, 61, (11, 17)).astype(np.int32)
TOKEN_BYTES = RANDOM.integers(0, 5, 61).astype(np.int32)


def batches(rows, size, filler=0):
    """Rows in batches of `size`, the last filled up with rows that do not count."""
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        fill = np.full((size - len(part), rows.shape[1]), filler, np.int32)
        yield np.concatenate([part, fill]), len(part)


def expected(config, params):
    """The mean negative log-likelihood of every label, and the labels' bytes."""
    logits, _ = jax.jit(GPT(config).apply)({"params": params}, ROWS[:, :-1])
    logits = np.asarray(logits, np.float64)[..., :61]
    labels = ROWS[:, 1:]
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return nll.mean(), int(TOKEN_BYTES[labels].sum())


def abstract_params(config):
    return abstract_state(GPT(config), optax.identity()).params


def test_against_numpy(tiny):
    """Each label counts once, whatever the batches; rows that fill up the last batch count nothing, whatever they
    hold; and the same is found where rows and vocabulary are split over devices."""
    params = jax.tree.map(lambda p: RANDOM.normal(size=p.shape).astype(np.float32) * 0.3, abstract_params(tiny))
    nats, num_bytes = expected(tiny, params)
    for size, filler in ((4, 0), (4, 60), (12, 7)):
        found = evaluate(tiny, params, batches(ROWS, size, filler), TOKEN_BYTES)
        assert (found.num_tokens, found.num_bytes) == (11 * 16, num_bytes)
        assert found.nats_per_token == pytest.approx(nats, rel=1e-5)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        split = jax.device_put(params, jax.tree.map(lambda p: p.sharding, abstract_params(tiny)))
        found = evaluate(tiny, split, batches(ROWS, 8, filler=9), TOKEN_BYTES)
    assert found == pytest.approx(Perplexity(nats, 11 * 16, num_bytes), rel=1e-5)


def test_what_waits_for_the_device_does_not_grow_with_the_batches(tiny):
    """Neither the tokens of batches nor their sums: a held-out split may have any number of them."""
    params = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), abstract_params(tiny))
    alive = []

    def counted(count):
        for _ in range(count):
            alive.append(len(jax.live_arrays()))
            yield ROWS[:2], 2

    found = evaluate(tiny, params, counted(5 * DISPATCHED_BATCHES), TOKEN_BYTES)
    assert found.num_tokens == 5 * DISPATCHED_BATCHES * 2 * 16
    assert max(alive) <= max(alive[: DISPATCHED_BATCHES + 2])


def test_units():
    """A model that is as good as a fair coin per byte: 8 tokens of 4 bytes each, 4 bits a token, is 1 bit a byte."""
    found = Perplexity(nats_per_token=4 * math.log(2), num_tokens=8, num_bytes=32)
    assert found.bits_per_byte == pytest.approx(1.0)
    assert found.perplexity == pytest.approx(16.0)
    assert Perplexity(1.0, 8, 0).bits_per_byte == math.inf
    assert math.isfinite(Perplexity(1e6, 1, 1).perplexity)
