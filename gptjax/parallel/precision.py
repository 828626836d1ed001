"""Which parameters are used in which type, and how exactly they are multiplied."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.resolve import default_compute_dtype

MATRICES = ("w", "head")
"""Names of the parameters that only enter matrix products. The others are used in float32: norms and
biases are small, and embedding rows are looked up in float32 for the sake of their gradient."""


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The type of activations; where the configuration leaves it open, the one that suits the default device."""
    return jnp.dtype(config.compute_dtype or default_compute_dtype(jax.default_backend()))


def precision(x: jax.Array) -> jax.lax.Precision | None:
    """Float32 means float32: by default GPUs and TPUs would multiply it with 10 or fewer bits of mantissa."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def compute_copy(params: Any, dtype: jnp.dtype, names: Collection[str] = MATRICES) -> Any:
    """The parameters with all matrices in the compute type, cast once and used many times: to evaluate and to decode.

    Training has no use for it: gradients would come out in the compute type, too.

    Args:
        names: parameters to cast, by the last part of their name.
    """

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if path[-1].key in names else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
