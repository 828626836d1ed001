"""Comparisons and the GPU's benchmarks: who takes turns with whom, on what shapes, and what stops them."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config_files import load_config, replace_fields
from gptjax.errors import UserError

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "config": Path("configs/gpt2_124m.py"),
    "dtypes": ["bfloat16"],
    "variant": None,
    "modes": ["compiled", "best"],
    "steps": 20,
    "vocab_size": None,
    "documents": 1,
    "against_python": "python-with-torch",
}
HIDDEN = "grain tyro tokenizers filelock".split()


@pytest.fixture
def benchmark_module(monkeypatch):
    """`benchmark_module(name)`: a module of benchmarks/, which find each other as their scripts' neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def without_packages(tmp_path):
    """Variables of a process that has one device and lacks what a GPU's image may lack."""
    for name in HIDDEN:
        (tmp_path / f"{name}.py").write_text("raise ImportError('hidden')", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NANOGPT")} | {
        "PYTHONPATH": path,
        "PYTHON": sys.executable,
    }


def test_arms_take_turns(tmp_path, without_packages):
    """Ours and a variant, two turns each in processes that stay: the same steps, the same loss, a ratio."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/train_speed.py", "configs/gpt2_124m.py", "--vocab-size", "61"]
    command += ["--model.num-layers", "2", "--model.model-dim", "32", "--model.num-heads", "4"]
    command += ["--model.context-length", "16", "--batch-sizes", "2", "--steps", "2", "--rounds", "2"]
    command += ["--dtypes", "float32", "--variant", "remat: --model.remat full MARK=1", "--json", str(file)]
    result = subprocess.run(command, cwd=ROOT, env=without_packages, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    ours, variant = json.loads(file.read_text(encoding="utf-8"))
    assert (ours["arm"], variant["arm"]) == ("ours float32", "remat float32")
    assert ours["steps"] == variant["steps"] == 6, "a warm-up and two blocks of two steps"
    assert variant["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert variant["flags"] == "MARK=1"
    assert "ratio" not in ours
    assert variant["ratio"] > 0
    assert len(variant["block_step_ms"]) == 2
    assert variant["config"] == "configs/gpt2_124m.py"
    assert str(tmp_path.parent) not in json.dumps(ours), "a kept result names no folder of a machine"


def test_numerics_run_dry(tmp_path, without_packages):
    out = tmp_path / "out"
    command = ["bash", "benchmarks/gpu.sh", "numerics", "--dry-run", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=without_packages, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((out / "gpu-numerics.json").read_text(encoding="utf-8"))
    assert {row["unit"] for row in found["rows"]} >= {"error", "TFLOP/s", "TB/s", "ms"}
    assert "20 of 20" in result.stdout or "19 of 19" in result.stdout, result.stdout


@pytest.mark.parametrize("spoil", [jnp.nan, 1.1])
def test_wrong_numbers_stop_a_benchmark(benchmark_module, monkeypatch, capsys, spoil):
    """Whether a kernel gives no number or a wrong one; and a right one passes."""
    numerics = benchmark_module("numerics")
    right = numerics.attention
    assert numerics.main(["--smoke", "--tiny"]) == 0
    monkeypatch.setattr(numerics, "attention", lambda *args, **places: right(*args, **places) * spoil)
    assert numerics.main(["--smoke", "--tiny"]) == 1
    assert "error: attention gptjax, head 64, output is off by" in capsys.readouterr().err


def test_parts_fit_a_lease(benchmark_module):
    gpu = benchmark_module("gpu")
    assert sum(gpu.SECONDS.values()) <= 25 * 60
    assert max(gpu.SECONDS.values()) < 9 * 60
    for part in gpu.SECONDS:
        found = gpu.jobs(part, False, "nanogpt", 80.0, Path("out"))
        assert all((ROOT / "benchmarks" / job.script).is_file() for job in found)
    (large,) = [job for job in gpu.jobs("train-large", False, "n", 80.0, Path("out")) if "nanoGPT" in job.label]
    assert "--fresh" in large.arguments, "two of 1.5B do not fit into 80 GB together"


def test_made_documents(benchmark_module):
    """Each row has as many separators as it has documents but one, none of them where it begins."""
    for tokens in benchmark_module("paced").made_batches(61, 2, 3, 16, documents=4):
        assert tokens.shape == (2, 3, 17)
        assert tokens.max() == 60
        np.testing.assert_array_equal((tokens[:, :, 1:-1] == 60).sum(-1), 3)


def nanogpt_arms(compare, checkout, **fields):
    config = replace_fields(load_config(ROOT / "configs" / "gpt2_124m.py"), {"model.vocab_size": 50257} | fields)
    options = argparse.Namespace(**OPTIONS, against=[f"nanogpt={checkout}"])
    return compare.make_arms(config, options, ["--model.bias", "False"], 32)


def test_nanogpt_gets_the_same_shape(benchmark_module, tmp_path):
    (tmp_path / "model.py").touch()
    ours, compiled, best = nanogpt_arms(benchmark_module("compare"), tmp_path)
    assert [arm.name for arm in (ours, compiled, best)] == [
        *("ours bfloat16", "nanogpt compiled bfloat16", "nanogpt best bfloat16")
    ]
    assert compiled.command[0] == "python-with-torch"
    assert compiled.command[-8:-2] == ["--batch-size", "32", "--steps", "20", "--mode", "compiled"]
    shape = json.loads(compiled.command[compiled.command.index("--shape") + 1])
    expected = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "bias": True, "vocab_size": 50304}
    assert shape == expected
    assert "--model.residual-dropout" in ours.command


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model.feed_forward": "swiglu", "model.positions": "rope"}, "model.positions, model.feed_forward"),
        ({"model.norm_bias": False}, "model.norm_bias"),
    ],
)
def test_what_nanogpt_has_not_is_refused(benchmark_module, tmp_path, fields, expected):
    (tmp_path / "model.py").touch()
    with pytest.raises(UserError, match=expected):
        nanogpt_arms(benchmark_module("compare"), tmp_path, **fields)
    with pytest.raises(UserError, match="no checkout of nanoGPT"):
        nanogpt_arms(benchmark_module("compare"), tmp_path / "elsewhere")
