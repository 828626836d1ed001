"""Attention with all logits at once, as the formula reads, for XLA to make the best of.

The gradient is our own, FlashAttention's (Dao et al. 2022) without the blocks: the softmax is divided by its sum where
it is as narrow as a head and not as wide as the context, and one array of the context's square is kept, not several.

Shape suffixes: B batch, T query tokens, S key/value tokens, N query heads, K key/value heads, G query heads per
key/value head, H head dimension, X queries for all G heads, side by side.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.model.layers import softcap
from gptjax.model.remat import ATTENTION
from gptjax.parallel.precision import precision

Segments = tuple[jax.Array, jax.Array] | None
"""(B, T) and (B, S), document of each query and of each key; None: one document a row."""


def xla_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    segments: Segments,
    keep_BNTS: jax.Array | None,
    *,
    window: int | None,
    cap: float,
    scale: float,
) -> jax.Array:
    """Causal softmax(q kᵀ · scale) v of local arrays, as `attention` defines it; (B, T, N, H), of q's type."""
    seen_BTS = seen(q_positions, kv_positions, window)
    if segments is not None:
        q_segments_BT, kv_segments_BS = segments
        seen_BTS &= q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]
    return _attention(cap, scale, q_BTNH, k_BSKH, v_BSKH, seen_BTS, keep_BNTS)


def seen(q_positions: jax.Array, kv_positions: jax.Array, window: int | None) -> jax.Array:
    """(B, T, S), which keys each query sees: those before it and its own, as far as a window reaches."""
    ahead_BTS = q_positions[:, :, None] - kv_positions[:, None, :]
    return ahead_BTS >= 0 if window is None else (ahead_BTS >= 0) & (ahead_BTS < window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(cap, scale, q_BTNH, k_BSKH, v_BSKH, seen_BTS, keep_BNTS):
    return _forward(cap, scale, q_BTNH, k_BSKH, v_BSKH, seen_BTS, keep_BNTS)[0]


def _forward(cap, scale, q_BTNH, k_BSKH, v_BSKH, seen_BTS, keep_BNTS):
    T, K, dtype = q_BTNH.shape[1], k_BSKH.shape[2], q_BTNH.dtype
    q_BKXH, k_BKSH, v_BKSH = by_head(q_BTNH, K) * scale, by_head(k_BSKH, K), by_head(v_BSKH, K)
    logits_BKXS = softcap(accurate_einsum("bkxh,bksh->bkxs", q_BKXH, k_BKSH), cap)
    B, _, X, S = logits_BKXS.shape
    logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits_BKXS.reshape(B, K, X // T, T, S), -jnp.inf)
    weights_BKXS = jnp.exp(logits_BKGTS - logits_BKGTS.max(axis=-1, keepdims=True)).reshape(B, K, X, S)
    sum_BKX1 = weights_BKXS.sum(axis=-1, keepdims=True)
    weights_BKXS = weights_BKXS.astype(dtype)
    out_BKXH = accurate_einsum("bkxs,bksh->bkxh", _drop(weights_BKXS, keep_BNTS), v_BKSH) / sum_BKX1
    out_BKXH = checkpoint_name(out_BKXH.astype(dtype), ATTENTION)
    slope_BKXS = 1 - jnp.square(logits_BKXS / cap) if cap else None  # of the bound on the logits
    residuals = q_BKXH, k_BKSH, v_BKSH, weights_BKXS, sum_BKX1, out_BKXH, keep_BNTS, slope_BKXS
    return by_token(out_BKXH, T), residuals


def _backward(cap, scale, residuals, d_out_BTNH):
    q_BKXH, k_BKSH, v_BKSH, weights_BKXS, sum_BKX1, out_BKXH, keep_BNTS, slope_BKXS = residuals
    T, S, dtype = d_out_BTNH.shape[1], k_BKSH.shape[2], q_BKXH.dtype
    d_out_BKXH = by_head(d_out_BTNH, k_BKSH.shape[1]).astype(jnp.float32) / sum_BKX1
    delta_BKX1 = (d_out_BKXH * out_BKXH.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    d_out_BKXH = d_out_BKXH.astype(dtype)
    d_weights_BKXS = _drop(accurate_einsum("bkxh,bksh->bkxs", d_out_BKXH, v_BKSH), keep_BNTS)
    d_logits_BKXS = weights_BKXS.astype(jnp.float32) * (d_weights_BKXS - delta_BKX1)
    if cap:
        d_logits_BKXS = d_logits_BKXS * slope_BKXS
    d_logits_BKXS = d_logits_BKXS.astype(dtype)
    dq_BKXH = (accurate_einsum("bkxs,bksh->bkxh", d_logits_BKXS, k_BKSH) * scale).astype(dtype)
    dk_BKSH = accurate_einsum("bkxs,bkxh->bksh", d_logits_BKXS, q_BKXH).astype(dtype)
    dv_BKSH = accurate_einsum("bkxs,bkxh->bksh", _drop(weights_BKXS, keep_BNTS), d_out_BKXH).astype(dtype)
    return by_token(dq_BKXH, T), by_token(dk_BKSH, S), by_token(dv_BKSH, S), None, None


_attention.defvjp(_forward, _backward)


def accurate_einsum(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Float32, of operands of one type, of which float32 ones are not rounded."""
    return jnp.einsum(formula, x, y, precision=precision(x), preferred_element_type=jnp.float32)


def _drop(weights_BKXS, keep_BNTS):
    return weights_BKXS if keep_BNTS is None else weights_BKXS * keep_BNTS.reshape(weights_BKXS.shape)


def by_head(x_BTNH, K: int):
    """(B, K, X, H): the queries of a group side by side; a gradient that contracts (G, T) at once is slow on CPU."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def by_token(x_BKXH, T: int):
    """(B, T, N, H): `by_head` undone."""
    B, K, X, H = x_BKXH.shape
    return x_BKXH.reshape(B, K, X // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, H)
