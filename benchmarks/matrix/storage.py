"""Rows 9 to 14, 19 to 21 and 23: changed settings, bad disks and bad data."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.matrix.runs import (
    EVERY,
    STEPS,
    Row,
    finish,
    fresh,
    losses,
    refused,
    start,
    state_sha256,
    steps,
    train,
    whole,
)

FLIPS = 1000


def other_settings(base: Path, draw: random.Random) -> list[Row]:
    """9 and 10: what a run that goes on may not change."""
    changes = {
        "optimizer.beta2": ["--optimizer.beta2", 0.9],
        "training.seed": ["--training.seed", 1],
        "model.num_layers": ["--model.num-layers", 3],
        "model.model_dim": ["--model.model-dim", 64],
        "tokenizer.vocab_size": ["--tokenizer.vocab-size", 310],
        "data.path": ["--data.path", "other"],
        "model.compute_dtype": ["--model.compute-dtype", "bfloat16"],
    }
    run = fresh(base, "changed")
    before = losses(run)
    ends = {
        name: train("faults.py", "--run-dir", run, "--training.steps", STEPS + 100, *change)
        for name, change in changes.items()
    }
    good = sum(
        refused(end, name, "--accept-changes") and "training: steps" not in end.output for name, end in ends.items()
    )
    for file in Path("corpus").glob("00*.txt"):
        file.rename(file.with_suffix(".aside"))
    ends["the text"] = train(run, "--training.steps", STEPS + 100)
    for file in Path("corpus").glob("*.aside"):
        file.rename(file.with_suffix(".txt"))
    good += refused(ends["the text"], "tokenizer") and losses(run) == before and whole(run)
    slowest = max(end.seconds for end in ends.values())
    rows = [
        Row(
            "9",
            "changed vocabulary, shape, data, seed ...",
            len(ends),
            good,
            f"refused by name after at most {slowest:.1f} s",
        )
    ]
    program = """
