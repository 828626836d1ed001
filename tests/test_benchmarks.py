"""The speed benchmarks run where loader, command line and tokenizers are missing, and their JSON has its keys."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"grain", "tyro", "tokenizers", "filelock"}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1].rsplit("/", 1)[0])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = [
    *("configs/quickstart.py", "--vocab-size", "61", "--json", "-", "--model.context-length", "32"),
    *("--model.num-layers", "2", "--model.model-dim", "32", "--model.num-heads", "4"),
]


def run(script: str, *options: str) -> subprocess.CompletedProcess:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, str(ROOT / "benchmarks" / script), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train_speed.py", ["--batch-sizes", "2", "4", "--blocks", "2", "--steps", "2"]),
        ("decode_speed.py", ["--batch-sizes", "1", "2", "--rounds", "2"]),
    ],
)
def test_a_row_for_each_batch_size(script, options):
    result = run(script, *SMALL, *options)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["batch_size"] for row in rows] == [int(option) for option in options[1:3]]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["compile_seconds"] > 0
        assert row["peak_memory_bytes"] > 0
        assert row["mfu"] is None, "a CPU's peak is unknown"
        assert row["device_count"] == 1
        # 2 layers of attention and feed-forward with norms, embedding and final norm, counted by hand.
        assert row["parameters"] == 2 * (4 * 32 * 32 + 2 * 32 * 128 + 2 * 32 + 2 * 8) + 61 * 32 + 32


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.num-layer", "2"], "num_layer"),
        (["--models.num-layers", "2"], "no section 'models'"),
        (["--model.num-heads", "7"], "nearest"),
    ],
)
def test_wrong_overrides_are_one_line(options, expected):
    result = run("train_speed.py", "configs/quickstart.py", *options)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert expected in result.stderr


def test_attention_speed_times_what_runs_and_says_what_does_not():
    result = run("attention_speed.py", *("--lengths", "65", "--repeats", "1", "--documents", "3", "--json", "-"))
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["kernel"] for row in rows] == ["xla", "blockwise"]
    for row in rows:
        assert row["ms"] > 0
        assert row["temp_mb"] > 0
        assert row["error"] < 1e-5
    assert "cudnn needs an NVIDIA GPU" in result.stderr
