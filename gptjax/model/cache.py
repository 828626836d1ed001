"""The key/value cache: what a decoding loop carries from token to token.

A row keeps its tokens where their positions say: in the slot of that number or, in a layer with a window, of that
number modulo the slots of a ring. So rows of any lengths share a batch, and to take tokens back is to make a row
shorter.

Shape suffixes: B batch, T new tokens, S slots, K key/value heads, P pairs of a row and one of its heads, H head
dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.parallel import sharding
from gptjax.parallel.precision import compute_dtype

EMPTY = jnp.iinfo(jnp.int32).max
"""Position of a slot that holds no token: after every query, so that the causal mask hides it."""


class LayerCache(NamedTuple):
    """Keys and values of one layer; those of a row's head lie together, as attention reads them.

    Rows and heads are one dimension, of B · K pairs, as XLA's batched products have it anyway: in two, of which one has
    size 1, XLA:CPU copies the whole cache for each token. On a mesh each device has its own pairs side by side.
    """

    k_PSH: jax.Array
    """In the compute type, or int8 and to be multiplied with their scale."""
    v_PSH: jax.Array
    k_scale_PS: jax.Array | None = None
    """Float32; None: keys and values are what they are."""
    v_scale_PS: jax.Array | None = None


class Cache(NamedTuple):
    """Separate arrays for each layer, because a stacked one would be copied at every write."""

    layers: tuple[LayerCache, ...]
    lengths_B: jax.Array
    """Tokens of each row; the next one's position. What the slots hold beyond them is never seen."""


def empty_cache(
    config: ModelConfig, batch_size: int, num_slots: int, *, call_tokens: int = 1, in_int8: bool = False
) -> Cache:
    """A cache for `num_slots` tokens a row.

    Args:
        call_tokens: most tokens of one call of the model. A layer's ring holds its window and all but one of these,
            so that the first of them still sees its whole window when the last has been written.
        in_int8: whether keys and values are rounded to eight bits, with one scale for each token and head.
    """
    P, H = batch_size * config.resolved_num_kv_heads, config.resolved_head_dim
    dtype = jnp.int8 if in_int8 else compute_dtype(config)

    def layer(slots: int) -> LayerCache:
        def zeros() -> jax.Array:
            return sharding.reshard(jnp.zeros((P, slots, H), dtype), *LAYOUT)

        def scales() -> jax.Array | None:
            return sharding.reshard(jnp.zeros((P, slots)), *LAYOUT[:2]) if in_int8 else None

        return LayerCache(zeros(), zeros(), scales(), scales())

    layers = tuple(layer(ring_slots(window, num_slots, call_tokens)) for window in config.layer_windows)
    return Cache(layers, sharding.reshard(jnp.zeros(batch_size, jnp.int32), "batch"))


LAYOUT = ("row_heads", "keys", "head_dim")
"""Logical axes of keys and values; their scales have the first two."""


def ring_slots(window: int | None, num_slots: int, call_tokens: int) -> int:
    """Slots of a layer with this window (None: all tokens are seen) in a cache for `num_slots` tokens a row."""
    return num_slots if window is None else min(num_slots, window + call_tokens - 1)


def write(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, starts_B: jax.Array) -> LayerCache:
    """The cache with new keys and values of the tokens from position `starts_B` on.

    Raises:
        ValueError: more tokens than slots.
    """
    T, S = k_BTKH.shape[1], cache.k_PSH.shape[1]
    if T > S:
        raise ValueError(f"{T} tokens are more than the {S} slots of a layer's cache")

    def local(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, starts_B: jax.Array) -> LayerCache:
        K = k_BTKH.shape[2]
        slots_PT = jnp.repeat((starts_B[:, None] + jnp.arange(T)[None]) % S, K, axis=0)
        pairs_P1 = jnp.arange(len(slots_PT))[:, None]

        def put(old_PS: jax.Array, new_BTK: jax.Array) -> jax.Array:
            new_PT = new_BTK.swapaxes(1, 2).reshape(len(slots_PT), T, *new_BTK.shape[3:]).astype(old_PS.dtype)
            return old_PS.at[pairs_P1, slots_PT].set(new_PT, mode="promise_in_bounds", unique_indices=True)

        if cache.k_scale_PS is None:
            return LayerCache(put(cache.k_PSH, k_BTKH), put(cache.v_PSH, v_BTKH))
        (k_BTKH, k_scale), (v_BTKH, v_scale) = quantize(k_BTKH), quantize(v_BTKH)
        return LayerCache(*map(put, cache, (k_BTKH, v_BTKH, k_scale, v_scale)))

    return sharding.per_device(local, cache, k_BTKH, v_BTKH, starts_B)


