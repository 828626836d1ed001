"""From the command to a trained Shakespeare: the whole wall time, starting and compiling included, and the loss.

    python benchmarks/speedrun.py shakespeare.txt --cores 0,1 \
        --against nanogpt=CHECKOUT --against-python PYTHON_WITH_TORCH
    python benchmarks/speedrun.py shakespeare.txt --rounds 1 --training.steps 200

`train.py configs/shakespeare_speedrun.py`, with a seed of its own in each round and no compiled program kept from
before, takes turns with the command that nanoGPT's README has for CPUs (which has one seed). Both losses are over the
whole validation set, the last tenth of the text. Further `--section.field value` go to `train.py`.
"""

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np

from gptjax.checks import require

ROOT = Path(__file__).parent.parent
NANOGPT = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0"
).split()


def ours(python: str, text: Path, config: Path, seed: int, words: Sequence[str], folder: Path) -> tuple[float, float]:
    """Seconds of a whole run that finds nothing compiled, and its loss."""
    run = folder / f"ours-{seed}"
    command = [python, ROOT / "train.py", config, "--data.path", text, "--data.prepared-dir", run / "data"]
    command += ["--run-dir", run / "run", "--training.seed", str(seed), *words]
    seconds = wall_seconds(command, folder, {"JAX_COMPILATION_CACHE_DIR": str(run / "compiled")})
    return seconds, json.loads((run / "run" / "summary.json").read_text(encoding="utf-8"))["val_loss"]


def nanogpt(python: str, text: Path, checkout: Path, folder: Path) -> tuple[float, float]:
    """Seconds of the README's command in a copy of the checkout, after its data were prepared, and its loss."""
    copy = folder / "nanogpt"
    if not copy.exists():
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "assets"))
        prepare(text.read_text(encoding="utf-8"), copy / "data" / "shakespeare_char")
    seconds = wall_seconds([python, *NANOGPT], copy, {"PYTHONWARNINGS": "ignore"})
    command = [python, ROOT / "benchmarks" / "nanogpt_loss.py", copy]
    command += [copy / "out-shakespeare-char" / "ckpt.pt", copy / "data" / "shakespeare_char" / "val.bin"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return seconds, float(found.stdout.splitlines()[-1])  # after what the model says when it is made


def prepare(text: str, folder: Path) -> None:
    """What nanoGPT's `prepare.py` writes, which would fetch the text."""
    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    tokens = np.array([number[character] for character in text], np.uint16)
    train = int(0.9 * len(tokens))
    tokens[:train].tofile(folder / "train.bin")
    tokens[train:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": number}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def wall_seconds(command: Sequence[str | Path], folder: Path, environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, env=os.environ | environment)
    return time.perf_counter() - start


def row(arm: str, seconds: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    return {
        "arm": arm,
        **measure.host(),
        "cores": sorted(os.sched_getaffinity(0)),
        "seconds": statistics.median(seconds),
        "seconds_each": [round(value, 2) for value in seconds],
        "loss": statistics.median(losses),
        "loss_max": max(losses),
        "losses": [round(value, 4) for value in losses],
    }


COLUMNS = {"arm": "s", "seconds": ".1f", "ratio": ".3f", "loss": ".4f", "loss_max": ".4f"}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shakespeare_speedrun.py")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, with seeds from 0")
    parser.add_argument("--cores", help="numbers of the processor's cores to use, with commas; default: all")
    parser.add_argument("--against", help="nanogpt=CHECKOUT")
    parser.add_argument("--against-python", default=sys.executable, help="interpreter with torch; default: this one")
    parser.add_argument("--json", help="file for the results, or - for standard output")
    options, words = parser.parse_known_args(arguments)
    require(options.text.is_file(), f"{options.text} is no file; give Shakespeare's text, or another")
    kind, _, checkout = (options.against or "nanogpt=").partition("=")
    require(kind == "nanogpt", f"--against {options.against} is not nanogpt=CHECKOUT")
    if options.against:
        require((Path(checkout) / "model.py").is_file(), f"{checkout or options.against} is no checkout: no model.py")
    if options.cores:
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    text, mine, theirs, rows = options.text.resolve(), [], [], []
    with tempfile.TemporaryDirectory() as name:
        for seed in range(options.rounds):
            mine.append(ours(sys.executable, text, options.config.resolve(), seed, words, Path(name)))
            rows = [row("ours", *zip(*mine, strict=True)) | {"overrides": " ".join(words)}]
            if options.against:
                theirs.append(nanogpt(options.against_python, text, Path(checkout).resolve(), Path(name)))
                ratio = statistics.median(a / b for (a, _), (b, _) in zip(mine, theirs, strict=True))
                rows.append(row("nanogpt", *zip(*theirs, strict=True)) | {"ratio": ratio})
            measure.write(rows, options.json)
    measure.show(rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
