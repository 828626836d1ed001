"""Attention behind one function, and the layer that calls it.

Shape suffixes: B batch, T query tokens, S key/value tokens, D model, N query heads, K key/value
heads, G query heads per key/value head, H head dimension.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptjax.config import ModelConfig
from gptjax.model import kernels
from gptjax.model.cache import LayerCache, key_positions, read, write
from gptjax.model.few_queries import MOST_FEW, few_queries_attention
from gptjax.model.layers import Linear, Norm, scaled
from gptjax.model.positions import rotary_factor, rotary_frequencies, rotate
from gptjax.parallel import sharding
from gptjax.parametrization import multipliers


class Placement(NamedTuple):
    """Where a call's tokens stand: the same for all layers, and all that masks are made of."""

    positions: jax.Array
    """(B, T) position of each token."""
    kv_positions: jax.Array
    """(B, S) position of each key, where these are not a cache's."""
    segment_ids: jax.Array | None = None
    """(B, T) document of each token; None: one document a row."""
    starts: jax.Array | None = None
    """(B,) tokens that the cache has of each row; None: there is no cache."""
    in_order: bool = False
    """Whether the kernels that know no positions may run, as in `attention`; known while tracing."""


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
    in_order: bool = False,
    kernel: str = "auto",
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
        in_order: promises that queries and keys are the same tokens, and that of any two tokens of a document
            positions and places in the row are equally far apart: what a kernel needs that knows no positions.
        kernel: one of `kernels.RUN`; auto: the fastest that can run this call.

    Raises:
        UserError: `kernel` cannot.

    Returns:
        (B, T, N, H), of q's type and sharding.
    """
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    split = sharding.num_shards("sequence") > 1
    in_order = in_order and not split  # the pieces of a split sequence change places
    if in_order:  # places in the row serve as positions, and XLA knows them: half of a mask's work, and sharper bounds
        q_positions = kv_positions = jax.lax.broadcasted_iota(
            jnp.int32, q_positions.shape, 1, out_sharding=sharding.spec("batch", "sequence")
        )
    call = kernels.Call(
        num_queries=q_BTNH.shape[1] // sharding.num_shards("sequence"),
        num_keys=k_BSKH.shape[1],
        head_dim=q_BTNH.shape[-1],
        value_dim=v_BSKH.shape[-1],
        dtype=str(q_BTNH.dtype),
        window=window,
        softcap=softcap,
        in_order=in_order,
        documents=segment_ids is not None,
        dropout=keep_BNTS is not None,
    )
    run = kernels.RUN[kernels.choose(call, kernels.this_machine(), kernel)]
    run = functools.partial(run, window=window, cap=softcap, scale=scale)

    if not sharding.has_mesh():
        segments = None if segment_ids is None else (segment_ids, segment_ids)
        return run(q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, segments, keep_BNTS)
    rows = sharding.spec("batch", "sequence")
    heads = sharding.spec("batch", "sequence", "heads", "head_dim")
    kv_heads = sharding.spec("batch", "sequence", "kv_heads", "head_dim")
    in_specs = (
        *(heads, kv_heads, kv_heads, rows, rows),
        P() if segment_ids is None else rows,
        P() if keep_BNTS is None else sharding.spec("batch", "heads", "sequence", "keys"),
    )

    def local(q_BTNH, k_BTKH, v_BTKH, q_positions, kv_positions, segment_ids, keep_BNTS):
        """Every device has some queries, and gets the keys and values of all (Llama 3, Dubey et al. 2024)."""

        def whole(x_BT: jax.Array) -> jax.Array:
            return jax.lax.all_gather(x_BT, sharding.TABLE["sequence"], axis=1, tiled=True) if split else x_BT

        segments = None if segment_ids is None else (segment_ids, whole(segment_ids))
        return run(q_BTNH, whole(k_BTKH), whole(v_BTKH), q_positions, whole(kv_positions), segments, keep_BNTS)

    # check_vma=False: jax 0.10.1 cannot check kernels whose output types carry no varying axes.
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)
    return mapped(q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, segment_ids, keep_BNTS)


def attention_to_cache(
    q_BTNH: jax.Array, cache: LayerCache, place: Placement, *, window: int | None, softcap: float
) -> jax.Array:
    """`attention` to all tokens of a cache, the queries' own among them; (B, T, N, H)."""
    T, S = q_BTNH.shape[1], cache.k_PSH.shape[1]

    def local(q_BTNH: jax.Array, cache: LayerCache, positions_BT: jax.Array, starts_B: jax.Array) -> jax.Array:
        places = positions_BT, key_positions(starts_B + T, S)
        if T <= MOST_FEW:
            return few_queries_attention(q_BTNH, cache, *places, window=window, cap=softcap)
        k_BSKH, v_BSKH = read(cache, len(q_BTNH), q_BTNH.dtype)
        call = kernels.Call(T, S, *(x.shape[-1] for x in (k_BSKH, v_BSKH)), str(q_BTNH.dtype), window, softcap)
        run = kernels.RUN[kernels.choose(call, kernels.this_machine())]
        scale = q_BTNH.shape[-1] ** -0.5
        return run(q_BTNH, k_BSKH, v_BSKH, *places, None, None, window=window, cap=softcap, scale=scale)

    return sharding.per_device(local, q_BTNH, cache, place.positions, place.starts)


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
        """Attend within `x`, or to the cache after writing x's keys and values into it.

        A cache that was empty, so that `x` is in order, is written and not read: all that it has is in `x`.
        """
        c = self.config
        B, T, D = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = self.queries_keys_values(x_BTD, place)
        if cache is not None:
            cache = write(cache, k_BTKH, v_BTKH, place.starts)
        if cache is not None and not place.in_order:
            out_BTNH = attention_to_cache(q_BTNH, cache, place, window=self.window, softcap=c.attention_softcap)
        else:
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
                in_order=place.in_order,
                kernel="auto" if cache is not None else c.attention_kernel,  # forced is what trains
            )
        out_sharding = sharding.spec("batch", "sequence", "heads")
        out_BTF = jnp.reshape(out_BTNH, (B, T, c.num_heads * c.resolved_head_dim), out_sharding=out_sharding)
        scale = multipliers(c)
        residual_std = c.initializer_std * scale.hidden_std * scale.ending_std * (2 * c.num_layers) ** -0.5
        return Linear(D, ("heads", "embed"), c.bias, residual_std, name="out")(out_BTF), cache

    def queries_keys_values(self, x_BTD: jax.Array, place: Placement) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, T, N, H), (B, T, K, H) and (B, T, K, H): projected, normalized and rotated as the switches ask."""
        c, (B, T, _) = self.config, x_BTD.shape
        H, scale = c.resolved_head_dim, multipliers(c)
        x_BTD = sharding.fan_out(x_BTD, "heads")

        def project(name: str, num_heads: int, axis: str) -> jax.Array:
            std = c.initializer_std * scale.hidden_std
            y = Linear(num_heads * H, ("embed", axis), c.resolved_qkv_bias, std, c.fp8, name=name)(x_BTD)
            out_sharding = sharding.spec("batch", "sequence", axis, "head_dim")
            return jnp.reshape(y, (B, T, num_heads, H), out_sharding=out_sharding)

        q_BTNH = project("q", c.num_heads, "heads")
        k_BTKH = project("k", c.resolved_num_kv_heads, "kv_heads")
        v_BTKH = project("v", c.resolved_num_kv_heads, "kv_heads")
        if c.qk_norm:
            norm = functools.partial(
                Norm, "rmsnorm", c.norm_epsilon, axis="head_dim", zero_centered=c.norm_zero_centered
            )
            q_BTNH, k_BTKH = norm(name="q_norm")(q_BTNH), norm(name="k_norm")(k_BTKH)
        if c.positions == "rope":
            local = self.window is not None
            turns = rotary_frequencies(c, local=local), rotary_factor(c, local=local)
            q_BTNH, k_BTKH = (rotate(x, place.positions, *turns) for x in (q_BTNH, k_BTKH))
        factor = scale.attention * (H / c.resolved_query_scale_dim) ** 0.5
        return scaled(q_BTNH, factor), k_BTKH, v_BTKH

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
