"""Drawing tokens from logits with two random numbers a row, not one for each token of the vocabulary.

Shape suffixes: B batch, C candidates, X blocks, Y candidates of a block.
"""

import jax
import jax.numpy as jnp

from gptjax.parallel import sharding
from gptjax.sampling.filters import Candidates

BLOCK = 128
"""Candidates of which one sum is made; at 50,000 tokens a cumulative sum over all takes six times as long."""


def draw(candidates: Candidates, keys_B: jax.Array) -> jax.Array:
    """One token a row, int32 (B,), by the softmax of the logits; never one that was removed.

    By inversion, first of the blocks' sums and then within the block, so that the rarest tokens of a large vocabulary
    are drawn as often as they should be, though a float32 random number has only 23 bits.
    """
    candidates = jax.tree.map(lambda x: sharding.reshard(x, "batch", "features"), candidates)
    return sharding.per_device(_draw, jax.vmap(jax.random.uniform, in_axes=(0, None))(keys_B, (2,)), candidates)[:, 0]


def _draw(uniform_B2: jax.Array, candidates: Candidates) -> jax.Array:
    logits_BC = candidates.logits_BC
    weights_BC = jnp.exp(logits_BC - logits_BC.max(axis=-1, keepdims=True))
    B, C = weights_BC.shape
    weights_BXY = jnp.pad(weights_BC, [(0, 0), (0, -C % BLOCK)]).reshape(B, -1, BLOCK)
    block_B = _invert(weights_BXY.sum(axis=-1), uniform_B2[:, 0])
    weights_BY = jnp.take_along_axis(weights_BXY, block_B[:, None, None], axis=1)[:, 0]
    return candidates.tokens(block_B * BLOCK + _invert(weights_BY, uniform_B2[:, 1]))[:, None]


def _invert(weights_BX: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first place that has weight and at which the cumulative share exceeds `uniform_B`."""
    sums_BX = jnp.cumsum(weights_BX, axis=-1)
    reached_BX = (weights_BX > 0) & (sums_BX > uniform_B[:, None] * sums_BX[:, -1:])
    # Where rounding lets no place exceed it, the heaviest takes what is left.
    return jnp.where(reached_BX.any(axis=-1), reached_BX.argmax(axis=-1), weights_BX.argmax(axis=-1))
