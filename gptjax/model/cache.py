"""The key/value cache: what a decoding loop carries from token to token.

Shape suffixes: B batch, S slots, K key/value heads, H head dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.attention import LayerCache
from gptjax.parallel import sharding
from gptjax.parallel.precision import compute_dtype

EMPTY = jnp.iinfo(jnp.int32).max
"""Position of a slot that holds no token: after every query, so that the causal mask hides it."""


class Cache(NamedTuple):
    """Separate key and value arrays per layer, because a stacked one would be copied at every write.

    All rows write to the same slot, which keeps the write one contiguous update; a row's own positions
    are kept beside it, so that rows of different lengths share a batch.
    """

    layers: tuple[LayerCache, ...]
    positions_BS: jax.Array
    """Position of the token in each slot, or EMPTY."""
    slot: jax.Array
    """Number of slots that have been written, int32 scalar."""


def empty_cache(config: ModelConfig, batch_size: int, num_slots: int) -> Cache:
    """A cache for `num_slots` tokens a row in the model's compute type."""
    shape = (batch_size, num_slots, config.resolved_num_kv_heads, config.resolved_head_dim)

    def zeros() -> jax.Array:
        return sharding.reshard(jnp.zeros(shape, compute_dtype(config)), "batch", "sequence", "kv_heads", "head_dim")

    positions = sharding.reshard(jnp.full((batch_size, num_slots), EMPTY, jnp.int32), "batch", "sequence")
    layers = tuple(LayerCache(zeros(), zeros()) for _ in range(config.num_layers))
    return Cache(layers, positions, jnp.zeros((), jnp.int32))
