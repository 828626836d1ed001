"""A short meeting of all processes before JAX starts, so that whoever is missing or differs is named.

`jax.distributed.initialize` aborts the process when a peer is missing or an id is taken twice, with a C++
stack trace that names nobody. Here each process sends process 0 one line of JSON, its hello, and gets one
back: process 0's card, or what is wrong. Then the port is left to JAX.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.errors import UserError
from gptjax.parallel.launch import Launch, split_address

PROTOCOL = "gptjax meeting 1"
MAX_LINE_BYTES = 1 << 20
CONNECT_SECONDS = 5.0
HELLO_SECONDS = 10.0
"""Time in which a connection must have said hello; a port scanner does not."""
LINGER_SECONDS = 5.0
"""How long process 0 waits, when something is wrong, for the others to come and hear of it."""
FAREWELL_SECONDS = 2.0
MAX_CLOCK_DIFFERENCE_SECONDS = 60.0
MAX_LISTED = 8
MAX_KEYS = 5

HELLO_FIELDS = {"process_id": int, "num_processes": int, "host": str, "pid": int, "card": dict, "time": float}
Hello = dict[str, Any]


def meet(launch: Launch, card: Mapping[str, Any], timeout_seconds: float, say: Callable[[str], None] = print) -> dict:
    """Wait until all processes are there, and compare what they bring.

    Args:
        card: what must be the same on every process, as JSON can hold it.
        timeout_seconds: how long to wait for the others. A process that came before process 0 may wait that long
            for it and that long again for the rest.
        say: gets a line, on process 0, about clocks that differ.

    Returns:
        Process 0's card.

    Raises:
        UserError: processes are missing, an id is there twice, or cards or numbers of processes differ, which
            all that are there hear; or this one cannot reach process 0, or another program has its port.
    """
    hello = {
        "process_id": launch.process_id,
        "num_processes": launch.num_processes,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "card": dict(card),
    }
    deadline = time.monotonic() + timeout_seconds
    if launch.process_id != 0:
        return _join(launch, hello, deadline, timeout_seconds)
    with _Chair(_listen(launch, hello, deadline), launch.num_processes, timeout_seconds, say):
        # Process 0 comes through the coordinator's address, too: it may be another machine's.
        return _join(launch, hello, deadline, timeout_seconds)


def _join(launch: Launch, hello: Hello, deadline: float, timeout_seconds: float) -> dict:
    """Say hello to process 0, again and again until it is there, and wait for its answer."""
    host, port = split_address(launch.coordinator)
    pause = 0.1
    while True:
        try:
            # It may have started just now, and then waits for the others as long as we have waited for it.
            return _ask(host, port, hello, answer_seconds=timeout_seconds + 2 * LINGER_SECONDS)
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                hint = f"is process 0 running there, and may {hello['host']} connect to port {port}?"
                if launch.process_id == 0:
                    hint = f"distributed.coordinator must be an address of its own machine, {hello['host']}"
                raise UserError(
                    f"process {launch.process_id} could not reach process 0 at {launch.coordinator} within "
                    f"{timeout_seconds:g} s ({getattr(error, 'strerror', None) or error}); {hint}"
                ) from None
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(1.0, 1.5 * pause)


def _ask(host: str, port: int, hello: Hello, answer_seconds: float) -> dict:
    """One hello and its answer, process 0's card.

    Raises:
        UserError: the answer is that something is wrong.
        OSError, ValueError: there is no answer, or not from process 0.
    """
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
        connection.sendall(_line(hello | {"time": time.time()}))
        connection.settimeout(answer_seconds)
        with connection.makefile("rb") as lines:
            answer = lines.readline(MAX_LINE_BYTES)
    if not answer.endswith(b"\n"):
        raise ConnectionResetError("it closed the connection")
    answer = _parse(answer, {})
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["card"]


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps({"protocol": PROTOCOL} | message).encode() + b"\n"


def _parse(line: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    """
    Raises:
        ValueError: no message of this protocol, or not with these fields.
    """
    try:
        message = json.loads(line)
        if message["protocol"] == PROTOCOL and all(isinstance(message[name], fields[name]) for name in fields):
            return message
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError("another program answers there")


def _listen(launch: Launch, hello: Hello, deadline: float) -> socket.socket:
    """Listen on the coordinator's port on all interfaces, as JAX will.

    Raises:
        UserError: the port is taken; by another process 0, if that one answers.
    """
    _, port = split_address(launch.coordinator)
    deadline = min(deadline, time.monotonic() + HELLO_SECONDS)  # a run that is just ending may still have it
    while True:
        try:
            return _bind(port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                with contextlib.suppress(OSError, ValueError):
                    _ask("localhost", port, hello, answer_seconds=2 * LINGER_SECONDS)
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise UserError(
                    f"process 0 cannot listen on port {port} of {hello['host']} ({os.strerror(error.errno)}); end the "
                    "program that has it, or choose another port in distributed.coordinator"
                ) from None
        time.sleep(0.2)


def _bind(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # IPv6 is known, but switched off
                raise
    return socket.create_server(("", port), backlog=1024)


@dataclass
class _Guest:
    """A connection, and the hello that came over it."""

    connection: socket.socket
    since: float
    received: bytes = b""
    hello: Hello | None = None

    def read(self) -> bool:
        """Take what has come; whether the guest may stay."""
        try:
            data = self.connection.recv(1 << 16)
            self.received += data
            if self.hello is None and b"\n" in self.received:
                hello = _parse(self.received, HELLO_FIELDS)
                self.hello = hello | {"ahead": hello["time"] - time.time()}
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            return False
        return bool(data) and len(self.received) < MAX_LINE_BYTES


class _Chair(threading.Thread):
    """Process 0's side: hears every hello, judges, and answers all at once. A context that waits for its end."""

    def __init__(self, listener: socket.socket, num_processes: int, timeout_seconds: float, say: Callable[[str], None]):
        super().__init__(name="gptjax-meeting", daemon=True)
        self._listener, self._num_processes, self._timeout_seconds = listener, num_processes, timeout_seconds
        self._say, self._left = say, threading.Event()
        self._guests: dict[socket.socket, _Guest] = {}

    def __enter__(self) -> "_Chair":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self.join()

    def run(self) -> None:
        try:
            with self._listener, selectors.DefaultSelector() as selector:
                self._listener.setblocking(False)
                selector.register(self._listener, selectors.EVENT_READ)
                hellos = self._gather(selector)
            if hellos is not None:
                self._answer(sorted(hellos, key=lambda hello: hello["process_id"]))
        finally:
            for connection in self._guests:
                connection.close()

    def _gather(self, selector: selectors.BaseSelector) -> list[Hello] | None:
        """Hellos until all are there, or time is up, or something is wrong and was heard; None if process 0 left."""
        end = last_call = time.monotonic() + self._timeout_seconds
        while not self._left.is_set():
            ready, now = {key.fileobj for key, _ in selector.select(timeout=0.1)}, time.monotonic()
            for connection, guest in list(self._guests.items()):
                silent = guest.hello is None and now > guest.since + HELLO_SECONDS
                if silent or (connection in ready and not guest.read()):
                    selector.unregister(connection)
                    self._guests.pop(connection).connection.close()
            if self._listener in ready:
                with contextlib.suppress(OSError):  # it has gone again
                    connection, _ = self._listener.accept()
                    connection.setblocking(False)
                    selector.register(connection, selectors.EVENT_READ)
                    self._guests[connection] = _Guest(connection, now)
            hellos = [guest.hello for guest in self._guests.values() if guest.hello]
            expected = max([self._num_processes, *(hello["num_processes"] for hello in hellos)])
            last_call = min(last_call, now + LINGER_SECONDS) if contradiction(hellos) else end
            if len(hellos) >= expected or now > last_call:
                return hellos
        return None

    def _answer(self, hellos: Sequence[Hello]) -> None:
        problem = (
            contradiction(hellos)
            or missing(hellos, self._num_processes, self._timeout_seconds)
            or different_cards(hellos)
        )
        if not problem and (warning := different_clocks(hellos)):
            self._say(warning)
        answer = {"error": problem} if problem else {"card": hellos[0]["card"]}
        guests = [guest.connection for guest in self._guests.values() if guest.hello]
        for connection in guests:
            connection.settimeout(FAREWELL_SECONDS)
            with contextlib.suppress(OSError):
                connection.sendall(_line(answer))
        # Whoever closes first keeps the port in TIME_WAIT: let the others do it.
        deadline = time.monotonic() + FAREWELL_SECONDS
        for connection in guests:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                connection.recv(1)


