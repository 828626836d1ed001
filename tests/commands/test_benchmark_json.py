"""The benchmarks of data and quality: their JSON is all that standard output holds, or lies in a file."""

import importlib.util
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROOT = Path(__file__).parents[2]
TEXT = "To be, or not to be, that is the question.\n" * 100


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def outcome(tmp_path, monkeypatch, capsys):
    """`outcome(module, *arguments)`: its JSON, the same from standard output and from a file."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def call(module, *arguments: str, same: bool = True):
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--json", "-"])
        assert module.main() == 0
        printed = capsys.readouterr()
        assert printed.err, "what is for people is not lost"
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--json", "a.json"])
        assert module.main() == 0
        assert capsys.readouterr().out.strip()
        assert not same or Path("a.json").read_text(encoding="utf-8") == printed.out
        return json.loads(printed.out)

    return call


def test_shakespeare(outcome, monkeypatch):
    module = load("shakespeare")

    def train(command, **options):
        run = Path(command[command.index("--run-dir") + 1])
        run.mkdir(parents=True)
        loss = 1.5 + int(command[-1])
        (run / "summary.json").write_text(json.dumps({"val_loss": loss, "wall_seconds": 1}), encoding="utf-8")

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=train, DEVNULL=None))
    found = outcome(module, "text.txt", "--seeds", "3", "1", "2")
    assert found == {"median": 3.5, "losses": {"3": 4.5, "1": 2.5, "2": 3.5}}


def test_speedrun(tmp_path, monkeypatch, capsys):
    """Arms take turns; ours begins each with nothing compiled; nanoGPT's text is split and numbered as it does it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module, calls = load("speedrun"), []
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "nanogpt" / "data" / "shakespeare_char").mkdir(parents=True)
    (tmp_path / "nanogpt" / "model.py").touch()

    def process(command, *, cwd=None, env=None, **_):
        calls.append([*map(str, command)])
        if "--run-dir" in command:
            assert not Path(env["JAX_COMPILATION_CACHE_DIR"]).exists()
            run = Path(command[command.index("--run-dir") + 1])
            run.mkdir(parents=True)
            seed = int(command[command.index("--training.seed") + 1])
            (run / "summary.json").write_text(json.dumps({"val_loss": 1.5 + seed}), encoding="utf-8")
        elif cwd is not None:
            folder = cwd / "data" / "shakespeare_char"
            tokens = np.concatenate([np.fromfile(folder / f"{part}.bin", np.uint16) for part in ("train", "val")])
            itos = pickle.loads((folder / "meta.pkl").read_bytes())["itos"]
            assert "".join(itos[token] for token in tokens) == TEXT
            assert (folder / "train.bin").stat().st_size == 2 * int(0.9 * len(TEXT))
        return SimpleNamespace(stdout="number of parameters: 0.80M\n2.5\n")

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=process, DEVNULL=None))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=itertools.accumulate(itertools.count()).__next__))
    options = ["--rounds", "2", "--against", f"nanogpt={tmp_path / 'nanogpt'}", "--training.steps", "7", "--json", "-"]
    assert module.main([str(tmp_path / "text.txt"), *options]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)
    assert ours["losses"] == [1.5, 2.5]
    assert theirs["losses"] == [2.5, 2.5]
    # The clock's readings are 0, 1, 3, 6, ...: what lies between a run's two is 1, 3, 5, 7.
    assert ours["seconds_each"] == [1, 5]
    assert theirs["seconds_each"] == [3, 7]
    assert theirs["ratio"] == pytest.approx((1 / 3 + 5 / 7) / 2)
    assert [command[1].endswith(("train.py", "nanogpt_loss.py")) for command in calls] == [True] * 6
    assert calls[0][-2:] == ["--training.steps", "7"]


