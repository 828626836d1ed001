"""`python -m gptjax env`: what a bug report needs."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax import cli

OPTIONAL = (  # as they are imported
    *("pyarrow", "huggingface_hub", "matplotlib", "tensorboardX", "wandb", "trackio"),
    *("fastapi", "lm_eval", "torch", "transformers"),
)
SHOWN_VARIABLES = ("XLA_", "JAX_", "TF_CPP_", "CUDA_VISIBLE_DEVICES", "LIBTPU_", "NCCL_", "OMP_NUM_THREADS")
"""Beginnings of the environment variables that are shown: they change what is computed, and hold no secrets."""


@dataclass(frozen=True)
class EnvArguments:
    """What `python -m gptjax env` was asked for."""

    json: str | None = None
    """File for everything as one JSON object; - is standard output. None: plain text."""


def main(arguments: Sequence[str]) -> int:
    """Print versions, devices and settings, for a bug report."""
    import tyro

    parsed = tyro.cli(EnvArguments, args=arguments, prog="python -m gptjax env", description=main.__doc__)
    cli.check_output("--json", parsed.json)
    found = collect()
    if parsed.json is not None:
        cli.write_json(parsed.json, found)
        return 0
    for title, values in found.items():
        print(title)
        for name, value in values.items():
            nothing = "missing" if title == "optional packages" else "unknown"
            print(f"  {name}: {nothing if value is None else value}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Everything that is shown, by section; None is unknown, and of an optional package that it is missing."""
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(SHOWN_VARIABLES)}

    from gptjax.parallel import platform as backend

    backend.configure()
    sections = {
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": _memory_bytes(),
        }
    }
    try:
        sections |= _jax()
    except Exception as error:  # a broken installation is what a report may be about
        sections["jax"] = {"broken": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return sections | {
        "optional packages": {name: _version(name) for name in OPTIONAL},
        "settings": {"compilation_cache": os.environ["JAX_COMPILATION_CACHE_DIR"]} | variables,
    }


def _jax() -> dict[str, dict[str, Any]]:
    import jax

    from gptjax.model.accounting import peak_flops
    from gptjax.training.run_dir import environment

    known = environment()
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    return {
        "versions": known["versions"],
        "source": known["source"],
        "devices": {
            "kind": device.device_kind,
            "count": jax.device_count(),
            "platform": device.platform,
            "backend": " ".join(str(device.client.platform_version).split()),
            "memory_bytes": memory.get("bytes_limit"),
            "peak_bfloat16_flops": peak_flops(device.device_kind, "bfloat16"),
        },
    }


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
