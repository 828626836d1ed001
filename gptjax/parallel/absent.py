"""Devices that are not here, for which XLA compiles all the same: its GPU and TPU compilers need none.

What JAX has no stable face for stands here: the names of TPU topologies, and the card that XLA's GPU compiler is told
of.
"""

import contextlib
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.experimental import topologies

from gptjax.errors import UserError
from gptjax.model.devices import Device

GPUS_OF_A_HOST = 8


class Card(NamedTuple):
    """What XLA's GPU compiler asks of a card.

    The figures are NVIDIA's: of data sheets, and of the table of compute capabilities in the CUDA programming guide.
    """

    cores: int
    """Streaming multiprocessors."""
    fpus_per_core: int
    shared_memory_per_block: int
    """Bytes, where a kernel asks for more than the usual 48 KiB."""
    shared_memory_per_core: int
    threads_per_core: int
    l2_bytes: int
    clock_ghz: float


CARDS = {
    "a100-40": Card(108, 64, 166912, 167936, 2048, 40 * 2**20, 1.41),
    "a100-80": Card(108, 64, 166912, 167936, 2048, 40 * 2**20, 1.41),
    "h100": Card(132, 128, 232448, 233472, 2048, 50 * 2**20, 1.98),
    "h200": Card(132, 128, 232448, 233472, 2048, 50 * 2**20, 1.98),
    "b200": Card(148, 128, 232448, 233472, 2048, 126 * 2**20, 1.965),
    "l4": Card(58, 128, 101376, 102400, 1536, 48 * 2**20, 2.04),
    "l40s": Card(142, 128, 101376, 102400, 1536, 96 * 2**20, 2.52),
    "rtx4090": Card(128, 128, 101376, 102400, 1536, 72 * 2**20, 2.52),
}
TPUS = {"tpu-v5e": ("v5e", 2), "tpu-v6e": ("v6e", 2), "tpu-v5p": ("v5p", 3)}
"""libtpu's name, and the dimensions of the torus that its chips form."""


def why_not(device: Device) -> str | None:
    """What keeps XLA's own compiler for a device from running here, with what to do about it; None: nothing."""
    if device.name in CARDS:
        extra, module = "cuda13", "jax_plugins.xla_cuda13"
    elif device.name in TPUS:
        extra, module = "tpu", "libtpu"
    else:
        known = ", ".join([*CARDS, *TPUS])
        return f"XLA's own compiler can be told of {known}, not of {device.name}"
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"XLA's compiler for {device.name} is not installed: pip install -e '.[{extra}]'"


def prepare() -> None:
    """Set what these compilers read of the environment; to be called before JAX is used."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # of Google's clouds, which would be asked where this machine stands
    # Nothing can be timed: of each product's forms XLA takes the one that it knows to be good.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    jax.config.update("jax_platforms", "cpu")


def devices(device: Device, count: int) -> list[jax.Device]:
    """So many devices of a kind, for `make_mesh`. Programs can be compiled for them, and not run.

    Raises:
        UserError: as `why_not`; or so many chips form no topology, or JAX is too old to know them.
    """
    if reason := why_not(device):
        raise UserError(reason)
    if device.name in CARDS:
        hosts, rest = divmod(count, GPUS_OF_A_HOST)
        if hosts and rest:
            raise UserError(
                f"--count {count} is no whole number of hosts with {GPUS_OF_A_HOST} GPUs; "
                f"{hosts * GPUS_OF_A_HOST} works"
            )
        shape = f"1x{hosts}x{GPUS_OF_A_HOST}" if hosts else f"1x1x{count}"
        named = {"platform": "cuda", "topology": shape, "target_config": _target(device)}
    else:
        name, dimensions = TPUS[device.name]
        shape = "x".join(map(str, _torus(count, dimensions)))
        named = {"platform": "tpu", "topology_name": f"{name}:{shape}"}
    try:
        with _silent():
            found = list(topologies.get_topology_desc(**named).devices)
    except Exception as error:  # the compiler's own, of many kinds, and those of a JAX that knows no such devices
        line = " ".join(str(error).split())
        raise UserError(f"JAX {jax.__version__} has no {count} × {device.name}, arranged {shape}: {line}") from error
    if len(found) != count:
        raise UserError(f"--count {count}: {device.name} has {len(found)} devices where chips are arranged {shape}")
    return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what libtpu writes about the cloud that this machine is not in."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _torus(count: int, dimensions: int) -> list[int]:
    """The most even way to arrange so many chips; all sides are powers of two.

    Raises:
        UserError: there is none.
    """
    if count & (count - 1):
        raise UserError(f"--count {count} is no power of two, as TPU slices are; {1 << (count.bit_length() - 1)} works")
    shape = [1] * dimensions
    while math.prod(shape) < count:
        shape[shape.index(min(shape))] *= 2
    return sorted(shape) if dimensions == 2 else sorted(shape, reverse=True)


def _target(device: Device) -> str:
    """A card as a text protocol buffer, which XLA calls a target configuration."""
    card, (major, minor) = CARDS[device.name], device.capability
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: {card.shared_memory_per_core}
          threads_per_core_limit: {card.threads_per_core}
          core_count: {card.cores}
          fpus_per_core: {card.fpus_per_core}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {device.bytes_per_second:.0f}
          l2_cache_size: {card.l2_bytes}
          clock_rate_ghz: {card.clock_ghz}
          device_memory_size: {device.memory_bytes:.0f}
          shared_memory_per_block_optin: {card.shared_memory_per_block}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 minor: 0 patch: 0 }}
        device_description_str: "{device.kinds[0]}"
    """
