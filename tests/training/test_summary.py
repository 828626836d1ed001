"""What a run says of itself at its end."""

import subprocess
import sys

import pytest

CHILD = "from gptjax.training.summary import peak_memory_bytes; print(peak_memory_bytes())"
PARENT = """
import subprocess, sys
large = bytearray(b"1") * (2 << 30)
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only getrusage tells")
def test_memory_is_of_this_process_alone():
    """Not of the one that started it, which may be a notebook with gigabytes of its own."""
    done = subprocess.run([sys.executable, "-c", PARENT, CHILD], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 1 << 30
