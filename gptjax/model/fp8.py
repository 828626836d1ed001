"""Operands of matrix products in eight bits, each tensor with one scale of its own.

Tensor cores of Ada, Hopper and later multiply such numbers at twice the rate of bfloat16. Nothing here calls them: a
product of two dequantized tensors is the form that XLA's GPU compiler knows and hands to cuBLASLt as one product of
eight-bit numbers, scales and all (its `gemm_rewriter` matches `dot(convert(a8) · s, convert(b8) · t)`). Anywhere else
the same lines compute the same result, in the type that they name.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.errors import UserError
from gptjax.parallel import sharding

E4M3 = jnp.float8_e4m3fn
"""Of activations and weights: steps of 1/8 to 1/16 of a number, largest 448, smallest 2⁻⁹."""
E5M2 = jnp.float8_e5m2
"""Of gradients, which need range more than precision: steps of 1/4 to 1/8, largest 57,344, smallest 2⁻¹⁶."""
_LEAST_MAXIMUM = 2.0**-100
"""What is smaller counts as this, zeros above all, so that no scale is infinite."""
_EXPONENT_BITS = 0x7F800000


@functools.partial(jax.tree_util.register_dataclass, data_fields=("bits", "scale"), meta_fields=("dtype",))
@dataclass(frozen=True)
class Scaled:
    """A tensor, as eight-bit numbers times a scale."""

    bits: jax.Array
    """The numbers' bytes, with the tensor's shape and sharding. As numbers, what `jax.checkpoint` keeps of them on a
    mesh is NaN on XLA's CPU backend (jax 0.10.1, 0.12.0.1), which also sends them as float16."""
    scale: jax.Array
    """A float32 number, a power of two."""
    dtype: Any
    """E4M3 or E5M2."""


def quantize(x: jax.Array, dtype: Any) -> Scaled:
    """`x` in eight bits, scaled so that its largest element, over all devices, is in the upper half of the range.

    The scale follows this very tensor: no state, no history. It is a power of two, which rounds nothing and is exact in
    bfloat16; the last factor of two of the range would not make a floating-point number more precise.
    A tensor that is not finite comes back not finite.
    """
    x, restore = sharding.unmark(x)
    maximum = jnp.maximum(jnp.abs(x).max().astype(jnp.float32), _LEAST_MAXIMUM)
    ratio_bits = jax.lax.bitcast_convert_type(float(jnp.finfo(dtype).max) / maximum, jnp.int32)
    up = jax.lax.bitcast_convert_type(ratio_bits & _EXPONENT_BITS, jnp.float32)
    values = (x.astype(jnp.float32) * up).astype(dtype)
    return Scaled(restore(jax.lax.bitcast_convert_type(values, jnp.uint8)), 1.0 / up, dtype)


def dequantize(x: Scaled, dtype: Any) -> jax.Array:
    """The tensor in a type to calculate in."""
    bits, restore = sharding.unmark(x.bits)
    values = jax.lax.bitcast_convert_type(bits, x.dtype)
    return restore(values.astype(dtype) * x.scale.astype(dtype))


def require_hardware(device: jax.Device) -> None:
    """
    Raises:
        UserError: the device does not multiply eight-bit numbers, and would only round to them.
    """
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    try:
        suffices = tuple(map(int, str(capability).split("."))) >= (8, 9)
    except ValueError:  # no number: not NVIDIA's
        suffices = False
    if not suffices:
        raise UserError(
            f"model.fp8 needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper and later), but this is "
            f"{device.device_kind}{f' with {capability}' if capability else ''}; --model.no-fp8 computes in "
            "model.compute_dtype"
        )
