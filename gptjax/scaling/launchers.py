"""What trains the chains of a study: processes of this machine, or Slurm's jobs."""

import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.plain_files import named
from gptjax.scaling.conduct import Launcher, Say


def local_launcher(command: Sequence[str], jobs: int, say: Say) -> Launcher:
    """Chains as processes of this machine, `jobs` at a time, each with its share of the cores.

    Args:
        command: trains one chain when its name is appended.
    """

    def launch(names: Sequence[str], folder: Path) -> dict[str, int]:
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        waiting, running, ended = list(names), {}, {}
        shares = list(_core_shares(jobs))
        told: list[int] = []

        def tell(number: int, frame: object) -> None:
            told.append(number)
            for process, _, _, _ in running.values():
                process.send_signal(number)

        before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while running or (waiting and not told):
                while waiting and shares and not told:
                    name, share = waiting.pop(0), shares.pop(0)
                    file = (logs / named(name, ".log")).open("ab")
                    with _on_cores(share):
                        process = subprocess.Popen(
                            [*command, name],
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,  # Ctrl-C at the terminal comes once, from here
                        )
                    running[name] = process, share, file, time.monotonic()
                    say(f"{name}: started")
                for name, (process, share, file, start) in [*running.items()]:
                    if process.poll() is None:
                        continue
                    del running[name]
                    file.close()
                    shares.append(share)
                    ended[name] = process.returncode
                    end = "done" if process.returncode == 0 else f"failed with status {process.returncode}"
                    say(f"{name}: {end} after {time.monotonic() - start:.0f} s")
                time.sleep(0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if told:
            ended = {name: code for name, code in ended.items() if code == 0}
            ended[""] = 75 if told[0] == signal.SIGTERM else 130
        return ended

    return launch


def _core_shares(jobs: int) -> Iterator[set[int] | None]:
    """The cores of each of so many jobs; None: all, where they cannot be split."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if jobs == 1 or len(cores) < jobs:
        yield from itertools.repeat(None, jobs)
        return
    for job in range(jobs):
        yield set(cores[job * len(cores) // jobs : (job + 1) * len(cores) // jobs])


@contextlib.contextmanager
def _on_cores(share: set[int] | None) -> Iterator[None]:
    """What this thread starts inherits these cores. (A `preexec_fn` would fork, which JAX's threads forbid.)"""
    if share is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def slurm_launcher(command: Sequence[str], parameters: Mapping[str, Any], say: Say) -> Launcher:
    """Chains as an array of Slurm's jobs, by submitit, waited for.

    Args:
        command: trains one chain when its name is appended.
        parameters: as submitit takes them: `timeout_min`, `gpus_per_node`, `slurm_partition`, ...

    Raises:
        UserError: submitit is missing, or refuses the parameters.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError('--launcher slurm needs submitit: pip install "gptjax[slurm]"') from None

    def launch(names: Sequence[str], folder: Path) -> dict[str, int]:
        executor = submitit.AutoExecutor(folder=folder / "logs" / "%j", cluster=parameters.get("cluster"))
        settings = {name: value for name, value in parameters.items() if name != "cluster"}
        try:
            executor.update_parameters(name="gptjax-study", **settings)
            with executor.batch():
                jobs = [executor.submit(submitit.helpers.CommandFunction([*command, name])) for name in names]
        except (NameError, TypeError, RuntimeError, submitit.core.utils.FailedJobError) as error:
            raise UserError(f"Slurm's jobs cannot be submitted: {' '.join(str(error).split())}") from error
        say(f"{len(jobs)} jobs submitted, {jobs[0].job_id} the first; their logs are in {folder / 'logs'}")
        statuses = {}
        for name, job in zip(names, jobs, strict=True):
            problem = job.exception()  # waits for the job
            statuses[name] = 0 if problem is None else 1
            say(f"{name}: {'done' if problem is None else f'failed, see {job.paths.stderr}'}")
        return statuses

    return launch


def end_with_parent(parent: int) -> None:
    """Stop this process by SIGTERM, as a scheduler would, once the one that started it is gone, however it went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