import sys, jax
from gptjax.model.gpt import GPT
from gptjax.training import checkpoint, optimizer, run_dir, state
config, _ = run_dir.load_run_config(sys.argv[1])
wanted = state.abstract_state(GPT(config.model), optimizer.make_optimizer(config.optimizer))
half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16" if x.ndim else x.dtype), wanted)
checkpoint.restore(sys.argv[1] + "/checkpoints", int(sys.argv[2]), half)
"""
    ended = finish(start("-c", program, run, steps(run)[-1]))
    refusal = ended.code != 0 and "float32" in ended.output and "bfloat16" in ended.output
    return [*rows, Row("10", "another type asked of a checkpoint", 1, refusal, "refused with both types, nothing cast")]


def flipped_bits(base: Path, draw: random.Random) -> list[Row]:
    """11: single bits of all files of a checkpoint."""
    from gptjax.training.recovery import verify_step

    run = fresh(base, "flipped")
    newest = steps(run)[-1]
    files = sorted(path for path in (run / "checkpoints" / str(newest)).rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    found, silent = 0, []
    for number in range(FLIPS):
        # Half by size, as a disk would; half by file, or the small ones would never be tried.
        path = draw.choices(files, sizes)[0] if number % 2 else draw.choice([f for f in files if f.stat().st_size])
        with path.open("r+b") as stream:
            place, bit = draw.randrange(path.stat().st_size), 1 << draw.randrange(8)
            stream.seek(place)
            byte = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([byte ^ bit]))
            stream.flush()
            if verify_step(run / "checkpoints", newest).status == "damaged":
                found += 1
            else:
                silent.append((path, place, byte ^ bit))
            stream.seek(place)
            stream.write(bytes([byte]))
    harmless = 0  # not seen, but the arrays are read as they were
    honest = state_sha256(run, newest) if silent else ""
    for path, place, value in silent[:20]:
        content = path.read_bytes()
        path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
        harmless += state_sha256(run, newest) == honest
        path.write_bytes(content)
    names = ", ".join(sorted({path.name for path, *_ in silent}))
    figure = f"{found} seen" + (
        f"; of {len(silent)} others, all in {names}, {min(20, len(silent))} were restored: equal" if silent else ""
    )
    survived = found + len(silent) * (harmless == len(silent[:20]))
    rows = [Row("11", "a flipped bit in a checkpoint", FLIPS, survived, figure)]
    data = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    ended = train(run)
    good = ended.code == 0 and f"checkpoint {newest} is damaged" in ended.output and losses(run) == losses(base)
    return [*rows, Row("11", "and the run goes on", 1, good, f"from step {steps(base)[-2]}, same losses")]


def torn_files(base: Path, draw: random.Random) -> list[Row]:
    """12: every file of a checkpoint cut in half, emptied and removed."""
    from gptjax.training.recovery import verify_step

    run = fresh(base, "torn")
    newest = steps(run)[-1]
    tries = found = harmless = 0
    for path in sorted((run / "checkpoints" / str(newest)).rglob("*")):
        if not path.is_file() or not path.stat().st_size:
            continue
        content = path.read_bytes()
        for rest in (content[: len(content) // 2], b"", None):
            path.unlink() if rest is None else path.write_bytes(rest)
            tries += 1
            if verify_step(run / "checkpoints", newest).status == "damaged":
                found += 1
            elif path.name in ("_CHECKPOINT_METADATA", "commit_success.txt", "manifest.json"):
                harmless += state_sha256(run, newest) == state_sha256(base, newest)
            path.write_bytes(content)
    return [
        Row(
            "12",
            "truncated, empty and missing files",
            tries,
            found + harmless,
            f"{found} named, {harmless} restored the same",
        )
    ]


def full_disk(base: Path, draw: random.Random) -> list[Row]:
    """13, 14 and 23: a file that may not grow, folders that cannot be written."""
    run = fresh(base, "full")
    for step in steps(run)[1:]:
        shutil.rmtree(run / "checkpoints" / str(step))
    kept = steps(run)
    ended = train(run, limit_bytes=2**17)
    failed = refused(ended, "could not be saved", "File too large")
    told = [
        int(line.split("/")[0].split()[1])
        for line in ended.output.splitlines()
        if line.startswith("step ") and "/" in line
    ]
    late = max(told, default=0) - kept[0] - EVERY
    unfinished = [path for path in (run / "checkpoints").iterdir() if not path.name.isdigit()]
    good = failed and steps(run) == kept and not unfinished and whole(run)
    again = train(run)
    good = good and again.code == 0 and losses(run) == losses(base)
    rows = [
        Row(
            "13",
            "no room for a save (a limit on files)",
            1,
            good,
            "the old checkpoint stays, nothing half, and goes on later",
        ),
        Row(
            "23",
            "an asynchronous save that failed",
            1,
            failed and late <= 2,
            f"raised at most {max(0, late)} steps after it",
        ),
    ]
    places = {"below a file": "faults.py/run", "in the kernel's": "/proc/run"}
    ends = [train("faults.py", "--run-dir", place) for place in places.values()]
    slowest = max(end.seconds for end in ends)
    return [
        *rows,
        Row(
            "14",
            "a folder that cannot be written",
            len(ends),
            sum(map(refused, ends)),
            f"refused after at most {slowest:.1f} s",
        ),
    ]


def bad_data(base: Path, draw: random.Random) -> list[Row]:
    """19 to 21: damaged shards, ids that are no tokens, hostile text."""
    refusals, tries = 0, 0
    for damage in _SHARD_DAMAGES:
        refusals += _trained_on(base, damage, named="train-")
        tries += 1
    rows = [Row("19", "token shards cut short, emptied, missing", tries, refusals, "refused by name before training")]

    def no_token(shard: Path) -> None:
        tokens = np.memmap(shard, "<u2", mode="r+")
        tokens[draw.randrange(len(tokens) // 2) :] = 60_000
        tokens.flush()

    survived = _trained_on(base, no_token, named="is 60000, but there are only 300 tokens")
    return [*rows, Row("20", "ids that are no tokens", 1, survived, "refused with file and place"), _hostile_text()]


def _trained_on(base: Path, damage: Callable[[Path], None], named: str) -> bool:
    """Whether a run that goes on with damaged shards is refused for it."""
    run = fresh(base, "shards")
    shutil.rmtree("data-copy", ignore_errors=True)
    shutil.copytree("data", "data-copy")
    damage(max(Path("data-copy").rglob("train-*.bin"), key=lambda path: path.stat().st_size))
    return refused(train(run, "--training.steps", STEPS + 100, "--data.prepared-dir", "data-copy"), named)


_SHARD_DAMAGES: list[Callable[[Path], None]] = [
    lambda shard: shard.write_bytes(shard.read_bytes()[:-2]),
    lambda shard: shard.write_bytes(shard.read_bytes()[:-1]),
    lambda shard: shard.write_bytes(b""),
    Path.unlink,
]


def _hostile_text() -> Row:
    texts = {
        "a word of a million characters": b"a" * 10**6,
        "NUL and control characters": bytes(range(32)) * 1000,
        "nothing": b"",
        "white space": b" \n\t" * 1000,
        "half a surrogate pair, escaped": b'{"text": "\\ud800 tail"}',
        "special tokens": b"<|endoftext|>" * 1000,
    }
    survived = 0
    for number, (name, raw) in enumerate(texts.items()):
        folder = Path(f"hostile-{number}")
        folder.mkdir()
        for copy in range(40):
            (folder / f"fine-{copy}.txt").write_text(f"the cat sat on mat {copy} and then it ran")
        (folder / ("bad.jsonl" if name.startswith("half") else "bad.txt")).write_bytes(raw)
        ended = finish(start("-m", "gptjax", "prepare", folder, "--tokenizer.vocab-size", 300))
        survived += ended.code == 0 or refused(ended, "bad.")
    (Path("hostile-0") / "latin.txt").write_bytes("café".encode("latin-1") * 10)
    broken = finish(start("-m", "gptjax", "prepare", "hostile-0", "--tokenizer.vocab-size", 300))
    survived += refused(broken, "latin.txt")
    figure = f"{', '.join(texts)}: taken or refused by name; broken UTF-8 refused by name"
    return Row("21", "hostile text", len(texts) + 1, survived, figure)


ROWS = {"9 10": other_settings, "11": flipped_bits, "12": torn_files, "13 14 23": full_disk, "19 20 21": bad_data}
