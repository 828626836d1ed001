"""Folders appear whole or not at all, wherever they lie and whatever they are called."""

import os
from pathlib import Path

import pytest

from gptjax.config import DataConfig, TokenizerConfig
from gptjax.data.folders import is_empty, locked, written_whole
from gptjax.data.prepare import prepare
from gptjax.errors import UserError

BYTES = TokenizerConfig(kind="byte")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat on the mat.\n" * 20)
    return DataConfig(path=(str(tmp_path / "a.txt"),))


def test_a_link_to_a_folder_and_the_working_directory_are_written(data, tmp_path, monkeypatch):
    """And stay what they are: whoever looks through them, or works there, sees the data."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "lost+found").mkdir()  # as in the root of a mounted disk
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "here").mkdir()
    for out, place in ((str(tmp_path / "link"), tmp_path / "real"), (".", tmp_path / "here")):
        monkeypatch.chdir(place)
        number = os.stat(".").st_ino
        prepared = prepare(data, BYTES, out, log=lambda line: None)
        assert os.stat(".").st_ino == os.stat(place).st_ino == number
        assert (Path(".") / "index.json").is_file()
        again = prepare(data, BYTES, out, log=(said := []).append)
        assert said[0].startswith("data: reused")
        assert again.index == prepared.index
        prepare(DataConfig(path=data.path, validation_fraction=0.3), BYTES, out, log=said.append)
        assert said[1].startswith("data: built")
        assert {path.name for path in place.iterdir()} <= {
            *(shard.file for shard in again.index.shards),
            "index.json",
        } | {
            "tokenizer.json",
            "lost+found",
        }
    assert (tmp_path / "link").is_symlink()


def test_what_holds_something_else_is_not_touched(data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in ("full", "a.txt"):
        with pytest.raises(UserError, match="exists and is no prepared data"):
            prepare(data, BYTES, tmp_path / out, log=lambda line: None)
    assert (tmp_path / "full" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_nothing_and_what_was_killed_is_no_hindrance(tmp_path, there):
    folder = tmp_path / "folder"
    if there:
        folder.mkdir()

    def stopped() -> None:
        with locked(folder), written_whole(folder, "last") as partial:
            (partial / "a").write_text("a")
            stopped.partial = partial
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    partial = stopped.partial
    assert [*folder.iterdir()] == [] if there else not folder.exists()
    (partial / "sub").mkdir(parents=True)
    (partial / "sub" / "left").write_text("by a process that was killed")
    assert is_empty(folder)
    with locked(folder), written_whole(folder, "last") as partial:
        for name in ("last", "zz"):
            (partial / name).write_text(name)
    assert {path.name for path in folder.iterdir()} == {"last", "zz"}
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


@pytest.mark.parametrize("name", ["漢" * 78, "a" * 251, "é" * 125])
def test_names_of_any_length(tmp_path, name):
    """Of what is read, and of what is written."""
    source = tmp_path / f"{name}.txt"
    source.write_text("The cat sat on the mat.\n" * 20)
    data = DataConfig(path=(str(source),), prepared_dir=str(tmp_path / "data"))
    prepared = prepare(data, BYTES, log=lambda line: None)
    assert Path(prepared.folder).name.startswith(name[:20])
    prepare(data, BYTES, tmp_path / f"{name}.out", log=lambda line: None)
