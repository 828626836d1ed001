"""`attention` against a float64 NumPy reference with its own backward pass, and its types under a mesh."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig
from gptjax.model import kernels
from gptjax.model.attention import attention
from gptjax.model.cache import EMPTY
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh

B, T, N, H = 4, 6, 4, 8
RANDOM = np.random.default_rng(0)


def reference(q, k, v, d_out, q_positions, kv_positions, segment_ids, window, softcap, scale, keep_BNTS):
    """The output, and the gradients of `sum(output · d_out)`, as the paper's formulas read, in float64."""
    groups = q.shape[2] // k.shape[2]
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * np.einsum("btnh,bsnh->bnts", q, k)
    capped = softcap * np.tanh(logits / softcap) if softcap else logits
    distance = np.asarray(q_positions, np.int64)[:, :, None] - kv_positions[:, None, :]
    seen = (distance >= 0) & (distance < (np.inf if window is None else window))
    if segment_ids is not None:
        seen &= segment_ids[:, :, None] == segment_ids[:, None, :]
    weights = np.exp(capped - capped.max()) * seen[:, None]
    weights /= weights.sum(-1, keepdims=True)
    keep = 1.0 if keep_BNTS is None else keep_BNTS
    out = np.einsum("bnts,bsnh->btnh", weights * keep, v)

    d_weights = np.einsum("btnh,bsnh->bnts", d_out, v) * keep
    d_capped = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True))
    d_logits = d_capped * (1 - (capped / softcap) ** 2 if softcap else 1.0)
    dq = scale * np.einsum("bnts,bsnh->btnh", d_logits, k)
    dk = scale * np.einsum("bnts,btnh->bsnh", d_logits, q)
    dv = np.einsum("bnts,btnh->bsnh", weights * keep, d_out)
    dk, dv = (x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3) for x in (dk, dv))
    return out, dq, dk, dv


COUNTED = np.tile(np.arange(T), (B, 1)).astype(np.int32)
CASES = {
    "dense": {},
    "window": {"window": 3},
    "one key/value head": {"num_kv_heads": 1, "window": 2},
    "segments": {"num_kv_heads": 2, "segment_ids": np.array([[0, 0, 1, 1, 1, 2]] * B, np.int32)},
    "softcap": {"softcap": 2.0, "scale": 1.5},
    "dropout": {"num_kv_heads": 2, "keep_BNTS": (RANDOM.random((B, N, T, T)) < 0.7).astype(np.float32) / 0.7},
    "all": {
        "num_kv_heads": 2,
        "window": 4,
        "segment_ids": np.array([[3, 3, 3, 3, 3, 7]] * B, np.int32),
        "softcap": 5.0,
        "scale": 0.7,
        "keep_BNTS": (RANDOM.random((B, N, T, T)) < 0.7).astype(np.float32) / 0.7,
    },
    # Two queries over eight slots: rows hold 5 and 3 tokens in no order, the rest holds nothing.
    "cache": {
        "num_kv_heads": 2,
        "window": 4,
        "q_positions": np.array([[3, 4], [1, 2]] * 2, np.int32),
        "kv_positions": np.array([[0, 1, 4, 3, 2, *[EMPTY] * 3], [EMPTY, 2, 0, 1, *[EMPTY] * 4]] * 2, np.int32),
    },
}


def inputs(case):
    """q, k, v, a direction to differentiate along, and all keyword arguments of a case."""
    settings = {"window": None, "softcap": 0.0, "scale": None, "segment_ids": None, "keep_BNTS": None}
    settings |= {"q_positions": COUNTED, "kv_positions": COUNTED} | CASES[case]
    K = settings.pop("num_kv_heads", N)
    T, S = settings["q_positions"].shape[1], settings["kv_positions"].shape[1]
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return *(RANDOM.normal(size=shape).astype(np.float32) for shape in shapes), settings


