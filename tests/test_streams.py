"""Whatever standard output is connected to, a command ends with one line at most, and a run that trains goes on."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax import cli
from gptjax.__main__ import COMMANDS
from gptjax.__main__ import main as gptjax_main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run_on(monkeypatch):
    """Runs a command whose standard output is this file: its exit status, and what it said on standard error."""

    def run(file, main, *arguments, encoding="utf-8", ends_with_reader=False):
        out = io.TextIOWrapper(file if isinstance(file, io.BytesIO) else os.fdopen(file, "wb"), encoding)
        errors = io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace")
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", errors)
        with pytest.raises(SystemExit) as ended:
            cli.run_command(main, ends_with_reader=ends_with_reader)
        out.flush()  # as Python does at exit
        out.detach() if isinstance(file, io.BytesIO) else out.close()
        errors.flush()
        return ended.value.code, errors.buffer.getvalue().decode()

    return run


def a_pipe_without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def shows(arguments):
    """As much as fills any buffer, in the letters of several scripts."""
    for _ in range(2000):
        print("× 你好 🙂 \udcff", flush=True)
    return 0


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_every_command_on_every_output(name, run_on):
    """Of each command its help, which all print and none waits for; and a command that prints much."""
    main, words = (shows, ()) if name is None else (gptjax_main, (name, "--help"))
    assert run_on(os.open("/dev/full", os.O_WRONLY), main, *words) == (
        2,
        "error: cannot write to standard output: No space left on device\n",
    )
    assert run_on(a_pipe_without_reader(), main, *words) == (0, "")
    assert run_on(a_pipe_without_reader(), main, *words, ends_with_reader=True) == (0, "")
    for encoding in ("ascii", "latin-1", "cp1252", "utf-8"):
        written = io.BytesIO()
        assert run_on(written, main, *words, encoding=encoding) == (0, "")
        written.getvalue().decode(encoding)


def test_a_reader_that_leaves_stops_no_work(run_on, tmp_path):
    """What makes files makes them; only a command that is for nothing but its output ends."""

    def works(arguments):
        shows(arguments)
        Path(arguments[0]).touch()
        return 0

    for ends, made in ((False, True), (True, False)):
        path = tmp_path / str(ends)
        assert run_on(a_pipe_without_reader(), works, str(path), ends_with_reader=ends) == (0, "")
        assert path.exists() is made


def test_a_full_disk_under_standard_output_stops_no_work(run_on, tmp_path):
    def works(arguments):
        shows(arguments)
        (tmp_path / "made").touch()
        return 0

    assert run_on(os.open("/dev/full", os.O_WRONLY), works)[0] == 2
    assert (tmp_path / "made").exists()


def test_a_full_disk_anywhere_is_one_line(run_on):
    def writes(arguments):
        with cli.open_output("/dev/full") as file:
            file.write("{}")

    assert run_on(io.BytesIO(), writes) == (2, "error: cannot write to /dev/full: No space left on device\n")

    def breaks(arguments):
        with open("/dev/full", "w") as file:
            file.write("picture")

    assert run_on(io.BytesIO(), breaks) == (2, "error: cannot write a file: No space left on device\n")


@pytest.fixture
def interruptible():
    """As at a terminal: a job in the background ignores SIGINT, and so do the tests that it runs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("number", "status", "line"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 75, "terminated\n")]
)
def test_a_signal_unwinds_and_is_one_line(number, status, line, run_on):
    unwound = []

    def works(arguments):
        try:
            signal.raise_signal(number)
        finally:
            unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert run_on(io.BytesIO(), works) == (status, line)
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_dev_null(closed, tmp_path):
    """No file that is opened later may take their numbers, or what is printed is written into it."""
    code = (
        "import sys, os\nfrom gptjax import cli\n"
        "def main(arguments):\n"
        "    with open(arguments[0], 'w') as file:\n"
        "        file.write(str(file.fileno())); print('shown'); print('said', file=sys.stderr)\n"
        "        os.write(1, b'xla'); os.write(2, b'xla'); sys.stdin.read()\n"
        "    return 0\n"
        "cli.run_command(main)"
    )
    command = f'"$0" -c "$1" "$2" {closed}'
    shell = ["bash", "-c", command, sys.executable, code, str(tmp_path / "file")]
    ended = subprocess.run(shell, cwd=ROOT, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert int((tmp_path / "file").read_text()) > 2


def test_a_run_trains_to_its_end_whatever_becomes_of_its_output(inside, run_on):
    """In letters that the output lacks, without a reader, and on a full disk: the same metrics."""
    from train import main

    def trained(file, name, **options):
        words = ("tiny.py", "--training.steps", "2", "--training.sample-prompt", "猫 ×", "--tokenizer.kind", "byte")
        ended = run_on(file, main, *words, "--run-dir", f"runs/streams-{name}", **options)
        summary = json.loads(Path(f"runs/streams-{name}/summary.json").read_text(encoding="utf-8"))
        assert (summary["stopped"], summary["step"]) == ("finished", 2)
        return ended, summary["final_loss"]

    (plain, loss), (left, same), (full, again) = (
        trained(io.BytesIO(), "ascii", encoding="ascii"),
        trained(a_pipe_without_reader(), "left"),
        trained(os.open("/dev/full", os.O_WRONLY), "full"),
    )
    assert (plain[0], left[0], full[0]) == (0, 0, 2)
    assert loss == same == again


def test_a_name_that_is_too_long_is_one_line(run_on):
    for main, words in ((gptjax_main, ("evaluate", "a" * 300)), (gptjax_main, ("env", "--json", "漢" * 100))):
        status, said = run_on(io.BytesIO(), main, *words)
        assert (status, said.count("\n")) == (2, 1)
        assert "File name too long" in said
