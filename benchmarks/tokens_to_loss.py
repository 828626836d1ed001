"""How many tokens Muon needs to reach the loss of a tuned AdamW, and what its steps cost.

    python benchmarks/tokens_to_loss.py                                        # the quickstart, on Python's own source
    python benchmarks/tokens_to_loss.py configs/shakespeare_char_cpu.py --options "--data.path shakespeare.txt"

Both optimizers are tuned alike: the peak learning rate of the configuration, then twice and half of it, and so on until
the best has a worse one on either side; all else is the configuration's. Each is trained with its best rate for all
seeds, and Muon for shares of the steps, too, each with a schedule of its own: how few tokens reach AdamW's final loss
is read off those ends, not off the middle of a longer run, which has not decayed yet. Runs are `train.py`'s, one after
the other, and validation losses are over `--eval-sequences` sequences, the same ones for all.

A run that `--runs` holds is not trained again. `--prefix` stands before each training command, as `taskset -c 0,1`.
"""

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.cli import EXIT_OF, open_output
from gptjax.config_files import load_config

ROOT = Path(__file__).parent.parent


class Trained(NamedTuple):
    """What is kept of a run."""

    loss: float
    """Validation loss at the end; infinite where it diverged."""
    tokens: int
    seconds_per_token: float


def tune(loss_of: Callable[[float], float], start: float) -> tuple[float, dict[float, float]]:
    """The learning rate that is better than its half and its double, and the losses of all that were tried."""
    losses = {}
    best = start
    while True:
        for rate in (best, 2 * best, best / 2):
            if rate not in losses:
                losses[rate] = loss_of(rate)
        found = min(losses, key=losses.get)
        if found == best:
            return best, losses
        best = found


def tokens_to_reach(target: float, ends: dict[int, float]) -> float | None:
    """Tokens at which the line through these final losses (by tokens trained) meets the target; None: it does not."""
    points = sorted(ends.items())
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= target < high:
            return before + (after - before) * (high - target) / (high - low)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=ROOT / "configs" / "quickstart.py")
    parser.add_argument("--steps", type=int, help="default: the configuration's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5], help="of the steps, for Muon")
    parser.add_argument("--eval-sequences", type=int, default=1024)
    parser.add_argument("--options", default="", help="further options of train.py, in one argument")
    parser.add_argument("--prefix", default="", help="words before each training command")
    parser.add_argument("--runs", type=Path, help="folder where runs are kept and found; default: a temporary one")
    parser.add_argument("--json", help="file for the results, or - for standard output")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    steps = arguments.steps or config.training.steps
    text_to = sys.stderr if arguments.json == "-" else sys.stdout

    def say(line: str) -> None:
        print(line, file=text_to, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.runs or Path(temporary)).resolve()

        def trained(kind: str, rate: float, seed: int, share: float = 1.0) -> Trained:
            num_steps = round(share * steps)
            directory = folder / f"{kind}-{rate:.3g}-{num_steps}-{seed}"
            if not (directory / "summary.json").exists():
                train(directory, {"optimizer.kind": kind, "optimizer.peak-learning-rate": rate}, num_steps, seed)
            summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
            finished = summary["stopped"] == "finished"
            loss = summary["val_loss"] if finished else inf
            found = Trained(loss, summary["tokens"], 1 / summary["tokens_per_second"])
            say(
                f"{kind:5}  rate {rate:<8.3g}  seed {seed}  {found.tokens:>10,} tokens  loss {found.loss:.4f}  "
                f"{found.seconds_per_token * summary['tokens'] / summary['step'] * 1e3:.1f} ms a step"
            )
            return found

        def train(directory: Path, fields: dict[str, Any], num_steps: int, seed: int) -> None:
            fields |= {
                "training.steps": num_steps,
                "training.seed": seed,
                "training.eval-every-steps": 0,
                "training.eval-sequences": arguments.eval_sequences,
                "training.sample-every-steps": 0,
                "checkpoint.every-steps": 0,
                "data.prepared-dir": folder / "data",
                "run-dir": directory,
            }
            options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
            command = [sys.executable, ROOT / "train.py", arguments.config.resolve(), *options]
            command = [*shlex.split(arguments.prefix), *command, *shlex.split(arguments.options)]
            result = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
            if result.returncode not in (0, EXIT_OF["diverged"]):
                raise SystemExit(f"training failed: {shlex.join(map(str, command))}")

        rows = {}
        first, start = arguments.seeds[0], config.optimizer.peak_learning_rate
        for kind in ("adamw", "muon"):
            rate, tried = tune(lambda rate, kind=kind: trained(kind, rate, first).loss, start)
            runs = [trained(kind, rate, seed) for seed in arguments.seeds]
            losses = [run.loss for run in runs]
            rows[kind] = {
                "optimizer": kind,
                "learning_rate": rate,
                "tried": tried,
                "losses": losses,
                "loss": statistics.mean(losses),
                "loss_range": max(losses) - min(losses),
                "tokens": runs[0].tokens,
                "seconds_per_token": statistics.median(run.seconds_per_token for run in runs),
            }
        adamw, muon = rows["adamw"], rows["muon"]
        ends = {muon["tokens"]: muon["loss"]}
        for share in arguments.shares:
            runs = [trained("muon", muon["learning_rate"], seed, share) for seed in arguments.seeds]
            ends[runs[0].tokens] = statistics.mean(run.loss for run in runs)
    reached = tokens_to_reach(adamw["loss"], ends)
    ratio = muon["seconds_per_token"] / adamw["seconds_per_token"]
    token_share = None if reached is None else reached / adamw["tokens"]
    for row in rows.values():
        say(
            f"{row['optimizer']:5}  best rate {row['learning_rate']:.3g}  final loss {row['loss']:.4f} (mean of "
            f"{len(row['losses'])} seeds, which lie {row['loss_range']:.4f} apart)  {row['tokens']:,} tokens"
        )
    say("muon by tokens: " + ", ".join(f"{tokens:,} {loss:.4f}" for tokens, loss in sorted(ends.items())))
    if reached is None:
        say("AdamW's loss lies outside of these: other --shares would tell where Muon reaches it")
    else:
        say(f"muon reaches AdamW's loss with {reached:,.0f} tokens: {token_share:.2f} of them")
        say(f"{ratio:.2f} of AdamW's time for a token, {token_share * ratio:.2f} of its time to that loss")
    if arguments.json:
        result = {"rows": list(rows.values()), "muon_by_tokens": ends}
        result |= {"tokens_to_reach": reached, "token_share": token_share, "time_ratio": ratio}
        with open_output(arguments.json) as file:
            print(json.dumps(result), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
