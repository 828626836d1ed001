"""The meeting before JAX starts: all come, or every one hears in one line who or what is missing."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gptjax.errors import UserError
from gptjax.parallel import rendezvous
from gptjax.parallel.launch import Launch
from gptjax.parallel.rendezvous import different_cards, meet, missing

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    for name, seconds in {"LINGER": 0.3, "HELLO": 0.5, "FAREWELL": 0.5}.items():
        monkeypatch.setattr(rendezvous, f"{name}_SECONDS", seconds)


@pytest.fixture
def port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def launch(port: int, process_id: int, num_processes: int) -> Launch:
    return Launch(f"localhost:{port}", num_processes, process_id, None, "flags")


def attend(port, process_id, num_processes, card=None, timeout=10.0, delay=0.0, say=print) -> dict | str:
    """What `meet` returns, or the text of its error."""
    time.sleep(delay)
    try:
        return meet(launch(port, process_id, num_processes), card or {"seed": 0}, timeout, say)
    except UserError as error:
        return str(error)


def attend_all(port: int, *arguments: tuple, **options) -> list[dict | str]:
    with ThreadPoolExecutor(len(arguments)) as pool:
        return [future.result() for future in [pool.submit(attend, port, *a, **options) for a in arguments]]


def hello(process_id: object, num_processes: int = 2, host: str = "hostA", **fields) -> dict:
    return {
        "protocol": rendezvous.PROTOCOL,
        "process_id": process_id,
        "num_processes": num_processes,
        "host": host,
        "pid": 7,
        "time": time.time(),
        "card": {"seed": 0},
    } | fields


def send(port: int, data: bytes) -> socket.socket:
    """A connection, as soon as there is one, over which this was sent."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("localhost", port), timeout=10)
            connection.sendall(data)
            return connection
        time.sleep(0.02)
    raise AssertionError("nobody listens")


def test_all_get_the_card_of_process_0(port):
    """At once when all are there, in whatever order they come; as JSON gives it back."""
    start = time.monotonic()
    card = {"seed": 0, "model": {"pattern": ("dense", "local"), "bias": None}}
    answers = attend_all(port, (2, 3, card), (0, 3, card, 10.0, 0.3), (1, 3, card, 10.0, 0.6))
    assert answers == [{"seed": 0, "model": {"pattern": ["dense", "local"], "bias": None}}] * 3
    assert time.monotonic() - start < 3


def test_many_processes_meet(port):
    assert attend_all(port, *[(number, 60) for number in reversed(range(60))]) == [{"seed": 0}] * 60


def test_the_port_is_free_at_once(port):
    """JAX's service takes the same port right after the meeting; nothing may linger on it."""
    for _ in range(5):
        assert attend_all(port, (0, 2), (1, 2)) == [{"seed": 0}] * 2
        with socket.socket() as plain:  # without SO_REUSEADDR
            plain.bind(("localhost", port))


def test_missing_processes_are_named(port):
    answers = attend_all(port, (0, 4, None, 1), (2, 4, None, 1))
    assert (
        answers[0]
        == answers[1]
        == (f"2 of 4 processes came within 1 s; missing: process 1, 3; those that came: 0 on {HOST}, 2 on {HOST}")
    )


def test_long_lists_are_cut():
    line = missing([hello(number, 100) for number in range(0, 100, 2)], 100, 300)
    assert line.startswith("50 of 100 processes came within 300 s; missing: process 1, 3, 5, 7, 9, 11, 13, 15 and 42")
    assert line.endswith("14 on hostA and 42 more")


def test_a_process_that_left_again_is_missing_and_may_come_back(port):
    """A killed process closes its connection: it is not there any more, nor twice when it comes again."""
    gone = json.dumps(hello(1, 3)).encode() + b"\n"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(attend, port, 0, 3, None, 1)
        send(port, gone).close()
        assert "1 of 3 processes came within 1 s; missing: process 1, 2;" in first.result()
        first = pool.submit(attend, port, 0, 3)
        send(port, gone).close()
        time.sleep(0.2)
        assert attend_all(port, (1, 3), (2, 3)) == [first.result()] * 2 == [{"seed": 0}] * 2


def test_process_0_that_never_comes_is_named(port):
    start = time.monotonic()
    line = attend(port, 1, 2, None, 1)
    assert time.monotonic() - start < 3
    assert line.startswith(f"process 1 could not reach process 0 at localhost:{port} within 1 s (Connection refused); ")
    assert line.endswith(f"is process 0 running there, and may {HOST} connect to port {port}?")


def test_a_process_0_that_is_killed_is_noticed(port):
    """Its peers do not wait for an answer that cannot come, nor longer than they were told."""
    code = "from gptjax.parallel.rendezvous import *\nfrom gptjax.parallel.launch import *\n"
    code += f"meet(Launch('localhost:{port}', 3, 0, None, ''), {{}}, 60)"
    with subprocess.Popen([sys.executable, "-c", code]) as process, ThreadPoolExecutor() as pool:
        peer = pool.submit(attend, port, 1, 3, {}, 2)
        send(port, b"").close()  # it listens
        time.sleep(0.3)
        start = time.monotonic()
        process.kill()
        assert "could not reach process 0" in peer.result()
        assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("process_id", "hint"), [(0, f"must be an address of its own machine, {HOST}$"), (1, "is process 0 running there")]
)
def test_an_address_that_leads_nowhere(port, process_id, hint):
    """Process 0 comes through its own address, and so notices when that is another machine's."""
    with pytest.raises(UserError, match=rf"process 0 at no\.such\.host\.invalid:{port} within 1 s \(.*\); .*{hint}"):
        meet(Launch(f"no.such.host.invalid:{port}", 2, process_id, None, "flags"), {}, 1)


