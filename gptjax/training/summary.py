"""What is left to say when a run ends: `summary.json`."""

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import jax

from gptjax.errors import UserError
from gptjax.training.ledger import Ledger
from gptjax.training.metrics import METRICS_FILE, read_metrics
from gptjax.training.run_dir import SUMMARY_FILE
from gptjax.training.schedule import Progress


def summarize(directory: Path, stopped: str, progress: Progress, ledger: Ledger, parameters: int) -> dict[str, Any]:
    """The last values of a run's metrics and what it cost.

    Args:
        stopped: why the run ended: `finished`, `preempted`, `interrupted`, `diverged` or `corrupted`.
    """
    path = directory / METRICS_FILE
    records = read_metrics(path) if path.exists() else []  # a run may end before its first line

    def last(name: str) -> Any:
        return next((record[name] for record in reversed(records) if record.get(name) is not None), None)

    seconds = ledger.seconds  # once, for time goes on
    speeds = sorted(record["tokens_per_second"] for record in records if record.get("tokens_per_second"))
    utilizations = sorted(record["mfu"] for record in records if record.get("mfu"))
    return {
        "final_loss": last("loss"),
        "val_loss": last("val_loss"),
        "val_bits_per_byte": last("val_bits_per_byte"),
        "val_perplexity": last("val_perplexity"),
        "parameters": parameters,
        "step": progress.step,
        "tokens": progress.tokens,
        "skipped_steps": last("skipped_steps"),
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "mfu": utilizations[len(utilizations) // 2] if utilizations else None,
        "wall_seconds": sum(seconds.values()),
        "productive_seconds": seconds["step"] + seconds["data"] + seconds["rollout"],
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "stopped": stopped,
    }


def read_summary(directory: Path) -> dict[str, Any] | None:
    """A run's summary, or None where it has not ended yet.

    Raises:
        UserError: it is damaged.
    """
    path = directory / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if summary is not None and not {"stopped", "step"} <= set(summary):
            raise ValueError("it says neither why the run ended nor where")
        return summary
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not JSON: {error}; delete it, and it is written again") from error


def peak_memory_bytes() -> int | None:
    """Most memory used so far: of the fullest local device, or of this process where the device is the CPU.

    Linux says in /proc what a process has had since its program began; what getrusage says begins with the most that
    the process had which started it.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
        return max((peak for peak in peaks if peak is not None), default=None)
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
