"""Kill a run again and again, continue it each time, and compare it with one that nothing disturbed.

`python benchmarks/kills.py --kills 10` prints a line for every kill and, last, whether every loss, gradient
norm and evaluation of the two runs is equal to the last bit. It exits with 1 where one is not.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPTIONS = [
    *("--training.steps", "240", "--training.log-every-steps", "1", "--checkpoint.every-steps", "10"),
    *("--training.eval-every-steps", "40", "--training.eval-sequences", "64"),
    *("--training.sample-every-steps", "120", "--training.sample-tokens", "16"),
]
COMPARED = ("step", "tokens", "loss", "grad_norm", "learning_rate", "val_loss", "val_bits_per_byte")


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: record[name] for name in COMPARED if name in record} for record in map(json.loads, lines)]


def kill_after(process: subprocess.Popen, num_steps: int, delay_seconds: float) -> tuple[str, str]:
    """SIGKILL a run so many steps after its start; say where it began and what it had reached."""
    began = reached = "nothing"
    seen = 0
    for line in process.stdout:
        if line.startswith("training: steps"):
            began = line.split()[2]
        if line.startswith("step "):
            reached = line.split()[1]
            seen += 1
        if seen >= num_steps:
            break
    time.sleep(delay_seconds)
    process.kill()
    process.communicate()
    return began, reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = start(folder, *OPTIONS, "--run-dir", "undisturbed")
        output, _ = undisturbed.communicate()
        if undisturbed.returncode:
            sys.exit(output)
        for kill in range(1, arguments.kills + 1):
            resumed = (folder / "killed" / "config.json").is_file()
            process = start(folder, *(["killed"] if resumed else [*OPTIONS, "--run-dir", "killed"]))
            began, reached = kill_after(process, draw.randint(1, 30), draw.uniform(0, 0.3))
            print(
                f"kill {kill:2}: began at step {began}, killed after step {reached}, exit {process.returncode}",
                flush=True,
            )
        last = start(folder, "killed")
        output, _ = last.communicate()
        equal = last.returncode == 0 and losses(folder / "killed") == losses(folder / "undisturbed")
        lines = len(losses(folder / "undisturbed"))
        print(f"{arguments.kills} kills, {lines} lines of metrics: {'bit-identical' if equal else 'DIFFERENT'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