def test_prepare_memory(outcome, monkeypatch):
    module = load("prepare_memory")
    monkeypatch.setattr(
        module, "subprocess", SimpleNamespace(run=lambda *command, **options: SimpleNamespace(stdout="built\n12345\n"))
    )
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=iter([1.0, 3.0, 1.0, 3.0]).__next__))
    found = outcome(module, "--megabytes", "1", "--forms", ".txt")
    assert found == [{"form": ".txt", "peak_memory_bytes": 12345, "seconds": 2.0}]


def test_data_throughput(outcome, monkeypatch):
    module = load("data_throughput")
    monkeypatch.setattr(module, "loading", lambda *arguments: [7.0])
    found = outcome(module, "text.txt", "--vocab-size", "300", "--repeats", "1", same=False)
    assert found["loading GPT-2"] == {"tokens_per_second": 7.0}
    assert found["tokenizing"]["bytes_per_second"] > 0


def test_gpt2_tokenizer(outcome, tmp_path):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    model = json.loads(backend.to_str())["model"]
    vocabulary = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    (tmp_path / "vocab.bpe").write_text(merges, encoding="utf-8")
    rows = outcome(load("gpt2_tokenizer"), ".", "text.txt", "--megabytes", "0.001", same=False)
    assert [row["source"] for row in rows] == ["text.txt", "stdlib://", "odd Unicode"]
    assert all(row["different_documents"] == 0 and row["bytes_per_second"] > 0 for row in rows)
    assert rows[0]["bytes"] == len(TEXT)


def test_every_preset(tmp_path):
    """In a process of its own: it trains for ten steps, on one device."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "every_preset.py"), "--data", "text.txt", "--json", "-"]
    command += ["--configs", str(ROOT / "configs" / "shakespeare_char_cpu.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert row["configuration"] == "shakespeare_char_cpu"
    assert row["model_dim"] == row["published_model_dim"] == 128
    assert row["published_parameters"] > row["parameters"] > 0
    assert row["final_loss"] < row["first_loss"]
    assert "shakespeare_char_cpu" in result.stderr


def test_tokens_to_loss(outcome, monkeypatch):
    """Both optimizers are tuned until the best rate lies between two worse ones; where Muon reaches AdamW's loss is
    read off the ends of runs of several lengths; and a run that is there already is not trained again."""
    module, trained = load("tokens_to_loss"), []

    def train(command, **_):
        """Loss 2 and the squared distance to the best rate in powers of two; Muon's falls with the steps from 3."""
        command = [*map(str, command)]
        given = {word[2:]: value for word, value in itertools.pairwise(command) if word.startswith("--")}
        kind, rate, steps = (
            given[name] for name in ("optimizer.kind", "optimizer.peak-learning-rate", "training.steps")
        )
        trained.append((kind, float(rate), int(steps)))
        off = math.log2(float(rate) / (4e-3 if kind == "adamw" else 1.6e-2)) ** 2
        loss = off + (2.0 if kind == "adamw" else 3.0 - int(steps) / 100)
        summary = {"stopped": "finished", "val_loss": loss, "tokens": 10 * int(steps), "step": int(steps)}
        Path(given["run-dir"]).mkdir(parents=True)
        speed = 100.0 if kind == "adamw" else 80.0
        (Path(given["run-dir"]) / "summary.json").write_text(json.dumps(summary | {"tokens_per_second": speed}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", train)
    result = outcome(module, "--steps", "160", "--shares", "0.5", "--runs", "runs")
    adamw, muon = result["rows"]
    assert (adamw["learning_rate"], muon["learning_rate"]) == (4e-3, 1.6e-2)
    assert sorted(map(float, muon["tried"])) == [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert result["tokens_to_reach"] == pytest.approx(1000)  # of 1600, where 3 - steps / 100 is 2
    assert result["token_share"] == pytest.approx(1000 / 1600)
    assert result["time_ratio"] == pytest.approx(1.25)
    assert len(set(trained)) + 3 == len(trained), "only the best, and the shorter one, have a second seed"
