"""Rows 1 to 8 and 22: processes that are killed, told to stop, started twice or on other devices."""

import random
import signal
import time
from pathlib import Path

from benchmarks.matrix.runs import (
    EVERY,
    STEPS,
    Row,
    begin,
    finish,
    fresh,
    losses,
    records,
    refused,
    state_sha256,
    steps,
    summary,
    train,
    wait_for_step,
    whole,
)

LONG = ("--training.steps", 2000, "--training.eval-every-steps", 10)
"""JAX's preemption service looks once a second: a run must not end before that."""


def killed(base: Path, draw: random.Random) -> list[Row]:
    """1 and 2: SIGKILL around saves, and what the continued run is in the end."""
    run, tries, valid, lost, reached = Path("killed"), 20, 0, 0, 0
    for _ in range(tries):
        process = begin(*([run] if (run / "config.json").exists() else ["faults.py", "--run-dir", run]))
        goal = min(reached + draw.randint(1, 40), STEPS - EVERY)
        wait_for_step(run, goal, process)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.wait()
        told = max((record["step"] for record in records(run)), default=0)
        reached = max(steps(run), default=0)
        valid += (not steps(run) or whole(run)) and not list((run / "checkpoints").glob("*.damaged*"))
        lost = max(lost, told - reached)
    train(run)
    same = losses(run) == losses(base)
    equal = state_sha256(run, steps(run)[-1]) == state_sha256(base, steps(base)[-1])
    count = len([record for record in losses(base) if "loss" in record])
    return [
        Row("1", "SIGKILL around a save", tries, valid, f"at most {lost} steps lost, saved every {EVERY}"),
        Row("2", "SIGKILL, resume, finish", 1, same and equal, f"{count} losses and sha256 of the state equal"),
    ]


def told_to_stop(base: Path, draw: random.Random) -> list[Row]:
    """3 and 6: SIGTERM, once and twice."""
    rows = []
    for number, fault, times in (("3", "SIGTERM", 1), ("6", "SIGTERM twice, around a save", 2)):
        survived, slowest = 0, 0.0
        for attempt in range(5):
            run = Path(f"stopped-{number}-{attempt}")
            process = begin("faults.py", "--run-dir", run, *LONG)
            wait_for_step(run, EVERY - 2 + attempt, process)
            told = time.monotonic()
            for _ in range(times):
                process.send_signal(signal.SIGTERM)
                time.sleep(draw.uniform(0, 0.02) * (times - 1))
            ended = finish(process, told)
            unfinished = [path.name for path in (run / "checkpoints").iterdir() if not path.name.isdigit()]
            at = summary(run)["step"]
            survived += ended.code == 75 and steps(run)[-1] == at and not unfinished and whole(run)
            slowest = max(slowest, ended.seconds)
        rows.append(Row(number, fault, 5, survived, f"status 75 after at most {slowest:.1f} s, no half checkpoint"))
    return rows


def two_processes(base: Path, draw: random.Random) -> list[Row]:
    """4, 5 and 8: SIGTERM and SIGKILL of one of two, and on with one."""
    run = Path("two")
    group = begin("faults.py", "--run-dir", run, *LONG, devices=2, processes=2)
    wait_for_step(run, 12, group)
    told = time.monotonic()
    group.send_signal(signal.SIGTERM)
    seconds = finish(group, told).seconds
    at = summary(run)["step"]
    stopped = [process.poll() for process in group.processes] == [75, 75] and steps(run)[-1] == at and whole(run)
    figure = f"both saved step {at}, status 75, {seconds:.1f} s"
    rows = [Row("4", "SIGTERM to one of two processes", 1, stopped, figure)]

    sames = []
    for processes in (1, 2):
        copy = fresh(run, f"two-{processes}")
        options = ("--training.steps", at + 30, "--training.eval-every-steps", 0)
        ended = train(copy, *options, devices=4 // processes, processes=processes)
        assert ended.code == 0, ended.output
        sames.append([record["loss"] for record in records(copy) if "loss" in record and record["step"] > at])
    difference = max(abs(one - two) for one, two in zip(*sames, strict=True))
    rows.append(
        Row(
            "8",
            "on with another number of processes",
            1,
            difference <= 1e-5,
            f"2 → 1, losses differ by {difference:.1e}",
        )
    )

    run = Path("two-killed")
    group = begin("faults.py", "--run-dir", run, "--training.steps", 100_000, devices=2, processes=2)
    wait_for_step(run, 12, group)
    told = time.monotonic()
    group.send_signal(signal.SIGKILL)
    group.processes.pop()
    ended = finish(group, told)
    good = ended.code not in (0, 75) and ended.seconds < 120 and whole(run)
    rows.append(
        Row(
            "5",
            "SIGKILL of one of two processes",
            1,
            good,
            f"the other ended after {ended.seconds:.0f} s, status {ended.code}",
        )
    )
    return rows


def other_devices(base: Path, draw: random.Random) -> list[Row]:
    """7: a checkpoint of one device on 8, 4 and 1 devices and other meshes."""
    step = steps(base)[0]
    meshes = ((8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 1), (2, 1, 1), (1, 1, 1))
    hashes = {state_sha256(base, step, *mesh) for mesh in meshes}
    run = fresh(base, "elsewhere")
    for newer in steps(run)[1:]:
        (run / "checkpoints" / str(newer)).rename(run / f"later-{newer}")
    ended = train(run, "--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2, devices=8, processes=1)
    assert ended.code == 0, ended.output
    mine, theirs = ({r["step"]: r["loss"] for r in records(where) if "loss" in r} for where in (run, base))
    difference = max(abs(mine[step] - theirs[step]) for step in theirs)
    good = len(hashes) == 1 and difference <= 1e-5
    figure = f"one sha256 on {len(meshes)} meshes; losses differ by {difference:.1e} after {max(theirs) - step} steps"
    return [Row("7", "on with other devices and meshes", len(meshes), len(meshes) * good, figure)]


def started_twice(base: Path, draw: random.Random) -> list[Row]:
    """22: two runs in one directory."""
    run = Path("busy")
    first = begin("faults.py", "--run-dir", run, "--training.steps", 100_000)
    wait_for_step(run, 3, first)
    second = train("faults.py", "--run-dir", run, "--training.steps", 100_000)
    alone = first.poll() is None
    first.kill()
    first.wait()
    good = alone and refused(second, "is in use by process", str(first.pid))
    return [Row("22", "two runs in one directory", 1, good, f"the second refused after {second.seconds:.1f} s")]


ROWS = {"1 2": killed, "3 6": told_to_stop, "4 5 8": two_processes, "7": other_devices, "22": started_twice}
