"""Accelerators: what their data sheets say of speed and memory. Only the standard library is imported."""

import difflib
from typing import NamedTuple

from gptjax.errors import UserError


class Device(NamedTuple):
    """One accelerator, or one that a user describes; None is what nobody has said."""

    name: str
    """As it is asked for: h200."""
    kinds: tuple[str, ...]
    """JAX's exact `device_kind`s."""
    flops: float | None
    """Dense bfloat16 products with float32 accumulation, per second."""
    bytes_per_second: float | None
    """Of its memory."""
    memory_bytes: float | None
    link: float | None = None
    """Bytes that arrive from others per second, over what connects devices of one host or slice."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability."""


DEVICES = (
    Device("a100-40", ("NVIDIA A100-SXM4-40GB",), 312e12, 1.555e12, 40e9, 300e9, (8, 0)),
    Device("a100-80", ("NVIDIA A100-SXM4-80GB",), 312e12, 2.039e12, 80e9, 300e9, (8, 0)),
    Device("a100-40-pcie", ("NVIDIA A100-PCIE-40GB",), 312e12, 1.555e12, 40e9),
    Device("a100-80-pcie", ("NVIDIA A100 80GB PCIe",), 312e12, 1.935e12, 80e9),
    Device("h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 3.35e12, 80e9, 450e9, (9, 0)),
    Device("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 2.0e12, 80e9),
    Device("h200", ("NVIDIA H200",), 989.4e12, 4.8e12, 141e9, 450e9, (9, 0)),
    Device("gh200", ("NVIDIA GH200 480GB",), 989.4e12, None, 96e9),
    Device("b200", ("NVIDIA B200",), 2250e12, 8.0e12, 180e9, 900e9, (10, 0)),
    Device("l4", ("NVIDIA L4",), 121e12, 0.3e12, 24e9, 32e9, (8, 9)),
    Device("l40s", ("NVIDIA L40S",), 362e12, 0.864e12, 48e9, 32e9, (8, 9)),
    Device("rtx3090", ("NVIDIA GeForce RTX 3090",), 71e12, 0.936e12, 24e9),
    Device("rtx4090", ("NVIDIA GeForce RTX 4090",), 165.2e12, 1.008e12, 24e9, 32e9, (8, 9)),
    Device("tpu-v4", ("TPU v4",), 275e12, 1.2e12, 32e9),
    Device("tpu-v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 0.819e12, 16e9, 200e9),
    Device("tpu-v5p", ("TPU v5", "TPU v5p"), 459e12, 2.765e12, 95e9, 600e9),
    Device("tpu-v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1.64e12, 32e9, 448e9),
)

_BY_KIND = {kind: device for device in DEVICES for kind in device.kinds}


def of_kind(device_kind: str) -> Device | None:
    """The device that JAX calls so exactly, or None."""
    return _BY_KIND.get(device_kind)


def named(name: str) -> Device:
    """
    Raises:
        UserError: the table does not know it; says what it knows, and how to describe another.
    """
    for device in DEVICES:
        if name.lower() == device.name:
            return device
    names = [device.name for device in DEVICES]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise UserError(
        f"no device {name} is known{hint} There are {', '.join(names)}; describe another with --peak-tflops, "
        "--memory-gb and --bandwidth (in GB/s)"
    )
