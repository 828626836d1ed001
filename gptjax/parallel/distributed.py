"""Several processes as one program: connecting them, agreeing on errors, and one going first.

JAX's own multi-controller runtime does the work. With one process every function here does nothing. What a process
waits for here is another's work on the host, which may take hours. So it waits for a message, and never in a collective
of devices, which gives up after some minutes and cannot say why.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from gptjax.errors import UserError
from gptjax.parallel.launch import DistributedConfig, find_launch
from gptjax.parallel.messages import Messages, PeerFailed
from gptjax.parallel.rendezvous import meet

SHUTDOWN_SECONDS = 60
"""How long a process that ends waits for the others to end, too, before JAX takes them for lost."""
PARTING_SECONDS = 10.0
"""How long a process that has failed waits for the others to hear why, or to leave with the same error."""
SHARED_SECONDS = 5.0
"""Network file systems remember for a few seconds what a folder held."""


def connect(config: DistributedConfig, card: Mapping[str, Any], say: Callable[[str], None] = print) -> dict[str, Any]:
    """Connect this process with the others, before the first array; alone it does nothing.

    Args:
        card: what must be the same on every process, as JSON can hold it.
        say: gets a line, on process 0, about hosts and devices.

    Returns:
        Process 0's card.

    Raises:
        UserError: as `find_launch` and `meet`; or processes have different numbers of devices.
    """
    launch = find_launch(config)
    if launch is None:
        return dict(card)
    agreed = meet(launch, card, config.timeout_seconds, say)
    jax.distributed.initialize(
        launch.coordinator,
        launch.num_processes,
        launch.process_id,
        local_device_ids=launch.local_device_ids,
        # All is known: where ids are None, JAX would look again, and take one GPU of those that Slurm gives a task.
        cluster_detection_method="deactivate",
        initialization_timeout=config.timeout_seconds,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    counts = Counter(device.process_index for device in jax.devices())
    devices = f"{sum(counts.values())} devices: {_sum_of([counts[process] for process in range(launch.num_processes)])}"
    if len(set(counts.values())) > 1:
        raise UserError(f"processes have different numbers of devices, {devices}; give each the same number")
    hosts = len(set(gather_text(socket.gethostname())))
    if is_first():
        processes = f"{launch.num_processes} processes on {hosts} host{'s' * (hosts > 1)}"
        say(f"hosts: {processes} ({launch.source}), {devices}")
    return agreed


def _sum_of(counts: list[int]) -> str:
    """The devices of each process, in order; in short where many have as many."""
    same = len(counts) > 4 and len(set(counts)) == 1
    return f"{len(counts)} × {counts[0]}" if same else " + ".join(map(str, counts))


def num_processes() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def process_id() -> int:
    # Unlike jax.process_index, this starts no backend: nothing may be started before connect.
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is process 0, which alone writes and prints what all share."""
    return process_id() == 0


_messages = Messages()


def gather_text(text: str) -> list[str]:
    """The texts of all processes, in the order of their ids. All must call it; it waits as long as it takes.

    Raises:
        PeerFailed: a process has ended instead; as `fail_fast` says.
    """
    if num_processes() == 1:
        return [text]
    return _messages.gather(text, process_id(), num_processes())


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives on process 0, which alone calls it, on all processes. JSON must be able to hold it.

    Raises:
        UserError: that of process 0, on all.
    """
    if num_processes() == 1:
        return make()
    made = ""
    with together():
        if is_first():
            made = json.dumps(make())
    return json.loads(gather_text(made)[0])


@contextlib.contextmanager
def fail_fast() -> Iterator[None]:
    """A block in which a failure that nobody foresaw ends this process at once, its traceback printed.

    Python's own way out waits for the other processes, and those wait for this one; so they are told that it is gone,
    and why. A `UserError` is often that of all processes, which then leave together, and so gets some seconds.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():  # asks no backend, which may be what has failed
            raise
        _messages.leave(process_id(), error)
        if isinstance(error, UserError):
            alone = threading.Timer(PARTING_SECONDS, os._exit, [2])
            alone.daemon = True
            alone.start()
        if isinstance(error, UserError | KeyboardInterrupt):
            raise
        if isinstance(error, PeerFailed):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        _messages.part(process_id(), num_processes(), PARTING_SECONDS)
        os._exit(1)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block after which all processes raise the `UserError` of any, so that none waits for one that has left.

    Raises:
        UserError: this process's own, or else that of the first process with one.
    """
    if num_processes() == 1:
        yield
        return
    own = None
    try:
        yield
    except UserError as error:
        own = error
    errors = gather_text(str(own) if own else "")
    if own:
        raise own
    for process, error in enumerate(errors):
        if error:
            raise UserError(f"process {process}: {error}")


@contextlib.contextmanager
def first_then_others() -> Iterator[None]:
    """A block that process 0 runs while the others wait, and then they: what it makes, they find made.

    Raises:
        UserError: that of any process, on all; the others do not run the block if process 0 fails.
    """
    if is_first():
        with together():
            yield
        with together():
            pass
    else:
        with together():
            pass
        with together():
            yield


def check_shared(directory: Path) -> None:
    """Check that all processes see this folder as the same one.

    Raises:
        UserError: on all processes: some do not see what process 0 writes there, or it cannot write.
    """
    if num_processes() == 1:
        return
    mark = Path(directory) / f".shared-{gather_text(secrets.token_hex(8))[0]}"
    try:
        with together():
            if is_first():
                try:
                    mark.touch()
                except OSError as error:
                    raise UserError(f"cannot write to {directory}: {error.strerror}") from error
        seen = _wait_for(mark)
        hosts = gather_text(f"{'sees' if seen else 'misses'} process {process_id()} on {socket.gethostname()}")
    finally:
        if is_first():
            mark.unlink(missing_ok=True)
    first = hosts[0].partition(" ")[2]
    blind = [host.removeprefix("misses ") for host in hosts if host.startswith("misses ")]
    if blind:
        raise UserError(
            f"{directory} is not shared: what {first} writes there, {', '.join(blind)} "
            f"{'do' if len(blind) > 1 else 'does'} not see; choose a folder on a file system that all machines mount"
        )


def _wait_for(path: Path) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
