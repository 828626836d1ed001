"""Two real processes that train as one, over Gloo on this machine: preempted, continued by one alone, refused.

Each process has two fake devices and a launch costs about ten seconds, so few are made, and one is looked at closely.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from gptjax import cli
from gptjax.training.metrics import METRICS_FILE

ROOT = Path(__file__).parent.parent
LOSSES = ("loss", "grad_norm", "learning_rate", "tokens", "val_loss", "val_bits_per_byte")

STEPS = 60
# Every dispatch is evaluated and saved, which takes long enough for a signal to come between two of them.
OPTIONS = f"--training.steps {STEPS} --training.steps-per-dispatch 2 --checkpoint.every-steps 2".split()
OPTIONS += "--training.eval-every-steps 2 --model.compute-dtype float32".split()


class Ended(NamedTuple):
    """A process that is over."""

    code: int
    out: str
    err: str


def environment(num_devices: int) -> dict[str, str]:
    """That of these tests, in which code need not be fast, but with another number of devices."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags += [f"--xla_force_host_platform_device_count={num_devices}"]
    # XLA's own chatter goes to the same stream as our errors.
    return os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


def start(folder: Path, *arguments: str, num_devices: int) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        *(command,), cwd=folder, env=environment(num_devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ends(process: subprocess.Popen, seconds: float = 120) -> Ended:
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in out + err, out + err
    return Ended(process.returncode, out, err)


def run_two(
    folder: Path, *arguments: str, options: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()), midway: Callable = list
) -> list[Ended]:
    """Two processes of two devices each, to their end.

    Args:
        options: what each process is given besides `arguments`.
        midway: gets both while they run.
    """
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    group = f"--distributed.coordinator localhost:{port} --distributed.num-processes 2 --distributed.timeout-seconds 60"
    processes = [
        start(folder, *arguments, *own, *group.split(), "--distributed.process-id", str(number), num_devices=2)
        for number, own in enumerate(options)
    ]
    try:
        midway(processes)
        return [ends(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def recorded(directory: Path) -> list[dict]:
    path = directory / METRICS_FILE
    # The last line may be half written while the run goes on.
    return [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"] if path.exists() else []


def saved(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def preempted(workplace) -> tuple[Path, list[Ended]]:
    """A run of two processes, of which the second was sent SIGTERM after the fifth step; and how they ended."""
    directory = workplace / "runs" / "two"

    def preempt(processes: list[subprocess.Popen]) -> None:
        while not any(record["step"] >= 5 for record in recorded(directory)):
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.005)
        processes[1].send_signal(signal.SIGTERM)

    arguments = ["tiny.py", *OPTIONS, "--mesh.fsdp", "2", "--run-dir", str(directory)]
    return directory, run_two(workplace, *arguments, midway=preempt)


def test_a_signal_to_one_process_stops_both_at_the_same_step(preempted):
    """Both save the step that they agree on, and exit so that a scheduler requeues them."""
    directory, ended = preempted
    assert [end.code for end in ended] == [cli.EXIT_PREEMPTED] * 2 == [75] * 2, ended
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["stopped"] == "preempted"
    assert 5 <= summary["step"] < STEPS
    assert saved(directory)[-1] == summary["step"]
    print(summary["step"], saved(directory), ended)


def test_the_first_process_alone_speaks(preempted):
    _, (first, second) = preempted
    assert "hosts: 2 processes on 1 host (flags), 4 devices: 2 + 2" in first.out
    assert "mesh data 2 × fsdp 2" in first.out
    assert "step  3/" in first.out
    assert (second.out, second.err) == ("", "")


def test_one_process_continues_the_run_of_two_with_the_losses_of_an_uninterrupted_one(preempted, workplace):
    """Batches, dropout, schedule and optimizer state are the run's, and not the processes' that it has just now."""
    directory, _ = preempted
    (step,) = saved(directory)[-1:]
    alone = workplace / "runs" / "alone"
    # Both at once: most of their time is starting up.
    undisturbed = start(workplace, "tiny.py", *OPTIONS, "--run-dir", str(alone), num_devices=1)
    continued = start(workplace, str(directory), num_devices=1)
    for end in (ends(continued), ends(undisturbed)):
        assert end.code == 0, end
