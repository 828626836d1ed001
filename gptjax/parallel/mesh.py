"""The device mesh: which devices share a batch, parameters and heads."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from gptjax.config import MeshConfig
from gptjax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with explicit axes `data`, `fsdp` and `tensor`, to be entered with `jax.set_mesh`.

    Axes of size one are kept, so that one program serves one device and many.

    Args:
        config: resolved axis sizes.
        devices: all of JAX's by default.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config.data, config.fsdp, config.tensor)
    size = config.data * config.fsdp * config.tensor
    if size != len(devices):
        raise UserError(
            f"mesh data {config.data} × fsdp {config.fsdp} × tensor {config.tensor} = {size} devices, "
            f"but there are {len(devices)}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def one_device_mesh() -> Mesh:
    """The mesh of the first local device, for sampling and notebooks."""
    return make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