def contradiction(hellos: Sequence[Hello]) -> str | None:
    """What is wrong with those that are there, whoever may still come."""
    by_id: dict[int, Hello] = {}
    for hello in hellos:
        if hello["num_processes"] != hellos[0]["num_processes"]:
            return (
                f"{_name(hello)} was started as one of {hello['num_processes']}, {_name(hellos[0])} as one of "
                f"{hellos[0]['num_processes']}; distributed.num_processes must be the same everywhere"
            )
        other = by_id.setdefault(hello["process_id"], hello)
        if other is not hello:
            return (
                f"two processes have distributed.process_id {hello['process_id']}: on {other['host']} "
                f"(pid {other['pid']}) and on {hello['host']} (pid {hello['pid']}); each needs its own, from 0 to "
                f"{hello['num_processes'] - 1}"
            )
    return None


def missing(hellos: Sequence[Hello], num_processes: int, timeout_seconds: float) -> str | None:
    there = {hello["process_id"] for hello in hellos}
    absent = [str(number) for number in range(num_processes) if number not in there]
    if not absent:
        return None
    came = _listed([f"{hello['process_id']} on {hello['host']}" for hello in hellos])
    return (
        f"{len(there)} of {num_processes} processes came within {timeout_seconds:g} s; missing: process "
        f"{_listed(absent)}; those that came: {came}"
    )


