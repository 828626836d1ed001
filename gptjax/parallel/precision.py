"""Which parameters are used in which type."""

from typing import Any

import jax
import jax.numpy as jnp

CAST = ("w", "head")
"""Names of the parameters that only enter matrix products. The others are used in float32: norms and
biases are small, and embedding rows are looked up in float32 for the sake of their gradient."""


def compute_copy(params: Any, dtype: Any) -> Any:
    """The parameters with all matrices in the compute type, cast once and used many times.

    Gradients with respect to this copy are those with respect to the parameters.
    """

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.dtype(dtype)) if path[-1].key in CAST else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
