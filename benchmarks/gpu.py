"""What `gpu.sh` runs: the measurements of a part one after another, each a process, until the part's time is used up.

A measurement that is killed, or for which no time is left, is a row that says so; what it had measured is kept.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = {"numerics": 120, "train-124m": 450, "train-large": 480, "decode": 300, "profile": 150}
"""Of each part, 25 minutes together; a measurement is started only while a quarter of its own time is left."""
SAME_AS_NANOGPT = ["--model.bias", "False", "--model.norm-bias", "False"]
TINY = [
    *("--vocab-size", "61", "--model.num-layers", "2", "--model.model-dim", "32", "--model.num-heads", "4"),
    *("--model.context-length", "32"),
]
LLAMA_1B = [
    *("--model.num-layers", "16", "--model.model-dim", "2048", "--model.num-heads", "32", "--model.num-kv-heads", "8"),
    *(
        "--model.head-dim",
        "64",
        "--model.ffn-dim",
        "8192",
        "--model.qk-norm",
        "False",
        "--model.context-length",
        "2048",
    ),
    *("--model.tie-embeddings", "True", "--model.logit-softcap", "0.0", "--vocab-size", "128256"),
]
"""The shape of Llama 3.2 1B."""
KERNELS = [f"{kernel}: --model.attention-kernel {kernel}" for kernel in ("xla", "cudnn")]
"""Where cuDNN's is what is chosen anyway, its ratio says how large noise is."""


@dataclasses.dataclass
class Job:
    """One measurement: a script of this folder with its arguments."""

    label: str
    script: str
    arguments: list[str]
    seconds: float = 180
    """After which it is killed."""
    required: bool = False
    """Whether the part ends where it fails: wrong numbers are not timed."""
    python: str = sys.executable


def torch_python() -> str | None:
    """The interpreter that has torch; None: there is none."""
    return os.environ.get("TORCH_PYTHON") or (sys.executable if importlib.util.find_spec("torch") else None)


def jobs(part: str, dry_run: bool, nanogpt: str | None, gigabytes: float, out: Path) -> list[Job]:
    """The measurements of a part, the most important first.

    Args:
        nanogpt: a checkout; None: no arms of nanoGPT.
        gigabytes: of the card's memory.
    """
    tiny = TINY if dry_run else []
    steps = ["--steps", "2"] if dry_run else ["--steps", "20"]
    kernels = ["remat: --model.remat full"] if dry_run else KERNELS
    variants = [word for kernel in kernels for word in ("--variant", kernel)]
    small = ["--tiny"] if dry_run else []
    smoke = Job("smoke test", "numerics.py", [*small, "--smoke"], 120, required=True)

    def speed(label: str, config: str, batches: list[int], *more: str, seconds: float = 150) -> Job:
        sizes = ["--batch-sizes", *map(str, [2, 3][: len(batches)] if dry_run else batches)]
        words = [f"configs/{config}.py", *SAME_AS_NANOGPT, *tiny, *steps, *sizes, "--dtypes", "bfloat16", *more]
        return Job(label, "train_speed.py", words, seconds)

    def against(rounds: int, *modes: str) -> list[str]:
        modes, rounds = (("eager",), 2) if dry_run else (modes, rounds)
        where = ["--against", f"nanogpt={nanogpt}", "--against-python", torch_python() or ""]
        return ["--rounds", str(rounds), *where, "--modes", *modes]

    if part == "numerics":
        found = [Job("numerics", "numerics.py", small, 120, required=True)]
        found.append(Job("ceilings, jax", "ceilings.py", ["jax", *small], 60))
        if torch_python():
            found.append(Job("ceilings, torch", "ceilings.py", ["torch", *small], 60, python=torch_python()))
        return found
    if part == "train-124m":
        found = [smoke]
        if nanogpt:
            found.append(
                speed("124M, against nanoGPT", "gpt2_124m", [32], *against(3, "compiled", "best"), seconds=270)
            )
        # 16 and not 32: XLA's own attention keeps its weights, and all three share one memory.
        found.append(speed("124M, kernels", "gpt2_124m", [16], "--rounds", "3", *variants))
        return [*found, speed("124M, batches", "gpt2_124m", [32, 64, 16])]
    if part == "train-large":
        scanned = ["--model.scan-layers", "True"]  # 48 unrolled layers would compile for minutes
        found = [smoke]
        if nanogpt:
            # Where two of 1.5B do not fit into one memory, each turn starts its process, and there is time for less.
            turns = against(3, "compiled", "best") if gigabytes > 120 else [*against(2, "compiled"), "--fresh"]
            found.append(speed("1.5B, against nanoGPT", "gpt2_1558m", [8], *scanned, *turns, seconds=330))
        found.append(speed("1.5B, batches", "gpt2_1558m", [16, 8], *scanned))
        return [*found, speed("350M, batches", "gpt2_355m", [32, 16], seconds=120)]
    if part == "decode":
        lengths = [] if dry_run else ["--prompt-tokens", "128", "--new-tokens", "256"]

        def decode(label: str, config: str, batches: list[int], *more: str, seconds: float) -> Job:
            sizes = ["--batch-sizes", *map(str, [1, 2] if dry_run else batches)]
            words = [f"configs/{config}.py", *more, *tiny, *lengths, *sizes, "--rounds", "2" if dry_run else "3"]
            return Job(label, "decode_speed.py", words, seconds)

        others = []
        if torch_python() and importlib.util.find_spec("transformers") and not dry_run:
            others = ["--against", "transformers", "--modes", "eager", "static", "--against-python", torch_python()]
            others += ["--dtypes", "bfloat16"]
        fast = ["--against", f"gptfast={os.environ['GPTFAST']}"] if others and "GPTFAST" in os.environ else []
        return [
            smoke,
            decode("1B, decode", "modern_1_5b", [1, 32], *([] if dry_run else LLAMA_1B), *others, *fast, seconds=150),
            decode("124M, decode", "gpt2_124m", [1, 8, 32, 128], *others, seconds=120),
            decode("1.5B, decode", "gpt2_1558m", [1, 32], seconds=90),
            decode("124M, decode, profile", "gpt2_124m", [1], "--profile", str(out / "trace-decode"), seconds=60),
        ]
    trace = ["--profile", str(out / "trace")]
    return [speed("124M, profile", "gpt2_124m", [32], *trace, seconds=140)]


