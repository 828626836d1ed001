"""The one table that says which mesh axis splits which dimension. Nothing else knows the mesh.

Modules name the logical axes of their arrays; `spec` looks them up. Without a mesh (a notebook on
one device) every function here does nothing.
"""

import math

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

TABLE: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": None,
    "stack": None,  # leading dimensions: steps of a dispatch, accumulated micro-batches
    "embed": "fsdp",  # model_dim of a stored parameter; gathered when the parameter is used
    "features": None,  # model_dim of an activation, or of a gathered parameter
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "vocab": "tensor",
}


def spec(*axes: str) -> P | None:
    """The partition of an array whose dimensions have these logical axes; None without a mesh.

    Raises:
        ValueError: two dimensions would be split over one mesh axis.
    """
    entries = [TABLE[axis] for axis in axes]
    used = [name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {used}")
    return P(*entries) if has_mesh() else None


def has_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def batch_shards() -> int:
    """Pieces that the current mesh cuts a batch into."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in TABLE["batch"]) if has_mesh() else 1


def reshard(x: jax.Array, *axes: str) -> jax.Array:
    """`x` laid out by these logical axes; the collective it takes is the compiler's choice."""
    target = spec(*axes)
    return x if target is None else jax.sharding.reshard(x, target)


def gather(parameter: jax.Array, *axes: str) -> jax.Array:
    """A parameter as it is used: whole along `embed`, along which `fsdp` stores it in pieces."""
    return reshard(parameter, *("features" if axis == "embed" else axis for axis in axes))


def put_batch(tokens: np.ndarray) -> jax.Array:
    """Token ids (..., B, T) from the host, with B split over the batch axes of the current mesh."""
    target = spec(*["stack"] * (tokens.ndim - 2), "batch", "sequence")
    return jax.device_put(tokens, None if target is None else jax.NamedSharding(jax.sharding.get_mesh(), target))
