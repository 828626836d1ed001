"""`blockwise_attention` against a float64 NumPy reference with its own backward pass, its memory, and what it skips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptjax.model.blockwise import blockwise_attention
from gptjax.model.cache import EMPTY

B, N, H = 2, 4, 8
RANDOM = np.random.default_rng(0)
PLAIN = {"window": None, "cap": 0.0, "scale": 0.35}


def reference(q, k, v, d_out, q_positions, kv_positions, q_segments, kv_segments, *, window, cap, scale):
    """The output, and the gradients of `sum(output · d_out)`, as the paper's formulas read, in float64."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    groups = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
    logits = scale * np.einsum("btnh,bsnh->bnts", q, k)
    capped = cap * np.tanh(logits / cap) if cap else logits
    distance = np.asarray(q_positions, np.int64)[:, :, None] - kv_positions[:, None, :]
    seen = (distance >= 0) & (distance < (np.inf if window is None else window))
    if q_segments is not None:
        seen &= q_segments[:, :, None] == kv_segments[:, None, :]
    weights = np.exp(capped - capped.max()) * seen[:, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)  # a row that sees nothing has no weights
    out = np.einsum("bnts,bsnh->btnh", weights, v)

    d_weights = np.einsum("btnh,bsnh->bnts", d_out, v)
    d_capped = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True))
    d_logits = d_capped * (1 - (capped / cap) ** 2 if cap else 1.0)
    dq = scale * np.einsum("bnts,bsnh->btnh", d_logits, k)
    dk = scale * np.einsum("bnts,btnh->bsnh", d_logits, q)
    dv = np.einsum("bnts,btnh->bsnh", weights, d_out)
    dk, dv = (x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3) for x in (dk, dv))
    return out, dq, dk, dv


def rows(x):
    """The same for every row of the batch, or one list a row."""
    x = np.array(x, np.int32)
    return np.broadcast_to(x, (B, x.shape[-1]))


