"""Settings of JAX's backends, which must be made before the first array. Only entry points call these."""

import ctypes
import hashlib
import logging
import os
import platform
import sys
from pathlib import Path

import absl.logging

DETERMINISTIC_GPU_FLAGS = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
"""Autotuning is off, too: it may choose another algorithm, with other rounding, in every process."""

GPU_FLAGS = {
    # Or products that share an input become one, whose result is cut apart again, by copies: 1.6 % of GPT-2's step.
    "--xla_gpu_dot_merger_threshold_mb": "0",
}
"""For every program on a GPU, but those that XLA_FLAGS names already; docs/performance.md has the measurements."""

NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
"""A GPU gets each kernel by itself: of those that are launched together, a trace knows no more than their sum."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h


def configure(*, deterministic: bool = False, profiled: bool = False) -> None:
    """Quiet XLA, keep compiled programs between processes, and set its flags: `GPU_FLAGS`, and those for kernels that
    are reproducible or traced one by one, if wanted.

    Compiled programs are kept in `JAX_COMPILATION_CACHE_DIR`, or in the user's cache folder.
    """
    # 3 and not 2: XLA calls it an error when a cached CPU program names tuning hints of the same machine.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_dir()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU's memory; by default a quarter lies idle
    _quiet_storage()
    _keep_freed_memory()
    given = os.environ.get("XLA_FLAGS", "")
    flags = [f"{name}={value}" for name, value in GPU_FLAGS.items() if name not in given]
    flags += [DETERMINISTIC_GPU_FLAGS] * deterministic + [NO_COMMAND_BUFFERS] * profiled
    os.environ["XLA_FLAGS"] = " ".join([given, *flags]).strip()


def pretend_devices(count: int) -> None:
    """Let JAX see `count` devices of the CPU and nothing else: to compile for many. Call it before a device is used."""
    import jax

    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
    )
    jax.config.update("jax_platforms", "cpu")


def _keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed, as it does small ones.

    XLA's CPU backend allocates a program's memory anew for each step; handed back to Linux in between, all of it is
    cleared and mapped again, page by page, which took a quarter of a small model's step. What a process has once used
    it keeps to its end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another libc
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # the greatest there is
    mallopt(_M_TOP_PAD, 64 * 2**20)  # the heap grows in strides


def _quiet_storage() -> None:
    """Let the one line stand alone that says why a checkpoint could not be saved.

    What Orbax logs as an error it raises as well, with pages of tracebacks; and writes that were under way then find
    their event loop closed, and print one each.
    """
    if sys.unraisablehook is not sys.__unraisablehook__:  # done already, or somebody else's
        return

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook
    # Not by its name: a logger that is there before absl is would not know from where it is called.
    absl.logging.get_absl_logger().addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


def _cache_dir() -> Path:
    """One folder per kind of processor: XLA's CPU programs use the instructions of the one they were compiled on."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "gptjax" / f"xla-{processor_fingerprint()}"


def processor_fingerprint() -> str:
    """Twelve hexadecimal digits that differ between processors with different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {processor}".encode()).hexdigest()[:12]
