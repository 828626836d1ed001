"""The one table that says which mesh axis splits which dimension. Nothing else knows the mesh.

Modules name the logical axes of their arrays; `spec` looks them up. Without a mesh (a notebook on
one device) every function here does nothing.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

TABLE: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": "context",  # tokens of an activation
    "keys": None,  # tokens that attention looks at: each device needs those of the whole sequence
    "positions": None,  # rows of a table of positions
    "stack": None,  # leading dimensions: steps of a dispatch, accumulated micro-batches
    "embed": ("fsdp", "context"),  # model_dim of a stored parameter; gathered when the parameter is used
    "features": None,  # model_dim of an activation, or of a gathered parameter
    "heads": "tensor",
    "kv_heads": "tensor",
    "row_heads": ("data", "fsdp", "tensor"),  # of a cache: each device's rows times its key/value heads
    "head_dim": None,
    "ffn": "tensor",
    "vocab": "tensor",
    "rank": None,  # of adapters
}

_whole_sequences = contextvars.ContextVar("whole_sequences", default=False)


@contextlib.contextmanager
def whole_sequences() -> Iterator[None]:
    """Sequences are not split in what is traced inside: decoding adds one token at a time, to all devices' caches."""
    token = _whole_sequences.set(True)
    try:
        yield
    finally:
        _whole_sequences.reset(token)


