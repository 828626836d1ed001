"""`python -m gptjax verify`: each part of a run that is damaged is named, and nothing is changed."""

import json
import shutil
from pathlib import Path

import pytest

from gptjax.__main__ import main
from gptjax.config_files import load_config
from gptjax.training.integrity import MANIFEST_FILE


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def verify(run: Path, capsys) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit status, and of each part its status and what is said."""
    before = contents(run)
    code = main(["verify", str(run), "--json", "-"])
    assert contents(run) == before
    found = json.loads(capsys.readouterr().out)
    assert found["damaged"] == (code == 1)
    assert found["run"] == str(run)
    return code, {part["part"]: (part["status"], part["detail"]) for part in found["parts"]}


def test_a_whole_run_is_verified(copy, capsys):
    code, parts = verify(copy, capsys)
    statuses = {part: status for part, (status, _) in parts.items()}
    assert code == 0
    assert statuses == {
        "config.json": "readable",
        "tokenizer.json": "verified",
        "metrics.jsonl": "readable",
        "summary.json": "readable",
        "checkpoints/4": "verified",
        "data": "verified",
    }
    assert main(["verify", str(copy)]) == 0
    table = capsys.readouterr().out
    assert "checkpoints/4" in table
    assert "verified" in table


@pytest.mark.parametrize(
    ("file", "part", "reason"),
    [
        ("checkpoints/4/metadata/metadata", "checkpoints/4", "metadata/metadata was changed"),
        ("checkpoints/4/manifest.json", "checkpoints/4", "manifest.json was changed"),
        ("tokenizer.json", "tokenizer.json", "not the tokenizer that the checkpoints hold"),
        ("config.json", "config.json", "config.json"),
        ("metrics.jsonl", "metrics.jsonl", "line 1 of"),
        ("summary.json", "summary.json", "summary.json is not JSON"),
    ],
)
def test_damage_is_named_and_status_1(copy, capsys, file, part, reason):
    flip(copy / file) if "checkpoints" in file or file == "tokenizer.json" else (copy / file).write_text("{\n")
    code, parts = verify(copy, capsys)
    assert code == 1
    assert parts[part][0] == "damaged"
    assert reason in parts[part][1]
    assert [name for name, (status, _) in parts.items() if status == "damaged"] == [part]


@pytest.mark.parametrize("file", ["tokenizer.json", "metrics.jsonl"])
def test_a_missing_file_is_damage(copy, capsys, file):
    (copy / file).unlink()
    code, parts = verify(copy, capsys)
    assert (code, parts[file][0]) == (1, "damaged")


def test_what_is_not_known_is_said_and_no_damage(copy, capsys):
    """Without checksums nothing is known of a step, nor of the data, as only a whole step says which they are."""
    (copy / "checkpoints" / "4" / MANIFEST_FILE).unlink()
    shutil.copytree(copy / "checkpoints" / "4", copy / "checkpoints" / "3.damaged")
    code, parts = verify(copy, capsys)
    assert code == 0
    assert parts["checkpoints/4"] == ("unverified", "it has no manifest.json")
    assert parts["checkpoints/3.damaged"][0] == "set aside"
    assert parts["data"][0] == "unknown"
    assert parts["tokenizer.json"][0] == "readable"


def test_files_of_others_are_named(copy, capsys):
    (copy / "checkpoints" / "4" / "notes.txt").write_text("mine")
    code, parts = verify(copy, capsys)
    assert (code, parts["checkpoints/4"]) == (1, ("foreign", "notes.txt was not saved with it"))


def test_the_token_shards_are_read(copy, capsys):
    """Flipped, then gone from this machine; other data lies beside this run's, and all is treated alike."""
    prepared = Path(load_config(copy / "config.json").data.prepared_dir)
    whole = {shard: shard.read_bytes() for shard in prepared.rglob("train-*.bin")}
    away = prepared.with_name("away")
    try:
        for shard in whole:
            flip(shard)
        code, parts = verify(copy, capsys)
        assert (code, parts["data"][0]) == (1, "damaged")
        assert any(f"{shard} was changed" in parts["data"][1] for shard in whole)
        prepared.rename(away)
        code, parts = verify(copy, capsys)
        assert (code, parts["data"][0]) == (0, "unknown")
    finally:
        if away.exists():
            away.rename(prepared)
        for shard, content in whole.items():
            shard.write_bytes(content)