def test_one_id_twice(port):
    answers = attend_all(port, (0, 3), (1, 3), (1, 3))
    pid = os.getpid()
    assert (
        answers
        == [
            f"two processes have distributed.process_id 1: on {HOST} (pid {pid}) and on {HOST} (pid {pid}); "
            "each needs its own, from 0 to 2"
        ]
        * 3
    )


def test_process_0_twice_on_one_machine(port):
    """The second cannot have the port; it asks there, and both hear."""
    answers = attend_all(port, (0, 2), (0, 2))
    assert all("two processes have distributed.process_id 0: on " in answer for answer in answers)


def test_numbers_of_processes_differ(port):
    answers = attend_all(port, (0, 2), (1, 3), (2, 3))
    assert len(set(answers)) == 1
    assert "process 1 on " in answers[0]
    assert "was started as one of 3, process 0 on " in answers[0]
    assert "as one of 2; distributed.num_processes must be the same everywhere" in answers[0]


def test_something_wrong_is_told_before_the_time_is_up(port):
    """Whoever still misses is not waited for."""
    start = time.monotonic()
    answers = attend_all(port, (0, 9), (1, 9), (1, 9), timeout=30)
    assert all("distributed.process_id 1" in answer for answer in answers)
    assert time.monotonic() - start < 3


def test_cards_differ(port):
    def card(seed: int) -> dict:
        return {"configuration": {"training": {"seed": seed, "steps": 5}}, "versions": {"jax": "0.10.1"}}

    answers = attend_all(port, (0, 3, card(0)), (1, 3, card(1)), (2, 3, card(1)))
    assert (
        answers
        == [f"process 1 on {HOST} has configuration.training.seed 1, process 0 on {HOST} 0; so do process 2"] * 3
    )


def test_differences_are_listed_up_to_five():
    cards = [{name: {"x": number} for name in "abcdefg"} for number in range(2)]
    line = different_cards([hello(0, card=cards[0]), hello(1, host="hostB", card=cards[1])])
    assert line.startswith("process 1 on hostB has a.x 1, process 0 on hostA 0; b.x 1, process 0 on hostA 0; c.x")
    assert line.count(".x") == 5
    assert "2 more" in line


@pytest.mark.parametrize(("key", "value"), [("host", "hostB"), ("pid", 8), ("time", 0.0)])
def test_hosts_need_not_be_the_same(key, value):
    assert different_cards([hello(0), hello(1, **{key: value})]) is None


@pytest.mark.parametrize(
    ("ahead", "said"), [(75, "hostB by +75 s"), (-3600, "hostB by -3600 s"), (50, None), (-50, None)]
)
def test_clocks_that_differ_are_told(port, ahead, said):
    """It is a warning: training does not depend on the time of day."""
    lines = []
    with ThreadPoolExecutor() as pool:
        first = pool.submit(attend, port, 0, 2, say=lines.append)
        with send(port, json.dumps(hello(1, host="hostB", time=time.time() + ahead)).encode() + b"\n") as peer:
            assert json.loads(peer.makefile().readline())["card"] == {"seed": 0}
        assert first.result() == {"seed": 0}
    assert lines == ([f"warning: clocks differ from that of {HOST}: {said}; times in logs will, too"] if said else [])


GARBAGE = {
    "silence": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes": bytes(range(256)) * 8 + b"\n",
    "half a hello": json.dumps(hello(1)).encode()[:40],
    "another protocol": json.dumps(hello(1, protocol="x")).encode() + b"\n",
    "no id": json.dumps(hello("1")).encode() + b"\n",
    "nothing": b"{}\n",
    "a list": b"[1]\n",
    "deep": b"[" * 100_000 + b"\n",
    "no end": b"x" * (rendezvous.MAX_LINE_BYTES + 1),
}


def test_garbage_is_ignored(port):
    """A port scanner's connections, open while the others meet, neither break the meeting nor delay it."""
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as opened:
        first = pool.submit(attend, port, 0, 2)
        for data in GARBAGE.values():
            with contextlib.suppress(OSError):  # it was thrown out while it was talking
                opened.enter_context(send(port, data))
        start = time.monotonic()
        assert attend(port, 1, 2) == first.result() == {"seed": 0}
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("name", ["silence", "http", "deep", "no end"])
def test_garbage_is_thrown_out(port, name, monkeypatch):
    """A connection that says nothing in time is closed long before the meeting ends, and nonsense at once."""
    monkeypatch.setattr(rendezvous, "HELLO_SECONDS", 0.5 if name == "silence" else 60)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(attend, port, 0, 2)
        try:
            with send(port, GARBAGE[name]) as connection:
                connection.settimeout(3)
                assert connection.recv(1) == b""
        except ConnectionError:  # it was thrown out while it was talking
            pass
        assert attend(port, 1, 2) == first.result() == {"seed": 0}


@pytest.mark.parametrize("banner", [b"SSH-2.0-OpenSSH\r\n", b'{"card": {"seed": 1}}\n', b"x" * 3_000_000])
def test_a_port_that_another_program_has(port, banner):
    """Process 0 cannot listen there, and the others do not take that program for it."""
    stop = threading.Event()

    def serve() -> None:
        with socket.create_server(("", port)) as server:
            server.settimeout(0.1)
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(banner)

    with ThreadPoolExecutor() as pool:
        pool.submit(serve)
        send(port, b"").close()
        try:
            first, second = attend_all(port, (0, 2, None, 1), (1, 2, None, 1))
        finally:
            stop.set()
    assert first == (
        f"process 0 cannot listen on port {port} of {HOST} (Address already in use); end the program that has it, or "
        "choose another port in distributed.coordinator"
    )
    assert second.startswith(f"process 1 could not reach process 0 at localhost:{port} within 1 s (")