def read(cache: LayerCache, num_rows: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values, (B, S, K, H), in slot order, of arrays of one device."""

    def one(x_PSH: jax.Array, scale_PS: jax.Array | None) -> jax.Array:
        x_PSH = x_PSH if scale_PS is None else x_PSH.astype(jnp.float32) * scale_PS[..., None]
        return x_PSH.astype(dtype).reshape(num_rows, -1, *x_PSH.shape[1:]).swapaxes(1, 2)

    return one(cache.k_PSH, cache.k_scale_PS), one(cache.v_PSH, cache.v_scale_PS)


def key_positions(ends_B: jax.Array, num_slots: int) -> jax.Array:
    """(B, S) position of the token in each slot, of rows that were written up to `ends_B`; EMPTY where there is none.

    Of the tokens that a slot has held it is the last. Where a row was made shorter than it was written, slots that have
    been overwritten in vain count as the older token of theirs; a ring is so long that no window reaches back to it.
    """
    slots_S = jnp.arange(num_slots)[None]
    last_B1 = ends_B[:, None] - 1
    positions_BS = last_B1 - (last_B1 - slots_S) % num_slots
    return jnp.where(positions_BS < 0, EMPTY, positions_BS)


def resize(config: ModelConfig, cache: Cache, num_slots: int, call_tokens: int = 1) -> Cache:
    """The cache with room for `num_slots` tokens a row, and rings for calls of `call_tokens`.

    Larger ones get empty slots; rings get smaller by what no call sees any more.
    """

    def layer(window: int | None, old: LayerCache) -> LayerCache:
        S_old, S = old.k_PSH.shape[1], ring_slots(window, num_slots, call_tokens)
        if S_old == S:
            return old
        if window is None:  # the slots of what is there stay the same
            more = max(0, S - S_old)
            return jax.tree.map(lambda x: jnp.pad(x[:, :S], [(0, 0), (0, more), (0, 0)][: x.ndim]), old)

        def local(old: LayerCache, lengths_B: jax.Array) -> LayerCache:
            positions_BS = key_positions(lengths_B, S)
            held_BS = (positions_BS < EMPTY) & (positions_BS >= lengths_B[:, None] - S_old)
            from_PS = jnp.repeat(jnp.where(held_BS, positions_BS % S_old, 0), len(old.k_PSH) // len(lengths_B), axis=0)
            return jax.tree.map(
                lambda x: jnp.take_along_axis(x, from_PS[..., None] if x.ndim == 3 else from_PS, axis=1), old
            )

        return sharding.per_device(local, old, cache.lengths_B)

    return Cache(tuple(map(layer, config.layer_windows, cache.layers)), cache.lengths_B)


def take_rows(cache: Cache, rows_B: jax.Array) -> Cache:
    """The cache of a batch of these rows, each as often as it is named: samples of one prompt share its prefill.

    Args:
        rows_B: laid out as the batch is to be.
    """
    axes = sharding.TABLE["batch"]

    def local(cache: Cache, rows_B: jax.Array) -> Cache:
        num_rows = len(cache.lengths_B)

        def take(x: jax.Array) -> jax.Array:
            x = x.reshape(num_rows, -1, *x.shape[1:])
            if sharding.has_mesh():  # any device may need any row
                x = jax.lax.all_gather(x, axes, tiled=True)
            x = x[rows_B]
            return x.reshape(-1, *x.shape[2:])

        return jax.tree.map(take, cache)

    return sharding.per_device(local, cache, rows_B)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 of `x` and, for each of its last dimension's rows, the scale that gives `x` back to within half of it."""
    scale = jnp.abs(x).max(axis=-1).astype(jnp.float32) / 127
    steps = x.astype(jnp.float32) / jnp.where(scale == 0, 1, scale)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale
