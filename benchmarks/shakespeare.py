"""How well nanoGPT's Shakespeare setting for CPUs is learned: the loss over the whole validation set, several seeds.

`python benchmarks/shakespeare.py shakespeare.txt` trains `configs/shakespeare_char_cpu.py` once for each seed, one
after the other, and prints each validation loss in nats per character and their median. nanoGPT's own checkpoint,
evaluated over the whole set, has 1.898; the 1.88 of its README is an estimate from 20 batches.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gptjax.cli import open_output

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shakespeare_char_cpu.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", help="file for the losses as one JSON object, or - for standard output")
    arguments = parser.parse_args()
    text_to = sys.stderr if arguments.json == "-" else sys.stdout
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            run = Path(folder) / f"seed-{seed}"
            command = [sys.executable, ROOT / "train.py", arguments.config, "--data.path", arguments.text.resolve()]
            options = ["--run-dir", run, "--data.prepared-dir", Path(folder) / "data", "--training.seed", str(seed)]
            subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, cwd=folder)
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            losses[seed] = summary["val_loss"]
            line = f"seed {seed}  {losses[seed]:.4f} nats/character  {summary['wall_seconds']:.0f} s"
            print(line, file=text_to, flush=True)
    median = statistics.median(losses.values())
    print(f"median of {len(losses)} seeds: {median:.4f} nats/character", file=text_to)
    if arguments.json:
        with open_output(arguments.json) as file:
            print(json.dumps({"median": median, "losses": losses}), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
