"""Attention behind one function, and the layer that calls it.

Shape suffixes: B batch, T query tokens, S key/value tokens, D model, N query heads, K key/value
heads, G query heads per key/value head, H head dimension.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gptjax.config import ModelConfig
from gptjax.model.blockwise import blockwise_attention
from gptjax.model.layers import Linear, Norm, precision, rotate, softcap
from gptjax.model.remat import ATTENTION
from gptjax.parallel import sharding

BLOCKWISE_FROM = 2**24
"""Logits of a head on one device, 4096 × 4096, from which they are no longer held all at once."""


class Placement(NamedTuple):
    """Where a call's tokens stand: the same for all layers, and all that masks are made of."""

    positions: jax.Array
    """(B, T) position of each token."""
    kv_positions: jax.Array
    """(B, S) position of each key: the tokens' own, or those of the cache's slots."""
    segment_ids: jax.Array | None = None
    """(B, T) document of each token; None: one document a row."""
    slot: jax.Array | None = None
    """First slot of the cache that the tokens are written to; None: there is no cache."""


class LayerCache(NamedTuple):
    """Keys and values of one layer, one slot per token, filled from the front."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    keep_BNTS: jax.Array | None = None,
) -> jax.Array:
    """Causal softmax(q kᵀ · scale) v (Vaswani et al. 2017), with grouped key/value heads where K < N.

    A query sees the keys whose position is at most its own; masks come from positions alone, so that a
    cache may hold its tokens in any slots. Runs under `shard_map`, so that a kernel sees local arrays.

    Args:
        q_positions: (B, T) position of each query.
        kv_positions: (B, S) position of each key; a slot that holds nothing has a position after every query's.
        segment_ids: (B, T) document of each token, for self-attention (S = T); only keys of the query's own are seen.
        window: tokens that are seen, the query's own included; None: all.
        softcap: bound of the attention logits; 0: none.
        scale: factor of the logits; None: 1/sqrt(H).
        keep_BNTS: dropout mask that already carries its 1/(1 - rate).

    Returns:
        (B, T, N, H), of q's type and sharding.
    """
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    settings = {"window": window, "cap": softcap, "scale": scale}
    T, S = q_BTNH.shape[1] // sharding.num_shards("sequence"), k_BSKH.shape[1]

    def kernel(q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, segments, keep_BNTS):
        if T * S < BLOCKWISE_FROM or keep_BNTS is not None:
            out = _xla_attention(q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, segments, keep_BNTS, **settings)
            return checkpoint_name(out, ATTENTION)
        segments = segments or (None, None)
        return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, *segments, **settings)

    if not sharding.has_mesh():
        segments = None if segment_ids is None else (segment_ids, segment_ids)
        return kernel(q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, segments, keep_BNTS)
    rows = sharding.spec("batch", "sequence")
    heads = sharding.spec("batch", "sequence", "heads", "head_dim")
    kv_heads = sharding.spec("batch", "sequence", "kv_heads", "head_dim")
    in_specs = (
        *(heads, kv_heads, kv_heads, rows, rows),
        P() if segment_ids is None else rows,
        P() if keep_BNTS is None else sharding.spec("batch", "heads", "sequence", "keys"),
    )
    split = sharding.num_shards("sequence") > 1

    def local(q_BTNH, k_BTKH, v_BTKH, q_positions, kv_positions, segment_ids, keep_BNTS):
        """Every device has some queries, and gets the keys and values of all (Llama 3, Dubey et al. 2024)."""

        def whole(x_BT: jax.Array) -> jax.Array:
            return jax.lax.all_gather(x_BT, sharding.TABLE["sequence"], axis=1, tiled=True) if split else x_BT

        segments = None if segment_ids is None else (segment_ids, whole(segment_ids))
        return kernel(q_BTNH, whole(k_BTKH), whole(v_BTKH), q_positions, whole(kv_positions), segments, keep_BNTS)

    # check_vma=False: jax 0.10.1 cannot check kernels whose output types carry no varying axes.
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)
    return mapped(q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, segment_ids, keep_BNTS)


def _xla_attention(q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, segments, keep_BNTS, *, window, cap, scale):
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    # The queries of a group are laid side by side: a gradient that contracts (G, T) at once is slow on CPU.
    q_BKXH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    einsum = functools.partial(jnp.einsum, precision=precision(q_BTNH))
    logits = einsum("bkxh,bksh->bkxs", q_BKXH * scale, k_BKSH, preferred_element_type=jnp.float32)
    logits = softcap(logits, cap).reshape(B, K, G, T, S)
    ahead_BTS = q_positions[:, :, None] - kv_positions[:, None, :]
    seen_BTS = ahead_BTS >= 0
    if window is not None:
        seen_BTS &= ahead_BTS < window
    if segments is not None:
        q_segments_BT, kv_segments_BS = segments
        seen_BTS &= q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]
    weights = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], logits, -jnp.inf), axis=-1)
    if keep_BNTS is not None:
        weights = weights * keep_BNTS.reshape(B, K, G, T, S)
    weights_BKXS = weights.reshape(B, K, G * T, S).astype(q_BTNH.dtype)
    out_BKXH = einsum("bkxs,bksh->bkxh", weights_BKXS, v_BKSH)
    return out_BKXH.reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key and value projections."""

    config: ModelConfig
    window: int | None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        place: Placement,
        cache: LayerCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend within `x`, or to the cache after writing x's keys and values into it."""
        c = self.config
        B, T, D = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = self.queries_keys_values(x_BTD, place)
        if cache is not None:
            k_BTKH, v_BTKH = cache = LayerCache(
                write_slots(cache.k_BSKH, k_BTKH, place.slot), write_slots(cache.v_BSKH, v_BTKH, place.slot)
            )
        out_BTNH = attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            q_positions=place.positions,
            kv_positions=place.kv_positions,
            segment_ids=place.segment_ids,
            window=self.window,
            softcap=c.attention_softcap,
            keep_BNTS=self._dropout_mask(q_BTNH, k_BTKH.shape[1], dropout_key),
        )
        out_sharding = sharding.spec("batch", "sequence", "heads")
        out_BTF = jnp.reshape(out_BTNH, (B, T, c.num_heads * c.resolved_head_dim), out_sharding=out_sharding)
        residual_std = c.initializer_std * (2 * c.num_layers) ** -0.5
        return Linear(D, ("heads", "embed"), c.bias, residual_std, name="out")(out_BTF), cache

    def queries_keys_values(self, x_BTD: jax.Array, place: Placement) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, T, N, H), (B, T, K, H) and (B, T, K, H): projected, normalized and rotated as the switches ask."""
        c, (B, T, _) = self.config, x_BTD.shape
        H = c.resolved_head_dim
        x_BTD = sharding.fan_out(x_BTD, "heads")

        def project(name: str, num_heads: int, axis: str) -> jax.Array:
            y = Linear(num_heads * H, ("embed", axis), c.bias, c.initializer_std, name=name)(x_BTD)
            out_sharding = sharding.spec("batch", "sequence", axis, "head_dim")
            return jnp.reshape(y, (B, T, num_heads, H), out_sharding=out_sharding)

        q_BTNH = project("q", c.num_heads, "heads")
        k_BTKH = project("k", c.resolved_num_kv_heads, "kv_heads")
        v_BTKH = project("v", c.resolved_num_kv_heads, "kv_heads")
        if c.qk_norm:
            q_BTNH = Norm("rmsnorm", c.norm_epsilon, axis="head_dim", name="q_norm")(q_BTNH)
            k_BTKH = Norm("rmsnorm", c.norm_epsilon, axis="head_dim", name="k_norm")(k_BTKH)
        if c.positions == "rope":
            q_BTNH = rotate(q_BTNH, place.positions, c.rope_base, c.rotary_dim)
            k_BTKH = rotate(k_BTKH, place.positions, c.rope_base, c.rotary_dim)
        return q_BTNH, k_BTKH, v_BTKH

    def _dropout_mask(self, q_BTNH: jax.Array, S: int, key: jax.Array | None) -> jax.Array | None:
        rate = self.config.attention_dropout
        if key is None or rate == 0.0:
            return None
        B, T, N, _ = q_BTNH.shape
        whole = sharding.spec("batch", "heads", "keys", "keys")
        keep_BNTS = jax.random.bernoulli(key, 1.0 - rate, (B, N, T, S), out_sharding=whole)
        keep_BNTS = sharding.balance(sharding.balance(keep_BNTS, axis=2), axis=3)
        keep_BNTS = sharding.reshard(keep_BNTS, "batch", "heads", "sequence", "keys")
        return jnp.where(keep_BNTS, 1 / (1.0 - rate), 0).astype(q_BTNH.dtype)


def write_slots(old_BS: jax.Array, new_BT: jax.Array, slot: jax.Array) -> jax.Array:
    """`old` with `new` written along the second dimension from `slot` on."""
    return jax.lax.dynamic_update_slice_in_dim(old_BS, new_BT.astype(old_BS.dtype), slot, axis=1)
