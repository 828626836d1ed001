"""Settings that entry points make before JAX starts."""

import ctypes
import subprocess
import sys

import pytest

AGAIN = """
import ctypes, resource
from gptjax.parallel import platform
platform.configure()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(2):
    before, block = page_faults(), libc.malloc(2**26)  # as much as XLA's temporaries of a small model's step
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
print(page_faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another libc than glibc")
def test_freed_memory_is_there_the_next_time():
    """A block that is allocated for every step is not cleared and mapped, page by page, in every step."""
    ended = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 2**26 / 4096 / 16, ended.stdout
