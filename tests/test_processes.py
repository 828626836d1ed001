"""Two real processes that train as one, over Gloo on this machine: preempted, continued by one alone, refused.

Each process has two fake devices and a launch costs about ten seconds, so few are made, and one is looked at closely.
"""

import json
import os
import re
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
HOST = socket.gethostname()
# What Gloo says on standard output, from C++ and from several threads at once, so that its lines run into each other.
GLOO = {*"Gloo Rank is connected to peer ranks Expected number of connected peer ranks is".split()}

STEPS, ENOUGH = 48, 3
# Evaluations make steps so long that a signal, which JAX looks for once a second, comes well before the end.
OPTIONS = f"--training.steps {STEPS} --training.eval-every-steps 1 --checkpoint.every-steps 2".split()
# At tiny.py's rate this smaller model has a spike in its gradient, which makes rounding visible: 3e-5 in the loss.
OPTIONS += "--model.compute-dtype float32 --model.num-layers 1 --optimizer.peak-learning-rate 3e-3".split()


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


def start(folder: Path, *command: str, num_devices: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment(num_devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
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
        start(
            folder,
            str(ROOT / "train.py"),
            *arguments,
            *own,
            *group.split(),
            "--distributed.process-id",
            str(number),
            num_devices=2,
        )
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
    """A run of two processes, of which the second was sent SIGTERM after some steps; and how they ended."""
    directory = workplace / "runs" / "two"

    def preempt(processes: list[subprocess.Popen]) -> None:
        while not any(record["step"] >= ENOUGH for record in recorded(directory)):
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.005)
        processes[1].send_signal(signal.SIGTERM)

    arguments = ["tiny.py", *OPTIONS, "--mesh.fsdp", "2", "--run-dir", str(directory)]
    return directory, run_two(workplace, *arguments, midway=preempt)


def test_a_signal_to_one_process_stops_both_at_the_same_step(preempted):
    """Both save the step that they agree on, and exit so that a scheduler requeues them."""
    directory, ended = preempted
    assert [end.code for end in ended] == [cli.EXIT_OF["preempted"]] * 2 == [75] * 2, ended
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["stopped"] == "preempted"
    assert ENOUGH <= summary["step"] < STEPS
    assert saved(directory)[-1] == summary["step"] == recorded(directory)[-1]["step"]
    first, second = [end.out for end in ended]
    assert "hosts: 2 processes on 1 host (flags), 4 devices: 2 + 2" in first
    assert "mesh data 2 × fsdp 2" in first
    assert f"step  {ENOUGH}/{STEPS}" in first
    assert set(re.findall("[A-Za-z]+", second)) <= GLOO, "the first process alone speaks"
    assert [end.err for end in ended] == ["", ""]


def test_one_process_continues_the_run_of_two_with_the_losses_of_an_undisturbed_one(preempted, workplace):
    """Batches, dropout, schedule and optimizer state are the run's, and not its processes'."""
    directory, _ = preempted
    stopped, before = saved(directory)[-1], len(recorded(directory))
    alone = workplace / "runs" / "alone"
    commands = [
        ["tiny.py", *OPTIONS, "--checkpoint.every-steps", "0", "--run-dir", str(alone)],
        [str(directory), "--checkpoint.every-steps", "0"],
    ]
    # One after the other in one process: most of a run's time here is starting up and compiling.
    code = f"import train\nassert [train.main(command) for command in {commands}] == [0, 0]"
    end = ends(start(workplace, "-c", code, num_devices=1))
    assert end.code == 0, end
    assert f"training: steps {stopped} to {STEPS} of 16 sequences" in end.out
    assert "devices: 1 × cpu, mesh data 1 × fsdp 1" in end.out
    assert len(recorded(directory)) > before
    for name in ("loss", "val_loss"):
        ours, theirs = ({r["step"]: r[name] for r in recorded(run) if name in r} for run in (directory, alone))
        assert sorted(ours) == list(range(1, STEPS + 1))
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_processes_of_different_configurations_are_refused(workplace):
    """Both hear in one line what differs, before there is a run."""
    directory = workplace / "runs" / "differing"
    seeds = (("--training.seed", "3"), ("--training.seed", "4"))
    for end in run_two(workplace, "tiny.py", "--run-dir", str(directory), options=seeds):
        assert end.code == cli.EXIT_USER_ERROR == 2, end
        expected = f"error: process 1 on {HOST} has configuration.training.seed 4, process 0 on {HOST} 3\n"
        assert (end.out, end.err) == ("", expected)
    assert not directory.exists()
