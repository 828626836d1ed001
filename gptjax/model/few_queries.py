"""Attention of a few new tokens to a long cache: what decoding does, bound by how fast the cache can be read.

Shape suffixes: B batch, T query tokens, S slots, N query heads, K key/value heads, P pairs of a row and one of these,
H head dimension, X queries for all heads of a group, side by side.
"""

import jax
import jax.numpy as jnp

from gptjax.model.cache import LayerCache
from gptjax.model.layers import softcap
from gptjax.model.xla_attention import accurate_einsum, by_head, by_token, seen

MOST_FEW = 16
"""Queries a row up to which keys and values are read once and in place, however the logits lie."""

LOOP_FROM = 2**20 if jax.__version_info__ >= (0, 11) else float("inf")
"""Numbers of a cache's keys from which one query a head reads them faster in a loop than in XLA:CPU's batched product,
which runs on one thread. Loops run on all, but were half as fast on each before XLA's emitters were rewritten."""


def few_queries_attention(
    q_BTNH: jax.Array,
    cache: LayerCache,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    *,
    window: int | None,
    cap: float,
) -> jax.Array:
    """Causal softmax(q kᵀ / sqrt(H)) v of local arrays; (B, T, N, H), of q's type.

    Rounded keys and values are not scaled back one by one: their scales go to the logits and to the weights.

    Args:
        q_positions: (B, T).
        kv_positions: (B, S).
    """
    B, T, _, H = q_BTNH.shape
    P, S, _ = cache.k_PSH.shape
    dtype = q_BTNH.dtype
    q_PXH = by_head(q_BTNH, P // B).reshape(P, -1, H) * H**-0.5
    one_loop = q_PXH.shape[1] == 1 and cache.k_PSH.size >= LOOP_FROM and jax.default_backend() == "cpu"
    if one_loop:
        logits_PXS = (q_PXH.astype(jnp.float32) * cache.k_PSH).sum(axis=-1)[:, None]
    else:
        logits_PXS = accurate_einsum("pxh,psh->pxs", q_PXH, cache.k_PSH.astype(dtype))
    if cache.k_scale_PS is not None:
        logits_PXS = logits_PXS * cache.k_scale_PS[:, None]
    logits_BKGTS = softcap(logits_PXS, cap).reshape(B, P // B, -1, T, S)
    seen_BTS = seen(q_positions, kv_positions, window)
    logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits_BKGTS, -jnp.inf)
    weights_PXS = jax.nn.softmax(logits_BKGTS, axis=-1).reshape(P, -1, S)
    if cache.v_scale_PS is not None:
        weights_PXS = weights_PXS * cache.v_scale_PS[:, None]
    if one_loop:
        out_PXH = (weights_PXS[:, 0, :, None] * cache.v_PSH).sum(axis=1)[:, None]
    else:
        out_PXH = accurate_einsum("pxs,psh->pxh", weights_PXS.astype(dtype), cache.v_PSH.astype(dtype))
    return by_token(out_PXH.astype(dtype).reshape(B, P // B, -1, H), T)