def card() -> dict[str, Any]:
    """What nvidia-smi says of the card, as it is found; nothing is set."""
    names = ["name", "driver_version", "memory.total", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(names, said.splitlines()[0].split(", "), strict=False))


def run(job: Job, file: Path, seconds: float) -> tuple[list[dict[str, Any]], int]:
    """Rows of a measurement, and its exit status; 124 where it was killed."""
    words = [job.python, str(HERE / job.script), *job.arguments, "--json", str(file)]
    print(f"\n== {job.label}", flush=True)
    start = time.monotonic()
    try:
        status = subprocess.run(words, cwd=HERE.parent, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        status = 124
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    rows = rows if isinstance(rows, list) else [rows]
    file.unlink(missing_ok=True)
    if status:
        rows.append({"error": f"killed after {seconds:.0f} s" if status == 124 else f"exit status {status}"})
    for row in rows:
        if row.get("loss") != row.get("loss"):  # NaN
            row["error"], status = "the loss is no number", status or 1
    taken = round(time.monotonic() - start, 1)
    return [{"label": job.label, **row, "job_seconds": taken} for row in rows], status


COLUMNS = {
    "label": "s",
    "arm": "s",
    "batch_size": "d",
    "tokens_per_second": ",.0f",
    "mfu": ".3f",
    "ratio": ".3f",
    "peak_memory_bytes": ",d",
    "compile_seconds": ".0f",
    "loss": ".3f",
    "figure": ".4g",
    "unit": "s",
    "error": "s",
}


def table(out: Path) -> str:
    """All rows of all parts that lie in the folder; of what was only checked, those that are wrong."""
    rows = []
    for part in SECONDS:
        file = out / f"gpu-{part}.json"
        rows += json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    checks = [row for row in rows if "limit" in row]
    rows = [row for row in rows if "limit" not in row or "error" in row]
    cells = [[*COLUMNS]]
    cells += [[format(row[n], f) if row.get(n) is not None else "" for n, f in COLUMNS.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    if checks:
        lines.append(f"{sum('error' not in row for row in checks)} of {len(checks)} checked numbers are right")
    for row in rows:
        if "kernel_shares" in row:
            shares = ", ".join(f"{kind} {share:.1%}" for kind, share in row["kernel_shares"].items())
            lines.append(f"{row['label']}, batch {row['batch_size']}: {shares}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=SECONDS)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, to see on any machine that it runs")
    options = parser.parse_args()
    out, nanogpt = options.out.resolve(), os.environ.get("NANOGPT") if torch_python() else None
    out.mkdir(parents=True, exist_ok=True)
    if not nanogpt and options.part.startswith("train"):
        print("no arms of nanoGPT: NANOGPT is not set, or there is no torch")
    found = card()
    gigabytes = float(found.get("memory.total", 0)) / 1000
    deadline = time.monotonic() + SECONDS[options.part]
    result = {"part": options.part, "dry_run": options.dry_run, "card": found, "rows": []}
    file, worst = out / f"gpu-{options.part}.json", 0
    for number, job in enumerate(jobs(options.part, options.dry_run, nanogpt, gigabytes, out)):
        left = deadline - time.monotonic()
        if left < job.seconds / 4:
            rows, status = [{"label": job.label, "error": f"not started: {left:.0f} s were left"}], 0
        else:
            rows, status = run(job, out / f"gpu-{options.part}-{number}.part.json", min(job.seconds, left))
        result["rows"] += rows
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        worst = max(worst, status)
        if status and job.required:
            print(f"{job.label} failed: nothing is timed", file=sys.stderr)
            break
    print(f"\n{table(out)}")
    return min(worst, 1)


if __name__ == "__main__":
    sys.exit(main())
