"""One run in a folder: who holds it, how it gets free, and what happens when the folder goes."""

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.errors import UserError
from gptjax.training import lock
from gptjax.training.lock import LOCK_FILE, hold

HOLD = """
import sys
from gptjax.training.lock import hold
with hold(sys.argv[1], print):
    print("held", flush=True)
    input()
"""


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path):
    with hold(tmp_path, print):
        with pytest.raises(UserError) as error, hold(tmp_path, print):
            pass
        assert f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()} since 20" in str(error.value)
        assert "\n" not in str(error.value)
        assert (tmp_path / LOCK_FILE).exists(), "the one that was refused has not removed it"
    assert not (tmp_path / LOCK_FILE).exists()
    with hold(tmp_path, print):
        pass


def test_the_lock_goes_with_the_process_however_it_dies(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {process.pid} on "), hold(tmp_path, print):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    with hold(tmp_path, print):
        pass


@pytest.mark.parametrize("gone", ["moved", "deleted", "replaced", "parent deleted"])
def test_a_folder_that_is_gone_is_noticed(tmp_path, gone):
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    with hold(folder, print) as require_there:
        require_there()
        if gone == "parent deleted":
            shutil.rmtree(folder.parent)
        else:
            folder.rename(tmp_path / "b")
        if gone == "deleted":
            shutil.rmtree(tmp_path / "b")
        if gone == "replaced":
            folder.mkdir()
            (folder / LOCK_FILE).touch()  # of a run that is there now
        with pytest.raises(UserError, match="runs/a was moved, renamed or deleted while this run wrote there"):
            require_there()
    assert folder.exists() == (gone == "replaced"), "nothing was made at the old place"
    assert (folder / LOCK_FILE).exists() == (gone == "replaced"), "nor taken from others"


def test_deleting_the_lock_file_alone_stops_nobody(tmp_path):
    with hold(tmp_path, print) as require_there:
        (tmp_path / LOCK_FILE).unlink()
        require_there()


def test_a_lock_that_was_removed_meanwhile_is_not_the_lock(tmp_path, monkeypatch):
    """Between opening and locking, its holder ends and removes it: a file that nobody finds keeps nobody out."""
    flock, calls = fcntl.flock, []

    def late(file, operation):
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with hold(tmp_path, print):
        assert len(calls) == 2
        with pytest.raises(UserError, match="in use by"), hold(tmp_path, print):
            pass


def test_a_file_system_without_locks_is_said_and_no_reason_to_stop(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    lines = []
    with hold(tmp_path, lines.append):
        pass
    assert lines == [f"{tmp_path} cannot be locked (No locks available): take care that no other run writes there"]
