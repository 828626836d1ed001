"""Attention in memory that grows with the context and not with its square, in pure JAX.

FlashAttention's algorithm (Dao et al. 2022; Rabe and Staats 2021): the softmax is computed online, one block of
keys after the other, and the backward pass computes the weights again from each row's log-sum-exp.

Shape suffixes: B batch, T query tokens, S key/value tokens, N query heads, K key/value heads, G query heads per
key/value head, H head dimension, I query blocks, J key blocks, X queries of one block for all G heads, side by side.
Behind an I or a J, and inside the loops, T and S count the tokens of one block.
"""

import collections
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.model.layers import softcap
from gptjax.model.remat import ATTENTION
from gptjax.parallel.precision import precision

PADDING = jnp.iinfo(jnp.int32).max
"""Position of keys that only fill up the last block: after every query, one at an empty slot's position included."""


_Static = collections.namedtuple("_Static", "window cap scale query_block key_block")
"""What a program is compiled for, as in `blockwise_attention`."""


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None,
    kv_segments_BS: jax.Array | None,
    *,
    window: int | None,
    cap: float,
    scale: float,
    query_block: int = 256,
    key_block: int = 256,
) -> jax.Array:
    """Causal softmax(q kᵀ · scale) v of local arrays, as `attention` defines it, in O(T + S) memory.

    Tokens may stand in any order, as under context parallelism: masks come from positions and segments alone, and so
    does which pairs of blocks are computed. Those are skipped in which no row of the batch can see anything: about
    half of them where tokens are in order, and all but a band of them where there is a window. A query that sees no
    key at all gives 0 and has no gradient (the kernel that holds all logits gives NaN).

    Args:
        q_positions_BT: position of each query.
        kv_positions_BS: position of each key; int32's maximum in a slot that holds nothing.
        q_segments_BT, kv_segments_BS: document of each token; others' are not seen. None, both: one document a row.
        window: tokens that are seen, the query's own included; None: all.
        cap: bound of the logits, `cap · tanh(logits / cap)`; 0: none.
        scale: factor of the logits.
        query_block, key_block: most tokens in a block; they set speed, memory, and nothing of the result but rounding.
            On a CPU 256 is the fastest at 512 and 1024 tokens, and 2 % from it at 4096 (benchmarks/attention_speed.py).

    Returns:
        (B, T, N, H), of q's type; v may have a head dimension of its own, which is then the result's.
    """
    # As few blocks as the limits allow, of one size, so that the last needs little padding.
    blocks = (-(-x.shape[1] // -(-x.shape[1] // most)) for x, most in ((q_BTNH, query_block), (k_BSKH, key_block)))
    places = (q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    return _attention(_Static(window, cap, scale, *blocks), q_BTNH, k_BSKH, v_BSKH, places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q_BTNH, k_BSKH, v_BSKH, places):
    return _forward(static, q_BTNH, k_BSKH, v_BSKH, places)[0]


def _forward(static, q_BTNH, k_BSKH, v_BSKH, places):
    """The result, and what the backward pass needs."""
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]
    q_place, k_place, k_bounds = _places(static, N // K, places)
    q_IBKXH = _blocks(q_BTNH * static.scale, static.query_block, K)
    k_JBKSH, v_JBKSH = (_blocks(x, static.key_block, K) for x in (k_BSKH, v_BSKH))

    def query_step(_, query):
        q_BKXH, place = query
        visible_J, num_visible = _visible(static, place, k_bounds)

        def key_step(i, carry):
            top_BKX, sum_BKX, out_BKXH = carry
            k_BKSH, v_BKSH, keys = _at((k_JBKSH, v_JBKSH, k_place), visible_J[i])
            _, logits_BKXS = _logits(static, q_BKXH, k_BKSH, place, keys)
            new_top_BKX = jnp.maximum(top_BKX, logits_BKXS.max(axis=-1))
            weights_BKXS = jnp.exp(logits_BKXS - new_top_BKX[..., None])
            shrink_BKX = jnp.exp(top_BKX - new_top_BKX)
            update_BKXH = _einsum("bkxs,bksh->bkxh", weights_BKXS.astype(q_BKXH.dtype), v_BKSH)
            sum_BKX = sum_BKX * shrink_BKX + weights_BKXS.sum(axis=-1)
            return new_top_BKX, sum_BKX, out_BKXH * shrink_BKX[..., None] + update_BKXH

        zeros_BKX = jnp.zeros(q_BKXH.shape[:-1], jnp.float32)
        # A finite top gives exp(-inf - top) = 0 in a row that has seen nothing yet, where -inf would give NaN.
        top_BKX = jnp.full_like(zeros_BKX, jnp.finfo(jnp.float32).min)
        start = (top_BKX, zeros_BKX, jnp.zeros((*zeros_BKX.shape, v_BSKH.shape[-1]), jnp.float32))
        top_BKX, sum_BKX, out_BKXH = jax.lax.fori_loop(0, num_visible, key_step, start)
        sum_BKX = jnp.where(sum_BKX > 0, sum_BKX, 1.0)
        return None, ((out_BKXH / sum_BKX[..., None]).astype(q_BTNH.dtype), top_BKX + jnp.log(sum_BKX))

    _, (out_IBKXH, logsumexp_IBKX) = jax.lax.scan(query_step, None, (q_IBKXH, q_place))
    out_BTNH = checkpoint_name(_join(out_IBKXH, q_BTNH.shape[1], N), ATTENTION)
    logsumexp_IBKX = checkpoint_name(logsumexp_IBKX, ATTENTION)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, out_BTNH, logsumexp_IBKX, places)


def _backward(static, saved, d_out_BTNH):
    """Gradients of q, k and v (Dao et al. 2022, algorithm 4, with the queries' blocks as the outer loop)."""
    q_BTNH, k_BSKH, v_BSKH, out_BTNH, logsumexp_IBKX, places = saved
    (T, N), (S, K), dtype = q_BTNH.shape[1:3], k_BSKH.shape[1:3], q_BTNH.dtype
    q_place, k_place, k_bounds = _places(static, N // K, places)
    queries = (_blocks(x, static.query_block, K) for x in (q_BTNH * static.scale, out_BTNH, d_out_BTNH))
    k_JBKSH, v_JBKSH = (_blocks(x, static.key_block, K) for x in (k_BSKH, v_BSKH))

    def query_step(carry, query):
        q_BKXH, out_BKXH, d_out_BKXH, logsumexp_BKX, place = query
        visible_J, num_visible = _visible(static, place, k_bounds)
        # What the softmax's gradient subtracts, each row's mean of d_weights, is known before the weights are.
        mean_BKX = (out_BKXH.astype(jnp.float32) * d_out_BKXH.astype(jnp.float32)).sum(axis=-1)

        def key_step(i, carry):
            dq_BKXH, dk_JBKSH, dv_JBKSH = carry
            j = visible_J[i]
            k_BKSH, v_BKSH, keys = _at((k_JBKSH, v_JBKSH, k_place), j)
            capped_BKXS, logits_BKXS = _logits(static, q_BKXH, k_BKSH, place, keys)
            weights_BKXS = jnp.exp(logits_BKXS - logsumexp_BKX[..., None])
            d_weights_BKXS = _einsum("bkxh,bksh->bkxs", d_out_BKXH, v_BKSH)
            d_logits_BKXS = weights_BKXS * (d_weights_BKXS - mean_BKX[..., None])
            if static.cap:
                d_logits_BKXS *= 1 - jnp.square(capped_BKXS / static.cap)
            d_logits_BKXS, weights_BKXS = d_logits_BKXS.astype(dtype), weights_BKXS.astype(dtype)
            dq_BKXH += _einsum("bkxs,bksh->bkxh", d_logits_BKXS, k_BKSH)
            dk_JBKSH = _add_at(dk_JBKSH, j, _einsum("bkxs,bkxh->bksh", d_logits_BKXS, q_BKXH))
            dv_JBKSH = _add_at(dv_JBKSH, j, _einsum("bkxs,bkxh->bksh", weights_BKXS, d_out_BKXH))
            return dq_BKXH, dk_JBKSH, dv_JBKSH

        start = (jnp.zeros(q_BKXH.shape, jnp.float32), *carry)
        dq_BKXH, *carry = jax.lax.fori_loop(0, num_visible, key_step, start)
        return carry, (dq_BKXH * static.scale).astype(dtype)

    carry = [jnp.zeros(x.shape, jnp.float32) for x in (k_JBKSH, v_JBKSH)]
    (dk_JBKSH, dv_JBKSH), dq_IBKXH = jax.lax.scan(query_step, carry, (*queries, logsumexp_IBKX, q_place))
    dk_BSKH, dv_BSKH = _join(dk_JBKSH, S, K).astype(k_BSKH.dtype), _join(dv_JBKSH, S, K).astype(v_BSKH.dtype)
    return _join(dq_IBKXH, T, N), dk_BSKH, dv_BSKH, None


_attention.defvjp(_forward, _backward)


def _einsum(formula, x, y):
    return jnp.einsum(formula, x, y, precision=precision(x), preferred_element_type=jnp.float32)


def _logits(static, q_BKXH, k_BKSH, q_place, k_place):
    """The logits of a pair of blocks, and the same with -inf where a key is not seen."""
    (q_positions_BX, q_segments_BX), (k_positions_BS, k_segments_BS) = q_place, k_place
    seen_BXS = k_positions_BS[:, None, :] <= q_positions_BX[:, :, None]
    if static.window is not None:
        seen_BXS &= k_positions_BS[:, None, :] > q_positions_BX[:, :, None] - static.window
    if q_segments_BX is not None:
        seen_BXS &= k_segments_BS[:, None, :] == q_segments_BX[:, :, None]
    logits_BKXS = softcap(_einsum("bkxh,bksh->bkxs", q_BKXH, k_BKSH), static.cap)
    return logits_BKXS, jnp.where(seen_BXS[:, None], logits_BKXS, -jnp.inf)


def _visible(static, q_place, k_bounds):
    """Indices of the key blocks of which a query may see a key in some row, before all others, and their number.

    A loop over just these pays nothing for the others. With `lax.cond` around the work of each pair it would: the
    branch that does nothing copies the gradients, and a window at 32k tokens took three times as long on CPU.
    """
    q_bounds = [x_B[None] for x_B in _bounds(q_place)]
    seen_JB = k_bounds[0] <= q_bounds[1]
    if static.window is not None:
        seen_JB &= k_bounds[1] > q_bounds[0] - static.window
    if len(k_bounds) > 2:
        seen_JB &= (k_bounds[2] <= q_bounds[3]) & (q_bounds[2] <= k_bounds[3])
    seen_J = seen_JB.any(axis=1)
    return jnp.argsort(~seen_J), seen_J.sum()


def _bounds(place):
    """First and last position of a block in each row of the batch, and its least and greatest segment."""
    positions_BS, segments_BS = place
    held_BS = jnp.where(positions_BS == PADDING, jnp.iinfo(jnp.int32).min, positions_BS)
    bounds = [positions_BS.min(axis=-1), held_BS.max(axis=-1)]
    return bounds if segments_BS is None else [*bounds, segments_BS.min(axis=-1), segments_BS.max(axis=-1)]


def _places(static, G: int, places):
    """(positions, segments or None) of query blocks, for G heads each, and of key blocks, and the latter's bounds."""
    q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS = places
    # One position lower, because no int32 is after an empty slot's, and padding has to be.
    # All else is filled up with copies of the last token, which leave bounds narrow; queries' results are cut off.
    q_place = (q_positions_BT - 1, q_segments_BT)
    q_place = jax.tree.map(lambda x: jnp.tile(_split(x, static.query_block, mode="edge"), (1, 1, G)), q_place)
    k_segments_JBS = None if kv_segments_BS is None else _split(kv_segments_BS, static.key_block, mode="edge")
    k_place = (_split(kv_positions_BS - 1, static.key_block, constant_values=PADDING), k_segments_JBS)
    return q_place, k_place, _bounds(k_place)


def _at(tree_J, j):
    return jax.tree.map(lambda x_J: jax.lax.dynamic_index_in_dim(x_J, j, keepdims=False), tree_J)


def _add_at(x_J, j, update):
    return jax.lax.dynamic_update_index_in_dim(x_J, _at(x_J, j) + update, j, axis=0)


def _split(x_BT, size: int, **padding):
    """Blocks in front, (blocks, B, size, ...), the last one filled up as `jnp.pad` is told to."""
    B, T = x_BT.shape[:2]
    padded_BT = jnp.pad(x_BT, [(0, 0), (0, -T % size), *[(0, 0)] * (x_BT.ndim - 2)], **padding)
    return jnp.moveaxis(padded_BT.reshape(B, -1, size, *x_BT.shape[2:]), 1, 0)


def _blocks(x_BTNH, size: int, K: int):
    """(I, B, K, X, H): a gradient that contracts G and T at once is slow on CPU, one that contracts X is not."""
    x_IBTNH = _split(x_BTNH, size)
    I, B, _, N, H = x_IBTNH.shape
    return x_IBTNH.reshape(I, B, size, K, N // K, H).transpose(0, 1, 3, 4, 2, 5).reshape(I, B, K, -1, H)


def _join(x_IBKXH, T: int, N: int):
    """(B, T, N, H): `_blocks` undone, without the padding."""
    I, B, K, _, H = x_IBKXH.shape
    x_BITKGH = x_IBKXH.reshape(I, B, K, N // K, -1, H).transpose(1, 0, 4, 2, 3, 5)
    return x_BITKGH.reshape(B, -1, N, H)[:, :T]
