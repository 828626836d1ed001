"""The memory that preparing a large text takes: a synthetic gigabyte in each form, peak resident size and speed.

`python benchmarks/prepare_memory.py` writes made text of `--megabytes` as one `.txt` (a single document), as
`.jsonl.gz` and as `.parquet`, prepares each in a process of its own (all of prepare's work is done by its threads),
and prints that process's peak resident size, and the speed of the whole command, tokenizer training included.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptjax.cli import open_output

ROOT = Path(__file__).parent.parent
CHILD = """
import resource, sys
from gptjax.__main__ import main
main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def documents(num_bytes: int) -> Iterator[str]:
    """Made English of about 10 KB a document: words by a Zipf-like law, so that merges are found."""
    draw = np.random.default_rng(0)
    letters = np.array([*"etaoinshrdlucmfwypvbgk"])
    words = ["".join(draw.choice(letters, draw.integers(1, 10))) for _ in range(20_000)]
    shares = np.cumsum(1 / np.arange(2, len(words) + 2))
    left = num_bytes
    while left > 0:
        chosen = [words[i] for i in np.searchsorted(shares, draw.random(1920) * shares[-1])]
        text = "\n".join(" ".join(chosen[i : i + 12]).capitalize() + "." for i in range(0, len(chosen), 12))
        left -= len(text)
        yield text


def write(form: str, folder: Path, num_bytes: int) -> Path:
    path = folder / f"text{form}"
    if form == ".txt":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(text + "\n" for text in documents(num_bytes))
    elif form == ".jsonl.gz":
        with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents(num_bytes))
    else:
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema([("text", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            batch = []
            for text in documents(num_bytes):
                batch.append(text)
                if len(batch) == 4000:
                    writer.write_table(pyarrow.table({"text": batch}))
                    batch = []
            writer.write_table(pyarrow.table({"text": batch}))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--forms", nargs="+", default=[".txt", ".jsonl.gz", ".parquet"])
    parser.add_argument(
        "--json", help="file for the figures as JSON, an object for each form, or - for standard output"
    )
    arguments = parser.parse_args()
    text_to = sys.stderr if arguments.json == "-" else sys.stdout
    results = []
    for form in arguments.forms:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = write(form, folder, arguments.megabytes * 10**6)
            command = [sys.executable, "-c", CHILD, "prepare", str(path), "--out", str(folder / "out")]
            start = time.perf_counter()
            output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
            seconds = time.perf_counter() - start
            peak = int(output.splitlines()[-1])
            results.append({"form": form, "peak_memory_bytes": peak, "seconds": seconds})
            figures = f"peak {peak / 1e6:,.0f} MB  {seconds:.0f} s  {arguments.megabytes / seconds:.1f} MB/s"
            print(f"{form:10} {arguments.megabytes} MB  {figures}", file=text_to, flush=True)
    if arguments.json:
        with open_output(arguments.json) as file:
            print(json.dumps(results), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
