"""Rows 15 to 18 and 24: bad batches, divergence, a machine that computes wrong, and where the time goes."""

import random
import time
from pathlib import Path

from benchmarks.matrix.runs import (
    ROOT,
    STEPS,
    Ended,
    Row,
    begin,
    finish,
    losses,
    records,
    summary,
    train,
    wait_for_step,
)

OPTIONS = ("--training.eval-every-steps", STEPS, "--checkpoint.every-steps", 50)


def injected(*arguments: object) -> Ended:
    return finish(begin(*arguments, program=ROOT / "benchmarks" / "injection.py"))


def bad_batches(base: Path, draw: random.Random) -> list[Row]:
    """15 and 16: steps whose loss is no number, or leaps."""
    first = 16 * 200
    kinds = {"nan": "15", "inf": "15", "1e3": "16", "30": "16"}
    clean = Path("clean")
    assert train("faults.py", "--run-dir", clean, *OPTIONS).code == 0
    results: dict[str, list[bool]] = {"15": [], "16": []}
    losses_of = {}
    for kind, number in kinds.items():
        run = Path(f"scaled-{kind}")
        ended = injected("scale", first, first + 16 * 3, kind, "faults.py", "--run-dir", run, *OPTIONS)
        counted = {record["step"]: record["skipped_steps"] for record in records(run) if "skipped_steps" in record}
        good = ended.code == 0 and counted[200] == 0 and counted[203] == 3 == counted[STEPS]
        losses_of[kind] = summary(run)["val_loss"] / summary(clean)["val_loss"]
        results[number].append(good and losses_of[kind] < 1.02)
    # What a step is skipped for that nothing is wrong with.
    false = [summary(run)["skipped_steps"] for run in (clean, base)]
    total = sum(summary(run)["step"] for run in (clean, base))
    runs = Path("hopeless")
    ended = injected("scale", first, 10**9, "nan", "faults.py", "--run-dir", runs, *OPTIONS, "--guard.max-rollbacks", 0)
    at = summary(runs)["step"]
    abort = ended.code == 3 and 210 <= at <= 213
    ratios = {kind: f"{ratio:.4f}" for kind, ratio in losses_of.items()}
    return [
        Row(
            "15",
            "loss is NaN or infinite for 3 steps",
            2,
            sum(results["15"]),
            f"3 skipped; final loss × {ratios['nan']}, {ratios['inf']} of clean",
        ),
        Row("15", "NaN from step 201 on", 1, abort, f"status 3, noticed at step {at}"),
        Row(
            "16",
            "loss leaps 1000- and 30-fold for 3 steps",
            2,
            sum(results["16"]),
            f"3 skipped; final loss × {ratios['1e3']}, {ratios['30']} of clean",
        ),
        Row("16", "nothing wrong", total, total - sum(false), f"{sum(false)} of {total} steps skipped"),
    ]


def divergence(base: Path, draw: random.Random) -> list[Row]:
    """17: so many bad batches that the run goes back and leaves them out."""
    run, clean = Path("diverged"), Path("clean-too")
    assert train("faults.py", "--run-dir", clean, *OPTIONS).code == 0
    first = 16 * 220
    ended = injected("scale", first, first + 16 * 30, "nan", "faults.py", "--run-dir", run, *OPTIONS)
    events = [record for record in records(run) if "rolled_back_from" in record]
    ratio = summary(run)["val_loss"] / summary(clean)["val_loss"]
    good = ended.code == 0 and bool(events) and abs(ratio - 1) < 0.01 and summary(run)["skipped_steps"] <= 20
    left_out = sum(event["left_out_sequences"] for event in events)
    figure = f"{len(events)} times back, {left_out:,} sequences left out, final loss × {ratio:.4f} of clean"
    return [Row("17", "30 bad batches in a row", 1, good, figure)]


def wrong_results(base: Path, draw: random.Random) -> list[Row]:
    """18: one bit of one result of the compiled step, in the first or in the second of two computations."""
    survived = 0
    for attempt in range(10):
        run = Path(f"wrong-{attempt}")
        call = 11 * (1 + attempt // 2) - attempt % 2  # both computations of steps 10, 20, 30 ...
        options = ("--guard.rerun-every-steps", 10, *OPTIONS)
        ended = injected("flip", call, "faults.py", "--run-dir", run, *options)
        survived += ended.code == 4 and "computed twice" in ended.output
    honest = train("faults.py", "--run-dir", "honest", *OPTIONS, "--guard.rerun-every-steps", 10)
    quiet = honest.code == 0 and [r["loss"] for r in losses(Path("honest")) if "loss" in r]
    figure = f"status 4; {STEPS // 10} honest reruns of {STEPS} steps: {'no alarm' if quiet else 'FALSE ALARM'}"
    return [Row("18", "a flipped bit in a computed step", 10, survived if quiet else 0, figure)]


def account(base: Path, draw: random.Random) -> list[Row]:
    """24: whether the kinds of seconds sum to those of the clock, over two processes, one of them killed."""
    run = Path("counted")
    options = ("--training.steps", 6000, "--training.eval-every-steps", 500, "--checkpoint.every-steps", 100)
    begun = time.time()
    process = begin("faults.py", "--run-dir", run, *options)
    wait_for_step(run, 2950, process)
    process.kill()
    process.wait()
    ended = train(run)
    wall = (run / "summary.json").stat().st_mtime - begun  # what comes after is Python's way out
    seconds = summary(run)["seconds"]
    share = sum(seconds.values()) / wall
    told = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    good = ended.code == 0 and abs(share - 1) <= 0.01 and seconds["lost"] > 0
    return [
        Row("24", "the account of a killed and continued run", 1, good, f"{100 * share:.1f} % of {wall:.1f} s: {told}")
    ]


ROWS = {"15 16": bad_batches, "17": divergence, "18": wrong_results, "24": account}
