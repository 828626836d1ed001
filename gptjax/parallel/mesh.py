"""The device mesh: which devices share a batch, parameters, sequences and heads."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from gptjax.config import MeshConfig
from gptjax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
"""From what talks least to what talks most: neighbours in the list of devices are neighbours in the last axis."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with explicit axes, to be entered with `jax.set_mesh`.

    Axes of size one are kept, so that one program serves one device and many.

    Args:
        config: axis sizes; `fsdp` and `tensor` left open are 1.
        devices: all of JAX's by default.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config.data, config.fsdp or 1, config.context, config.tensor or 1)
    size = shape[0] * shape[1] * shape[2] * shape[3]
    if size != len(devices):
        named = " × ".join(f"{axis} {length}" for axis, length in zip(AXES, shape, strict=True))
        are = "are" if len(devices) > 1 else "is"
        raise UserError(f"mesh {named} = {size} devices, but there {are} {len(devices)}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def one_device_mesh() -> Mesh:
    """The mesh of the first local device, for sampling and notebooks."""
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
