"""Runs to do things to: processes of their own on a small model and its text, and what they left behind."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
NUM_PROCESSES = 1
"""Of every run; `faults.py --processes` sets it."""
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
STEPS, EVERY = 400, 20
"""Of the undisturbed run and those that are to become like it, and between checkpoints."""
CONFIG = """
from gptjax.config import *
config = Config(
    model=ModelConfig(num_layers=2, model_dim=32, num_heads=4, context_length=32, compute_dtype="float32"),
    tokenizer=TokenizerConfig(vocab_size=300),
    data=DataConfig(path="corpus"),
    optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=20),
    training=TrainingConfig(
        steps=STEPS, batch_size=16, log_every_steps=1, eval_every_steps=40, sample_every_steps=0, sample_tokens=4,
        sample_prompt="the ",
    ),
    checkpoint=CheckpointConfig(every_steps=EVERY),
)
"""
COMPARED = ("step", "loss", "grad_norm", "val_loss")


class Row(NamedTuple):
    """What was found of one fault."""

    number: str
    fault: str
    tries: int
    survived: int
    figure: str


class Ended(NamedTuple):
    """A process that is over."""

    code: int
    output: str
    seconds: float


class Group:
    """Processes that are one run. A signal goes to the last of them, what is told comes from the first."""

    def __init__(self, processes: list[subprocess.Popen], outputs: list[IO[str]]):
        self.processes, self.outputs = processes, outputs
        self.pid = processes[0].pid

    def poll(self) -> int | None:
        """The status of the first that did not end well; None: one is still running."""
        codes = [process.poll() for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, timeout: float | None = None) -> int:
        for process in self.processes:
            process.wait(timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        self.processes[-1].send_signal(number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


def start(*command: Any, devices: int = 1, limit_bytes: int | None = None, processes: int = 1) -> Group:
    """This interpreter with such a command, so many devices for each process, and no larger files than this."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    limit = None if limit_bytes is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes,) * 2)
    # Files, because a pipe that nobody reads would stop the process.
    outputs = [tempfile.TemporaryFile("w+") for _ in range(processes)]  # noqa: SIM115
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    group = f"--distributed.coordinator localhost:{port} --distributed.num-processes {processes}".split()
    own = [[*group, "--distributed.process-id", number] if processes > 1 else [] for number in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, [*command, *arguments])],
            env=os.environ | ENVIRONMENT | {"XLA_FLAGS": flags},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=limit,
        )
        for arguments, output in zip(own, outputs, strict=True)
    ]
    return Group(started, outputs)


def begin(*arguments: Any, program: Path = ROOT / "train.py", **settings: Any) -> Group:
    """A run, of as many processes as the matrix is for."""
    return start(program, *arguments, **{"processes": NUM_PROCESSES} | settings)


def finish(group: Group, since: float | None = None) -> Ended:
    begun = time.monotonic() if since is None else since
    code = group.wait(timeout=600)
    seconds = time.monotonic() - begun
    group.outputs[0].seek(0)
    return Ended(code, group.outputs[0].read(), seconds)


def train(*arguments: Any, **settings: Any) -> Ended:
    begun = time.monotonic()
    return finish(begin(*arguments, **settings), begun)


def wait_for_step(run: Path, step: int, process: Group) -> None:
    """Until the run's metrics tell of this step.

    Raises:
        RuntimeError: the process ended before.
    """
    while not any(record["step"] >= step for record in records(run)[-1:]):
        if process.poll() is not None:
            raise RuntimeError(finish(process).output)
        time.sleep(0.01)


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> list[dict]:
    return [{name: record[name] for name in COMPARED if name in record} for record in records(run)]


def steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def state_sha256(run: Path, step: int, *mesh: Any) -> str:
    """Of all bytes of a checkpoint's arrays, as another process restores them onto a mesh, `--mesh.fsdp 2` say."""
    ended = finish(start(ROOT / "benchmarks" / "matrix" / "state_hash.py", run, step, *mesh, devices=8))
    if ended.code:
        raise RuntimeError(ended.output)
    return ended.output.split()[-1]


def whole(run: Path) -> bool:
    """Whether `python -m gptjax verify` finds nothing damaged."""
    return finish(start("-m", "gptjax", "verify", run)).code == 0


def fresh(base: Path, name: str) -> Path:
    """A copy of a finished run, which does not know that it is finished."""
    copy = Path(name)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base, copy)
    (copy / "summary.json").unlink()
    return copy


def refused(ended: Ended, *words: str) -> bool:
    """One line, status 2, and it says this."""
    error = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    return ended.code == 2 and len(error) == 1 and all(word in error[0] for word in words)
