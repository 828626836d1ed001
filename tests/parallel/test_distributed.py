"""Real processes that agree, over Gloo on this machine: each writes down what it saw, which is compared here."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.errors import UserError
from gptjax.parallel import distributed
from gptjax.parallel.launch import DistributedConfig

ROOT = Path(__file__).parent.parent.parent

START = """
import json, os, sys, time
from pathlib import Path
from gptjax.errors import UserError
from gptjax.parallel import distributed as d, messages
from gptjax.parallel.launch import DistributedConfig

coordinator, num_processes, number, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
config = DistributedConfig(coordinator, num_processes, number, 30)
alone = [d.num_processes(), d.is_first()]

def attempt(action):
    try:
        return action()
    except UserError as error:
        return f"refused: {error}"

def fail():
    raise UserError(f"I am {number}")
"""

AGREE = """
import jax
from jax.sharding import AxisType

# By flags inside a Slurm task: JAX would look there for what is not given, and take one GPU.
slurm = {"JOB_ID": "1", "STEP_NODELIST": "node", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
os.environ.update({f"SLURM_{name}": value for name, value in slurm.items()})
d.SHARED_SECONDS = 0.3
messages.WAIT_SECONDS = 0.02  # so that who waits for process 0 looks again many times
seen = {"alone": alone, "agreed": d.connect(config, {"seed": (0, 1)}), "first": d.is_first(), "of": d.num_processes()}
seen["gpus"] = jax.config.values["jax_cuda_visible_devices"]
seen["texts"] = d.gather_text("ab\\N{SNOWMAN}" * number)

seen["from first"] = [d.from_first(lambda: [number, 0.1]), attempt(lambda: d.from_first(fail))]
mesh = jax.make_mesh((6,), ("data",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(mesh), jax.transfer_guard("disallow"):  # as in the training loop
    seen["in mesh"] = d.gather_text(str(number))

def agree(*failing):
    with d.together():
        if number in failing:
            raise UserError(f"I am {number}")
    return "fine"

seen["together"] = [attempt(lambda: agree(*failing)) for failing in [(), (1,), (1, 2), (0, 2)]]

def in_turn(name, *failing):
    made = folder / name
    with d.first_then_others():
        there = made.exists()
        if number == 0:
            time.sleep(0.2)  # long enough for the others to come, if nothing held them
        if number in failing:
            raise UserError(f"I am {number}")
        made.touch()
        (folder / f"{name} ran in {number}").touch()
    return there

seen["in turn"] = [attempt(lambda: in_turn(str(failing), *failing)) for failing in [(), (0,), (2,)]]

def shared(name):
    os.makedirs(folder / name, exist_ok=True)
    d.gather_text("")  # all are made
    d.check_shared(folder / name)
    d.gather_text("")  # all have looked
    return os.listdir(folder / name)

seen["shared"] = [attempt(lambda: shared(name)) for name in ("one", f"one{number // 2}", f"own{number}")]
seen["not there"] = attempt(lambda: d.check_shared(folder / "none"))
(folder / f"seen{number}.json").write_text(json.dumps(seen))
"""

OTHER_DEVICES = """
print(attempt(lambda: d.connect(config, {})), file=sys.stderr)
sys.exit(2)
"""

FAIL_ALONE = """
import signal, threading
d.PARTING_SECONDS = 0.5
who, how, waits = os.environ["FAILS"].split()
with d.fail_fast():
    d.connect(config, {})
    d.gather_text("")
    messages.WAIT_SECONDS = 0.05
    if number == int(who):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"UserError": UserError, "RuntimeError": RuntimeError}[how]("I fail\\nalone")
    if number == int(waits):
        threading.Event().wait(50)
    with d.first_then_others():
        pass
"""


PART_ALONE = """
import threading
import jax

jax.distributed.initialize(coordinator, num_processes, number)
d.PARTING_SECONDS = 0.1
try:
    with d.fail_fast():
        raise UserError("nobody else has this error")
except UserError:
    print("passed on", flush=True)
threading.Event().wait()  # for others that do not leave, as JAX does at exit
"""


def run_all(code: str, folder: Path, num_devices: list[int]) -> list[subprocess.CompletedProcess]:
    """As many processes as there are numbers of devices, each running this code after `START`, to their end."""
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    processes = []
    for number, count in enumerate(num_devices):
        flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
        environment = os.environ | {"XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", START + code, address, str(len(num_devices)), str(number), str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        ended = [(process, *process.communicate(timeout=60)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [subprocess.CompletedProcess(process.args, process.returncode, out, err) for process, out, err in ended]


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory) -> tuple[Path, list[dict], list[subprocess.CompletedProcess]]:
    """The folder in which three processes ran `AGREE`, what each saw, and how each ended."""
    folder = tmp_path_factory.mktemp("agreeing")
    ended = run_all(AGREE, folder, [2, 2, 2])
    assert [process.returncode for process in ended] == [0, 0, 0], "".join(process.stderr for process in ended)
    return folder, [json.loads((folder / f"seen{number}.json").read_text()) for number in range(3)], ended


def test_three_processes_connect(agreeing):
    """Process 0 says what there is; before, asking who is first has not started JAX, or connecting would fail."""
    _, seen, ended = agreeing
    assert "hosts: 3 processes on 1 host (flags), 6 devices: 2 + 2 + 2\n" in ended[0].stdout
    assert all("hosts:" not in process.stdout for process in ended[1:])
    assert [one["alone"] for one in seen] == [[1, True]] * 3
    assert [one["agreed"] for one in seen] == [{"seed": [0, 1]}] * 3
    assert [one["first"] for one in seen] == [True, False, False]
    assert [one["of"] for one in seen] == [3] * 3


def test_flags_inside_slurm_leave_every_gpu_to_the_process(agreeing):
    _, seen, _ = agreeing
    assert [one["gpus"] for one in seen] == ["all"] * 3


def test_texts_of_any_length_are_gathered(agreeing):
    _, seen, _ = agreeing
    assert [one["texts"] for one in seen] == [["", "ab☃", "ab☃ab☃"]] * 3
    assert [one["in mesh"] for one in seen] == [["0", "1", "2"]] * 3


def test_an_error_of_one_is_raised_by_all(agreeing):
    """By itself as it is, by the others with its number, of several errors the first."""
    _, seen, _ = agreeing
    assert [one["together"] for one in seen] == [
        ["fine", "refused: process 1: I am 1", "refused: process 1: I am 1", "refused: I am 0"],
        ["fine", "refused: I am 1", "refused: I am 1", "refused: process 0: I am 0"],
        ["fine", "refused: process 1: I am 1", "refused: I am 2", "refused: I am 2"],
    ]


def test_what_process_0_alone_makes_all_have(agreeing):
    _, seen, _ = agreeing
    assert [one["from first"] for one in seen] == [
        [[0, 0.1], "refused: I am 0"],
        [[0, 0.1], "refused: process 0: I am 0"],
        [[0, 0.1], "refused: process 0: I am 0"],
    ]


def test_process_0_goes_first(agreeing):
    """The others find what it made; if it fails they do not begin, and all hear of it."""
    folder, seen, _ = agreeing
    assert [one["in turn"] for one in seen] == [
        [False, "refused: I am 0", "refused: process 2: I am 2"],
        [True, "refused: process 0: I am 0", "refused: process 2: I am 2"],
        [True, "refused: process 0: I am 0", "refused: I am 2"],
    ]
    assert [len(list(folder.glob(f"{name} ran in *"))) for name in ("()", "(0,)", "(2,)")] == [3, 0, 2]


def test_a_folder_that_is_not_shared_is_refused(agreeing):
    """By all, with the processes that see another; nothing is left behind."""
    folder, seen, _ = agreeing
    host = socket.gethostname()
    for number, one in enumerate(seen):
        fine, pair, own = one["shared"]
        assert fine == []
        assert pair.startswith(f"refused: {folder}/one{number // 2} is not shared: what process 0 on {host} writes")
        assert f"writes there, process 2 on {host} does not see; " in pair
        assert f"writes there, process 1 on {host}, process 2 on {host} do not see; " in own
    assert not list(folder.glob("*/.*"))


def test_a_folder_that_process_0_cannot_write_to_is_refused(agreeing):
    folder, seen, _ = agreeing
    line = f"cannot write to {folder}/none: No such file or directory"
    assert [one["not there"] for one in seen] == [f"refused: {line}"] + [f"refused: process 0: {line}"] * 2


def test_different_numbers_of_devices_are_refused(tmp_path):
    """Both leave with their own status, and without a word from JAX."""
    line = "refused: processes have different numbers of devices, 3 devices: 1 + 2; give each the same number\n"
    ended = run_all(OTHER_DEVICES, tmp_path, [1, 2])
    assert [(process.returncode, process.stderr) for process in ended] == [(2, line)] * 2


def fail_alone(folder: Path, monkeypatch, num_processes: int, fails: str) -> list[subprocess.CompletedProcess]:
    monkeypatch.setenv("FAILS", fails)
    return run_all(FAIL_ALONE, folder, [1] * num_processes)


@pytest.mark.parametrize("who", [0, 1])
def test_a_failure_of_one_alone_ends_all_with_its_reason(who, tmp_path, monkeypatch):
    """Whoever waits for it is told at once. Without `fail_fast` each would wait for the other at exit."""
    ended = fail_alone(tmp_path, monkeypatch, 2, f"{who} RuntimeError -1")
    assert [process.returncode for process in ended] == [1, 1]
    assert ended[who].stderr.endswith("RuntimeError: I fail\nalone\n")
    assert ended[1 - who].stderr == f"error: process {who} failed: RuntimeError: I fail alone\n"


def test_an_error_of_one_alone_is_everybodys(tmp_path, monkeypatch):
    """Though it was not raised where all compare theirs."""
    first, second = fail_alone(tmp_path, monkeypatch, 2, "1 UserError -1")
    assert "UserError: I fail\nalone" in second.stderr
    assert "UserError: process 1: I fail\nalone" in first.stderr
    assert 0 not in (first.returncode, second.returncode)


def test_who_fails_is_heard_though_another_works(tmp_path, monkeypatch):
    """Process 0, which waits for process 1 first, does not wait for its work."""
    first, second, third = fail_alone(tmp_path, monkeypatch, 3, "2 RuntimeError 1")
    assert (first.returncode, first.stderr) == (1, "error: process 2 failed: RuntimeError: I fail alone\n")
    assert third.returncode == 1
    assert second.returncode not in (0, -9), "JAX ends it when process 0 is gone"


def test_process_0_that_is_killed_is_not_waited_for(tmp_path, monkeypatch):
    first, second = fail_alone(tmp_path, monkeypatch, 2, "0 killed -1")
    assert first.returncode == -9
    assert second.returncode not in (0, -9)


def test_nobody_waits_in_a_collective_for_work_on_the_host():
    """Those of devices give up after some minutes, and cannot say why."""
    named = re.compile("process_allgather|broadcast_one_to_all|sync_global_devices|multihost_utils.assert_equal")
    assert not [path for path in (ROOT / "gptjax").rglob("*.py") if named.search(path.read_text(encoding="utf-8"))]


def test_an_error_of_one_alone_waits_for_the_others_only_so_long(tmp_path):
    """Where the others do not leave, the process ends as it would have with them; nothing else would end this one."""
    (ended,) = run_all(PART_ALONE, tmp_path, [1])
    assert (ended.returncode, ended.stdout) == (2, "passed on\n"), ended.stderr


def test_one_process_needs_nobody(tmp_path):
    """Nothing is sent, written or changed: errors pass, and a folder is not even looked at."""
    assert distributed.connect(DistributedConfig(num_processes=1), {"seed": (0,)}) == {"seed": (0,)}
    assert (distributed.num_processes(), distributed.is_first()) == (1, True)
    assert distributed.gather_text("a") == ["a"]
    distributed.check_shared(tmp_path / "none")
    for block in (distributed.together, distributed.first_then_others, distributed.fail_fast):
        for error in (UserError, RuntimeError):
            with pytest.raises(error, match=r"^mine$"), block():
                raise error("mine")