def different_cards(hellos: Sequence[Hello]) -> str | None:
    """The keys in which the first card that is not process 0's differs from it."""
    first, *others = hellos
    differing = [hello for hello in others if hello["card"] != first["card"]]
    if not differing:
        return None
    here, there = flatten(first["card"]), flatten(differing[0]["card"])
    keys = [key for key in sorted(here | there) if key not in here or key not in there or here[key] != there[key]]
    said = [f"{key} {_show(there, key)}, {_name(first)} {_show(here, key)}" for key in keys]
    more = f"; {len(keys) - MAX_KEYS} more differ" if len(keys) > MAX_KEYS else ""
    like = f"; so do process {_listed([str(hello['process_id']) for hello in differing[1:]])}" if differing[1:] else ""
    return f"{_name(differing[0])} has {'; '.join(said[:MAX_KEYS])}{more}{like}"


def different_clocks(hellos: Sequence[Hello]) -> str | None:
    far = {
        hello["host"]: f"{hello['host']} by {hello['ahead']:+.0f} s"
        for hello in hellos
        if abs(hello["ahead"]) > MAX_CLOCK_DIFFERENCE_SECONDS
    }
    if not far:
        return None
    return (
        f"warning: clocks differ from that of {hellos[0]['host']}: {_listed([*far.values()])}; times in logs will, too"
    )


def flatten(card: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one, with dots between the keys."""
    flat = {}
    for key, value in card.items():
        inner = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _show(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "nothing"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _name(hello: Hello) -> str:
    return f"process {hello['process_id']} on {hello['host']}"


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more
