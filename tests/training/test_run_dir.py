import copy
import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.cli import starting_point
from gptjax.config import Config
from gptjax.config_files import load_config, opened, replace_fields
from gptjax.errors import UserError
from gptjax.parallel.platform import processor_fingerprint
from gptjax.resolve import resolve
from gptjax.training import run_dir
from gptjax.training.metrics import read_metrics
from gptjax.training.run_dir import (
    MAY_CHANGE,
    check_writable,
    cut_metrics,
    environment,
    environment_changes,
    load_run_config,
    merge_resume,
    next_run_dir,
    save_config,
    write_json,
)


@dataclasses.dataclass
class Cpu:
    platform: str = "cpu"


@dataclasses.dataclass
class SomeTokenizer:
    vocab_size: int = 8192


def resolved(**fields: object) -> Config:
    config = replace_fields(
        Config(run_dir="runs/a"), {name.replace("__", "."): value for name, value in fields.items()}
    )
    return resolve(config, [Cpu()], SomeTokenizer())


def test_the_next_free_name(tmp_path):
    for expected in ("small", "small-2", "small-3"):
        run = next_run_dir("small", tmp_path / "runs")
        assert run == tmp_path / "runs" / expected
        run.mkdir(parents=True)
        assert next_run_dir("small", tmp_path / "runs") == run  # empty: a refused command made it
        (run / "config.json").touch()
    (tmp_path / "runs" / "small-2" / "config.json").unlink()
    assert next_run_dir("small", tmp_path / "runs").name == "small-2"
    assert next_run_dir("small") == Path("runs/small")


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_unwritable_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot write to .*file.*--run-dir"):
            check_writable(path)


def test_a_full_disk_is_said(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as a full disk, for this process alone
    try:
        with pytest.raises(UserError, match=r"cannot write to .*: File too large"):
            check_writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"stopped": "größe", "mfu": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {"stopped": "größe", "mfu": None}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"stopped": object()})
    assert path.read_bytes() == before

    def killed(descriptor: int) -> None:
        assert path.read_bytes() == before  # nothing is replaced before it is on disk
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"stopped": "finished"})
    assert path.read_bytes() == before


def test_the_environment_names_versions_devices_and_source():
    found = environment()
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= found["versions"].keys()
    assert found["devices"] == {
        "platform": "cpu",
        "device_kind": "cpu",
        "device_count": 8,
        "process_count": 1,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "processor": processor_fingerprint(),
        "xla_flags": os.environ["XLA_FLAGS"],
    }
    assert found["source"].keys() == {"git_revision", "git_dirty"}
    assert json.loads(json.dumps(found)) == found


