"""What befalls runs that are left alone, and what becomes of them: a table of faults, tries and survivals.

`python benchmarks/faults.py` makes runs of a small model on text of its own, in a folder that is removed, and does to
them what machines, disks, data and people do; `--only 1 2 11` does only these rows. Numbers are those of the table in
docs/reliability.md. Each row is printed as soon as it is known. Exit status 1 if a try did not survive.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.matrix import batches, runs, signals, storage
from benchmarks.matrix.runs import CONFIG, EVERY, STEPS, Row, train

ROWS = signals.ROWS | storage.ROWS | batches.ROWS


def make_corpus(folder: Path, name: str, seed: int) -> None:
    draw = random.Random(seed)
    words = "the cat dog sat ran on under a mat tree and then it was 12 345 , . \n".split(" ")
    (folder / name).mkdir()
    for number in range(600):
        text = " ".join(draw.choices(words, k=draw.randint(20, 100)))
        (folder / name / f"{number:03}.txt").write_text(text, encoding="utf-8")


def show(row: Row) -> None:
    print(f"{row.number:>3}  {row.fault:42} {row.survived:>5} / {row.tries:<5} {row.figure}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="numbers of the rows to do")
    parser.add_argument("--processes", type=int, default=1, help="that each run has; rows 7 and 18 are left out with 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the rows as JSON")
    options = parser.parse_args()
    destination = None if options.json is None else Path(options.json).absolute()
    rows: list[Row] = []
    runs.NUM_PROCESSES = options.processes
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        os.chdir(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(name) / "cache")
        Path("faults.py").write_text(CONFIG.replace("STEPS", str(STEPS)).replace("EVERY", str(EVERY)), encoding="utf-8")
        make_corpus(Path(name), "corpus", options.seed)
        make_corpus(Path(name), "other", options.seed + 1)
        base = Path("undisturbed")
        ended = train("faults.py", "--run-dir", base)
        if ended.code:
            sys.exit(ended.output)
        for numbers, faults in ROWS.items():
            if options.processes > 1 and numbers in ("4 5 8", "7", "18"):
                continue  # they say themselves how many; one process alone can flip a bit of arrays that many hold
            if options.only and not set(numbers.split()) & set(options.only):
                continue
            begun = time.monotonic()
            found = faults(base, random.Random(options.seed))
            for row in found:
                show(row)
            rows += found
            print(f"     ({time.monotonic() - begun:.0f} s)", flush=True)
            if destination is not None:
                destination.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")
        os.chdir("/")
    return int(any(row.survived < row.tries for row in rows))


if __name__ == "__main__":
    sys.exit(main())
