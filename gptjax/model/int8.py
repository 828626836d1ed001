"""Weights in eight bits, for decoding, which is bound by how fast weights can be read.

Each output has one scale: the product is computed with the rounded numbers as they are, and scaled after. Activations
keep their type.

Shape suffixes: D inputs, F outputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Int8(NamedTuple):
    """A matrix as whole numbers from -127 to 127 times a scale for each of its outputs."""

    values: jax.Array
    """int8, in the matrix's shape and layout."""
    scale: jax.Array
    """Float32, one for each element of the dimension that is not summed over."""


def quantize(w: jax.Array, axis: int) -> Int8:
    """A matrix rounded to the nearest steps.

    Args:
        axis: dimension that products sum over, or that a look-up returns whole.
    """
    w = w.astype(jnp.float32)
    scale = jnp.abs(w).max(axis=axis, keepdims=True) / 127
    values = jnp.round(w / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return Int8(values, jnp.squeeze(scale, axis))