def test_the_source_revision_is_the_checkouts_or_unknown(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        return subprocess.run(
            ["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    source = tmp_path / "run_dir.py"
    source.write_text("")
    monkeypatch.setattr(run_dir, "__file__", str(source))
    unknown = {"git_revision": None, "git_dirty": None}
    assert environment()["source"] == unknown
    git("init", "--quiet")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "--quiet", "--message", "somebody else's repository")
    assert environment()["source"] == unknown
    git("add", ".")
    git("commit", "--quiet", "--message", "ours")
    assert environment()["source"] == {"git_revision": git("rev-parse", "HEAD").strip(), "git_dirty": False}
    source.write_text("changed")
    assert environment()["source"]["git_dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert environment()["source"] == unknown


def test_a_saved_configuration_comes_back_with_its_environment(tmp_path):
    config, found = resolved(data__path=("a", "b"), model__attention_pattern=("dense", "local")), environment()
    save_config(tmp_path, config, found)
    assert load_run_config(tmp_path) == (config, found)
    assert load_config(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model"]["num_layers"] == 12


def test_what_is_no_run_is_said_with_the_runs_beside_it(tmp_path):
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
        save_config(tmp_path / name, resolved(), {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"smal is not a run: .*; runs beside it: small, large$"):
        load_run_config(tmp_path / "smal")
    with pytest.raises(UserError, match="empty is not a run"):
        load_run_config(tmp_path / "empty")
    with pytest.raises(UserError, match=r"runs beside it: none$"):
        load_run_config(tmp_path / "nowhere" / "run")
    (tmp_path / "small" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load_run_config(tmp_path / "small")


def test_an_equal_request_changes_nothing():
    saved = resolved()
    config, changes = merge_resume(saved, Config(run_dir="runs/a"))
    assert changes == {}
    assert config.mesh.data is None  # derived anew from the devices
    assert resolve(config, [Cpu()], SomeTokenizer()) == saved


def test_a_run_that_is_older_than_a_field():
    """It has no value of it; what it is derived from, it has. Another one is a change like any."""
    saved = resolved()
    old = replace_fields(saved, {"model.ffn_bias": None, "model.rope_attention_factor": None, "data.chat_date": None})
    assert merge_resume(old, saved)[1] == {}
    with pytest.raises(UserError, match="ffn_bias True → False"):
        merge_resume(old, resolved(model__ffn_bias=False))
    with pytest.raises(UserError, match=r"chat_date .* → 2020-01-01"):
        merge_resume(saved, resolved(data__chat_date="2020-01-01"))


def test_a_longer_run_keeps_its_schedule():
    config, changes = merge_resume(resolved(training__steps=100), replace_fields(Config(), {"training.steps": 300}))
    assert changes == {"training.steps": (100, 300)}
    assert (config.training.steps, config.optimizer.decay_steps, config.run_dir) == (300, 100, "runs/a")


def test_what_may_change_is_taken_from_the_request_and_reported():
    requested = {
        "run_dir": "elsewhere",
        "data.prepared_dir": "fast-disk",
        "mesh.data": 1,
        "mesh.fsdp": 4,
        "mesh.tensor": 2,
        "model.scan_layers": not Config().model.scan_layers,
        "model.remat": "full" if Config().model.remat != "full" else "none",
        "model.attention_kernel": "xla",
        "training.steps": 7,
        "training.log_every_steps": 7,
        "training.eval_every_steps": 7,
        "training.eval_sequences": 7,
        "training.sample_every_steps": 7,
        "training.sample_prompt": "x",
        "training.sample_tokens": 7,
        "training.loss_chunk_tokens": 7,
        "training.steps_per_dispatch": 7,
        "checkpoint.every_steps": 7,
        "checkpoint.keep_newest": 7,
        "checkpoint.keep_best": 7,
    }
    config, changes = merge_resume(resolved(), replace_fields(Config(), requested))
    assert {name: new for name, (_, new) in changes.items()} == {
        name: value for name, value in requested.items() if name != "mesh.data"
    }
    again, _ = merge_resume(config, replace_fields(Config(), requested))
    assert again == config


def test_everything_else_is_refused_all_at_once():
    requested = replace_fields(
        Config(), {"model.num_layers": 6, "training.seed": 3, "data.path": ["x"], "training.steps": 9}
    )
    with pytest.raises(UserError) as refused:
        merge_resume(resolved(), requested)
    line = str(refused.value)
    assert "model.num_layers 12 → 6, data.path ['stdlib://'] → ['x'], training.seed 0 → 3;" in line
    assert "runs/a" in line
    assert "training.steps" not in line
    assert "\n" not in line


def test_only_differences_that_may_change_bits_are_told():
    now = environment()
    assert environment_changes(now, now) == []
    before = copy.deepcopy(now)
    before["versions"]["jax"] = "0.1"
    before["devices"] |= {"device_kind": "NVIDIA H100", "device_count": 1, "cpu_cores": 1000, "process_count": 5}
    before["source"]["git_revision"] = "another"
    assert environment_changes(before, now) == [
        f"jax 0.1 → {now['versions']['jax']}",
        "device kind NVIDIA H100 → cpu",
        "device count 1 → 8",
        f"cpu cores 1000 → {now['devices']['cpu_cores']}",
    ]
    assert "jax None → " in "\n".join(environment_changes({}, now))


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 10, "loss": 3.0000000000000004, "mfu": null}\n{"step": 20, "loss": 1e-07}\n'
    path.write_text(kept + '{"step": 30, "loss": 1.0}\n{"step": 40, "lo')
    cut_metrics(path, 20)
    assert path.read_text() == kept
    cut_metrics(path, 0)
    assert read_metrics(path) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    cut_metrics(tmp_path / "none.jsonl", 5)
    assert not (tmp_path / "none.jsonl").exists()


def test_documented_resumable_fields():
    """README says which fields may change when a run is continued."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert [field for field in MAY_CHANGE if f"`{field}`" not in readme] == []


SMALL = {"model.model_dim": 32, "model.num_heads": 4, "model.context_length": 32, "training.batch_size": 4}
SOURCES = {
    "training.batch_size": 8,
    "model.context_length": 64,
    "model.num_heads": 8,
    "model.model_dim": 64,
    "model.bias": False,
    "model.feed_forward": "swiglu",
    "model.rope_base": 5e5,
    "model.rope_scaling": "yarn",
}
"""Fields that others are derived from, each with another value than that of the default, or of `SMALL`."""


@pytest.mark.parametrize("way", ["its folder", "its file"])
@pytest.mark.parametrize("name", SOURCES)
def test_what_is_derived_follows_what_it_is_derived_from(name, way, tmp_path):
    """A run that goes on with a field changed and accepted has all that a new run with that field would have.

    Without it the field alone is refused, and no other that nobody has given.
    """
    new = {name: SOURCES[name]} | ({"model.rope_factor": 2.0} if "scaling" in name else {})
    saved = resolved(**_names(SMALL))
    save_config(tmp_path, saved, {})
    original = replace_fields(Config(run_dir="runs/a"), SMALL)
    base = starting_point([str(tmp_path)], tmp_path)[0] if way == "its folder" else original
    requested = dataclasses.replace(replace_fields(base, new), run_dir="runs/a")
    with pytest.raises(UserError, match=f"configuration: {name} .*--accept-changes {' '.join(new)}$"):
        merge_resume(saved, requested)
    merged, changes = merge_resume(saved, requested, tuple(new))
    assert set(changes) == set(new)
    found, fresh = resolve(merged, [Cpu()], SomeTokenizer()), resolved(**_names({**SMALL, **new}))
    kept = {"training.eval_sequences": saved.training.eval_sequences}
    assert found == replace_fields(fresh, kept)
    # Its checkpoints were made with the old ones: the same is accepted of them, and with nothing more.
    assert resolve(merge_resume(saved, found, tuple(new))[0], [Cpu()], SomeTokenizer()) == found


def _names(fields):
    return {name.replace(".", "__"): value for name, value in fields.items()}


def test_what_was_given_stays():
    saved = resolved(training__batch_size=8, training__micro_batch_size=2, training__sequence_length=64)
    merged, _ = merge_resume(
        saved, replace_fields(opened(saved), {"training.batch_size": 16}), ("training.batch_size",)
    )
    found = resolve(merged, [Cpu()], SomeTokenizer()).training
    assert (found.batch_size, found.micro_batch_size, found.batch_ramp_start, found.sequence_length) == (16, 2, 16, 64)


def test_opened_is_the_same_configuration():
    for config in (
        resolved(),
        resolved(model__head_dim=48),
        resolved(model__ffn_dim=100, training__micro_batch_size=8),
    ):
        assert resolve(opened(config), [Cpu()], SomeTokenizer()) == config
        assert opened(opened(config)) == opened(config)


def test_more_epochs_are_more_steps():
    saved = resolve(
        replace_fields(Config(run_dir="runs/a"), {"training.steps": None}), [Cpu()], SomeTokenizer(), num_rows=320
    )
    merged, _ = merge_resume(saved, replace_fields(opened(saved), {"training.epochs": 3.0}))
    found = resolve(merged, [Cpu()], SomeTokenizer(), num_rows=320)
    assert (saved.training.steps, found.training.steps, found.optimizer.decay_steps) == (10, 30, 10)