@pytest.mark.parametrize("case", CASES)
def test_against_numpy(case):
    """Value and gradients agree with the definition, for every mask and factor."""
    q, k, v, d_out, settings = inputs(case)

    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, **settings), q, k, v)
        return out, *vjp(d_out)

    for got, expected in zip(run(q, k, v, d_out), reference(q, k, v, d_out, **settings), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("case", ["segments", "all"])
def test_under_a_mesh(case, mesh):
    """Each device computes its own rows and heads: output and gradients keep q's, k's and v's sharding types,
    so that nothing is gathered before or after a kernel, and the values are those of one device."""
    q, k, v, d_out, settings = inputs(case)
    heads, kv_heads = P(("data", "fsdp"), "context", "tensor", None), ("batch", "sequence", "kv_heads", "head_dim")
    q, d_out = (sharding.reshard(x, "batch", "sequence", "heads", "head_dim") for x in (q, d_out))
    k, v = (sharding.reshard(x, *kv_heads) for x in (k, v))
    for name in ("q_positions", "kv_positions", "segment_ids"):
        settings[name] = sharding.reshard(settings[name], "batch", "sequence")
    if settings["keep_BNTS"] is not None:
        settings["keep_BNTS"] = sharding.reshard(settings["keep_BNTS"], "batch", "heads", "sequence", "keys")

    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, **settings), q, k, v)
        gradients = vjp(d_out)
        assert all(jax.typeof(x).sharding.spec == heads for x in (out, *gradients))  # while tracing, too
        return out, *gradients

    results = run(q, k, v, d_out)
    assert all(jax.typeof(x).sharding.spec == heads for x in results)
    settings = {name: np.asarray(x) if isinstance(x, jax.Array) else x for name, x in settings.items()}
    for got, expected in zip(results, reference(q, k, v, d_out, **settings), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("window", [1, 3, None])
def test_reach_is_exactly_the_window(window):
    """Query t reads the values of tokens t-window+1 to t and of no other: the gradient is nonzero just there."""
    q, k, v = (jnp.asarray(RANDOM.normal(size=(1, T, N, H)), jnp.float32) for _ in range(3))
    positions = jnp.asarray(COUNTED[:1])

    def attend(v):
        out = attention(q, k, v, q_positions=positions, kv_positions=positions, window=window)
        return out.sum(axis=(0, 2, 3))

    reads_TS = jnp.abs(jax.jacrev(attend)(v)).sum(axis=(1, 3, 4)) > 0
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    np.testing.assert_array_equal(reads_TS, (distance >= 0) & (distance < (window or T)))


def test_bfloat16_weights_are_summed_in_float32():
    """The softmax is taken in float32: 512 equal keys weigh exactly 1/512 each, which bfloat16 sums would not keep."""
    S = 512
    q, k = jnp.ones((1, 1, 1, H), jnp.bfloat16), jnp.ones((1, S, 1, H), jnp.bfloat16)
    v = jnp.ones((1, S, 1, H), jnp.bfloat16)
    out = attention(q, k, v, q_positions=jnp.full((1, 1), S), kv_positions=jnp.arange(S)[None])
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 1.0)


@pytest.mark.parametrize("axes", [None, {"data": 2, "context": 2, "tensor": 2}])
def test_long_sequences_take_the_blockwise_kernel(axes, monkeypatch):
    """From a number of logits on they are never held at once, and nothing else changes, on devices that split the
    sequence, too: there queries see the keys of all."""
    q, k, v, d_out, settings = inputs("segments")
    expected = reference(q, k, v, d_out, **settings)
    monkeypatch.setitem(kernels.BLOCKWISE_FROM, "cpu", 1)

    def run(q, k, v, d_out):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, **settings), q, k, v)
        return out, *vjp(d_out)

    assert "scan" in str(jax.make_jaxpr(run)(q, k, v, d_out))
    with contextlib.ExitStack() as stack:
        if axes:
            stack.enter_context(jax.set_mesh(make_mesh(MeshConfig(**axes))))
            q, d_out = (sharding.reshard(x, "batch", "sequence", "heads", "head_dim") for x in (q, d_out))
            k, v = (sharding.reshard(x, "batch", "sequence", "kv_heads", "head_dim") for x in (k, v))
            for name in ("q_positions", "kv_positions", "segment_ids"):
                settings[name] = sharding.reshard(settings[name], "batch", "sequence")
        for got, wanted in zip(jax.jit(run)(q, k, v, d_out), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-5)