def draw(q_positions, kv_positions, num_kv_heads=N, value_dim=H, dtype=np.float32):
    """q, k, v and a direction to differentiate along."""
    T, S = q_positions.shape[1], kv_positions.shape[1]
    shapes = ((B, T, N, H), (B, S, num_kv_heads, H), (B, S, num_kv_heads, value_dim), (B, T, N, value_dim))
    return [RANDOM.normal(size=shape).astype(dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("window", "cap", "scale", "query_block", "key_block"))
def run(q, k, v, d_out, *places, **settings):
    out, vjp = jax.vjp(lambda q, k, v: blockwise_attention(q, k, v, *places, **settings), q, k, v)
    return out, *vjp(d_out)


# Each of four devices has a piece from the front and one from the back; queries are those of the second device.
ZIGZAG = np.arange(32).reshape(8, 4)[[0, 7, 1, 6, 2, 5, 3, 4]].reshape(-1)
LOCAL = {"q": rows(ZIGZAG[8:16]), "kv": rows(ZIGZAG), "num_kv_heads": 2}
SHUFFLED = rows([RANDOM.permutation(21), RANDOM.permutation(21)])
CASES = {
    "dense": {"q": rows(range(24))},
    "odd lengths": {"q": rows(range(23)), "value_dim": 5},
    "one key/value head": {"q": rows(range(23)), "num_kv_heads": 1, "window": 6},
    "segments": {"q": rows(range(20)), "num_kv_heads": 2, "q_segments": rows([[0] * 12 + [1] * 8, [4] * 3 + [5] * 17])},
    "softcap": {"q": rows(range(11)), "cap": 2.0, "scale": 1.5},
    "shuffled": {"q": SHUFFLED, "window": 10, "num_kv_heads": 2, "cap": 5.0, "q_segments": SHUFFLED // 8},
    "zigzag": LOCAL,
    "zigzag, all": LOCAL | {"window": 12, "cap": 3.0, "q_segments": LOCAL["q"] // 11, "kv_segments": LOCAL["kv"] // 11},
    # Slots in no order, of which some hold nothing; even a query at such a slot's position never sees padding.
    "cache": {
        "q": rows([[3, 4], [1, EMPTY]]),
        "kv": rows([[0, 1, 4, 3, 2] + [EMPTY] * 8, [EMPTY, 2, 0, 1] + [EMPTY] * 9]),
    },
}
RUNS = [*((case, (8, 6)) for case in CASES), ("shuffled", (64, 7)), ("zigzag, all", (3, 64)), ("shuffled", (1, 1))]


@pytest.mark.parametrize(("case", "blocks"), RUNS)
def test_against_numpy(case, blocks):
    """Value and gradients agree with the definition, for every mask, order of tokens and block size."""
    settings = dict(CASES[case])
    places = [settings.pop("q"), settings.pop("kv", CASES[case]["q"]), settings.pop("q_segments", None)]
    places.append(settings.pop("kv_segments", places[2]))
    inputs = draw(*places[:2], settings.pop("num_kv_heads", N), settings.pop("value_dim", H))
    got = run(*inputs, *places, **PLAIN | settings, query_block=blocks[0], key_block=blocks[1])
    for x, expected in zip(got, reference(*inputs, *places, **PLAIN | settings), strict=True):
        np.testing.assert_allclose(x, expected, atol=2e-5)


def test_bfloat16():
    """Types are the inputs', and results are off by little more than those round: gradients add up in float32."""
    places = rows(range(96)), rows(range(96)), None, None
    inputs = draw(*places[:2], 2, dtype=jnp.bfloat16)
    got = run(*inputs, *places, **PLAIN, query_block=1, key_block=16)
    for x, expected in zip(got, reference(*inputs, *places, **PLAIN), strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(x, np.float64) - expected) < 0.006 * np.linalg.norm(expected)


def test_a_row_that_sees_nothing_gives_zero():
    """No NaN, and exactly no gradient: neither in a block that others see, nor in one that nobody sees."""
    places = rows(range(12)), rows(range(6, 18)), None, None
    inputs = draw(*places[:2])
    got = run(*inputs, *places, **PLAIN, query_block=4, key_block=4)
    for x in got[:2]:
        np.testing.assert_array_equal(x[:, :6], 0.0)
    for x, expected in zip(got, reference(*inputs, *places, **PLAIN), strict=True):
        np.testing.assert_allclose(x, expected, atol=2e-5)


KEYS = np.arange(64).reshape(8, 8)[RANDOM.permutation(8)].reshape(-1)
HIDDEN = {
    "causal": (KEYS >= 40, {}, None),
    "window": ((KEYS < 16) | (KEYS >= 40), {"window": 9}, None),
    "segments": ((KEYS // 8 % 2 == 1) | (KEYS >= 40), {}, KEYS // 8 % 2),
}


@pytest.mark.parametrize("why", HIDDEN)
def test_blocks_that_nobody_sees_are_not_computed(why):
    """NaN in their keys and values, which not even a weight of zero hides, reaches no result."""
    hidden_S, settings, segments_S = HIDDEN[why]
    q_positions, kv_positions = rows(RANDOM.permutation(np.arange(24, 40))), rows(KEYS)
    segments = (None, None) if segments_S is None else (np.zeros_like(q_positions), rows(segments_S))
    q, k, v, d_out = draw(q_positions, kv_positions)
    poisoned = [np.where(hidden_S[None, :, None, None], np.float32(np.nan), x) for x in (k, v)]
    settings = PLAIN | settings | {"query_block": 8, "key_block": 8}
    clean = run(q, k, v, d_out, q_positions, kv_positions, *segments, **settings)
    got = run(q, *poisoned, d_out, q_positions, kv_positions, *segments, **settings)
    for x, expected in zip(got, clean, strict=True):
        np.testing.assert_array_equal(x, expected)
        assert np.isfinite(x).all()


def test_memory_is_linear_in_the_context():
    def temporary_bytes(T):
        x, positions = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32), jax.ShapeDtypeStruct((1, T), jnp.int32)
        compiled = run.lower(x, x, x, x, positions, positions, None, None, **PLAIN).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(4096)
    assert long < 0.1 * (2 * 4096 * 4096 * 4)
    assert long < 2.1 * short


def test_context_parallel_inside_the_model_s_loops():
    """Under `shard_map`, with local queries and all keys, and under scan, checkpoint and jit: as without a mesh."""
    places = LOCAL["kv"], LOCAL["kv"] // 11
    x_BTNH = draw(*places)[0]

    def local(x_BTNH, positions_BT, segments_BT, gather=lambda x_BT: x_BT):
        k_BSNH = gather(x_BTNH)
        places = positions_BT, gather(positions_BT), segments_BT, gather(segments_BT)
        return blockwise_attention(x_BTNH, k_BSNH, k_BSNH, *places, **PLAIN, query_block=4, key_block=8)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(attend, x_BTNH, *places):
        def loss(x_BTNH):
            layer = jax.checkpoint(lambda x_BTNH, _: (attend(x_BTNH, *places), None))
            return jnp.square(jax.lax.scan(layer, x_BTNH, None, length=2)[0]).sum()

        return jax.grad(loss)(x_BTNH)

    gathered = functools.partial(local, gather=lambda x_BT: jax.lax.all_gather(x_BT, "context", axis=1, tiled=True))
    heads, rows = P("data", "context", "tensor", None), P("data", "context")
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), (jax.sharding.AxisType.Explicit,) * 3)):
        attend = jax.shard_map(gathered, in_specs=(heads, rows, rows), out_specs=heads, check_vma=False)
        sharded = (
            jax.sharding.reshard(x, spec) for x, spec in zip((x_BTNH, *places), (heads, rows, rows), strict=True)
        )
        got = gradient(attend, *sharded)
    np.testing.assert_allclose(got, gradient(local, x_BTNH, *places), rtol=1e-4, atol=1e-5)