def spec(*axes: str) -> P | None:
    """The partition of an array whose dimensions have these logical axes; None without a mesh.

    Raises:
        ValueError: two dimensions would be split over one mesh axis.
    """
    entries = [None if axis == "sequence" and _whole_sequences.get() else TABLE[axis] for axis in axes]
    used = [name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {used}")
    return P(*entries) if has_mesh() else None


def has_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def num_shards(axis: str) -> int:
    """Pieces that the current mesh cuts a dimension of this logical axis into."""
    entry = (spec(axis) or (None,))[0]
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def reshard(x: jax.Array, *axes: str) -> jax.Array:
    """`x` laid out by these logical axes; the collective it takes is the compiler's choice."""
    target = spec(*axes)
    return x if target is None else jax.sharding.reshard(x, target)


def gather(parameter: jax.Array, *axes: str) -> jax.Array:
    """A parameter as it is used: whole along `embed`, along which `fsdp` stores it in pieces."""
    return reshard(parameter, *("features" if axis == "embed" else axis for axis in axes))


def partial_sums(*axes: str) -> P | None:
    """The partition of a parameter's gradient that each device has summed over its own tokens only."""
    whole, tokens = spec(*("features" if axis == "embed" else axis for axis in axes)), spec("batch", "sequence")
    return None if whole is None else P(*whole, unreduced=set(jax.tree.leaves(tuple(tokens))))


def as_partial_sums(x: jax.Array, *axes: str) -> jax.Array:
    """`x`, laid out by these axes, as the sum of what devices hold of such a gradient."""
    target = partial_sums(*axes)
    return x if target is None else jax.sharding.reshard(x, target)


def join_tokens(x_BTD: jax.Array) -> jax.Array:
    """(B · T, D), split over tokens as the batch was, also where that is one row, in which JAX would not see it."""
    shape = (x_BTD.size // x_BTD.shape[-1], x_BTD.shape[-1])
    if not has_mesh():
        return x_BTD.reshape(shape)
    before = jax.typeof(x_BTD).sharding.spec
    tokens = tuple(jax.tree.leaves(tuple(spec("batch", "sequence"))))
    after = P(tokens, _entries(before)[-1], reduced=before.reduced, unreduced=before.unreduced)
    return jnp.reshape(x_BTD, shape, out_sharding=after)


def _entries(layout: P) -> tuple:
    """What splits each dimension, without marks: jax 0.10 has no `partitions`, 0.12 refuses to be read otherwise."""
    return tuple(getattr(layout, "partitions", layout))


def fan_out(x_BTD: jax.Array, axis: str) -> jax.Array:
    """An activation that several products take, whose results are split along `axis`.

    Their gradients are added on each device before devices add theirs up: one collective, where each product would
    have its own.
    """
    if num_shards(axis) == 1:
        return x_BTD
    target = spec("batch", "sequence", "features")
    return jax.sharding.reshard(x_BTD, P(*target, reduced={TABLE[axis]}))


def unmark(x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """`x` without the mark of `fan_out`, with which JAX lets nothing be computed, and what puts the mark back."""
    layout = jax.typeof(x).sharding.spec
    if not layout.reduced:
        return x, lambda y: y
    return jax.sharding.reshard(x, P(*_entries(layout))), lambda y: jax.sharding.reshard(y, layout)


def per_device(function: Callable[..., Any], like: Any, *arguments: Any) -> Any:
    """`function(like, *arguments)` of what each device has of them, giving arrays that are laid out as `like`.

    For what treats rows and heads alone, in steps through which JAX does not follow their layout.
    """
    if not has_mesh():
        return function(like, *arguments)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (like, *arguments))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(like, *arguments)


def pick(x: jax.Array, column: jax.Array) -> jax.Array:
    """Of each row, the last dimension, the number in this column; each device looks in the columns that it has.

    Args:
        x: (..., V), laid out in any way.
        column: (...), each of 0 to V - 1.
    """
    if not has_mesh():
        return _picked(x, column)
    layout = jax.typeof(x).sharding.spec
    *rows, split = _entries(layout)
    names = (split,) if isinstance(split, str) else split or ()
    names = tuple(name for name in names if jax.sharding.get_abstract_mesh().shape[name] > 1)

    def local(x: jax.Array, column: jax.Array) -> jax.Array:
        if not names:
            return _picked(x, column)
        column -= jax.lax.axis_index(names) * x.shape[-1]
        return jax.lax.psum(jnp.where((column >= 0) & (column < x.shape[-1]), _picked(x, column), 0), names)

    rows = P(*rows)
    in_specs = layout, rows
    # Not checked: what is on one device along an axis would have to be told to be the same on all.
    return jax.shard_map(local, in_specs=in_specs, out_specs=rows, check_vma=False)(
        x, jax.sharding.reshard(column, rows)
    )


def _picked(x: jax.Array, column: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, column[..., None], axis=-1, mode="clip")[..., 0]


def map_layers(function: Callable[[jax.Array], jax.Array], stack_LDF: jax.Array) -> jax.Array:
    """`function` of stacked matrices, of which it needs each whole, while `fsdp` and `tensor` keep them in pieces.

    All devices of the mesh share the layers out, and get each its own whole; where layers are fewer than devices some
    work on nothing. No device ever holds more than its share of the stack.

    Args:
        function: of (any number of layers, D, F), of the same shape; treats each layer alone, and zeros as well.
    """
    if not has_mesh():
        return function(stack_LDF)
    mesh = jax.sharding.get_abstract_mesh()
    layout = _entries(jax.typeof(stack_LDF).sharding.spec)
    splits = [(dimension, entry) for dimension, entry in enumerate(layout) if entry is not None]
    split = jax.tree.leaves([entry for _, entry in splits])
    copies = tuple(name for name, size in mesh.shape.items() if size > 1 and name not in split)
    L, n = len(stack_LDF), mesh.size

    def local(pieces_LDF: jax.Array) -> jax.Array:
        x_LDF = jnp.pad(pieces_LDF, ((0, -L % n), (0, 0), (0, 0)))
        if copies:
            share = len(x_LDF) // math.prod(mesh.shape[name] for name in copies)
            x_LDF = jax.lax.dynamic_slice_in_dim(x_LDF, jax.lax.axis_index(copies) * share, share)
        for dimension, entry in splits:
            x_LDF = jax.lax.all_to_all(x_LDF, entry, split_axis=0, concat_axis=dimension, tiled=True)
        x_LDF = function(x_LDF)
        for dimension, entry in reversed(splits):
            x_LDF = jax.lax.all_to_all(x_LDF, entry, split_axis=dimension, concat_axis=0, tiled=True)
        return (jax.lax.all_gather(x_LDF, copies, tiled=True) if copies else x_LDF)[:L]

    spec = P(*layout)
    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(stack_LDF)


def balance(x: jax.Array, axis: int = 1) -> jax.Array:
    """Tokens in the order in which the `context` axis splits them, so that all its devices work alike.

    Each of n devices gets two pieces of 2n, the i-th from the front and the i-th from the end: under the causal mask
    all see the same number of keys (zigzag, Llama 3, Dubey et al. 2024). Without such an axis nothing changes.

    Args:
        x: whole along `axis`.
    """
    n = num_shards("sequence")
    if n == 1:
        return x
    pieces = jnp.split(x, 2 * n, axis=axis)
    return jnp.concatenate([piece for i in range(n) for piece in (pieces[i], pieces[2 * n - 1 - i])], axis=axis)


def unbalance(x: jax.Array, axis: int = 1) -> jax.Array:
    """The reverse of `balance`.

    Args:
        x: whole along `axis`.
    """
    n = num_shards("sequence")
    if n == 1:
        return x
    pieces = jnp.split(x, 2 * n, axis=axis)
    return jnp.concatenate([*pieces[::2], *pieces[::-2]], axis=axis)


def local_rows(num_rows: int) -> np.ndarray:
    """Which rows of a batch of `num_rows` the devices of this process hold, in order: all that it needs to read."""
    target = spec("batch")
    if target is None:
        return np.arange(num_rows)
    return _addressable_rows(jax.NamedSharding(jax.sharding.get_mesh(), target), num_rows)


@functools.cache  # every step asks
def _addressable_rows(layout: jax.NamedSharding, num_rows: int) -> np.ndarray:
    rows = np.arange(num_rows)
    held = layout.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([rows[index] for index in held]))


def put_batch(values: np.ndarray, num_rows: int | None = None, lead: int | None = None) -> jax.Array:
    """Token ids (..., B, T), or what else there is of rows, from the host, with B split over the mesh's batch axes.

    Args:
        values: whole, or of several processes each one's `local_rows`.
        num_rows: B; None: `values` has them all.
        lead: dimensions before B; None: all but two.
    """
    lead = values.ndim - 2 if lead is None else lead
    target = spec(*["stack"] * lead, "batch", *["keys"] * (values.ndim - lead - 1))
    if target is None:
        return jax.device_put(values)
    layout = jax.NamedSharding(jax.sharding.get_mesh(), target)
    if layout.is_fully_addressable:
        return jax.device_put(values, layout)
    num_rows = values.shape[lead] if num_rows is None else num_rows
    rows = local_rows(num_rows)

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[lead].indices(num_rows)
        held = slice(np.searchsorted(rows, first), np.searchsorted(rows, last))
        return values[(slice(None),) * lead + (held,)]

    return jax.make_array_from_callback((*values.shape[:lead], num_rows, *values.shape[lead + 1 :]), layout, piece)
