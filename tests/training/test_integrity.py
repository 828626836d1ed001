"""Every change of every byte of a checkpoint is found, and the file is named."""

import errno
import json
import os
import random
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import CheckpointConfig
from gptjax.errors import UserError
from gptjax.training import integrity
from gptjax.training.checkpoint import open_checkpoints, restore, save
from gptjax.training.integrity import MANIFEST_FILE, WRITTEN_LATER, check_manifest, write_manifest

STATE = {"w": jnp.arange(64.0).reshape(8, 8), "count": jnp.int32(3)}
ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), STATE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A step's folder, as a run saves it."""
    directory = tmp_path_factory.mktemp("saved")
    with open_checkpoints(directory, CheckpointConfig()) as manager:
        save(manager, 5, STATE, {"position": 640}, {"val_loss": 2.0})
    return directory / "5"


@pytest.fixture
def step(saved, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "5"))


def covered(folder: Path) -> list[Path]:
    """The files of which no byte may change: all but those that Orbax writes when the manifest is there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if path.relative_to(folder).as_posix() not in WRITTEN_LATER]


def test_a_step_is_hashed_behind_the_training_and_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []

    def watched(folder: Path) -> None:
        seen.append((threading.current_thread() is threading.main_thread(), (tmp_path / "5").exists(), folder.name))
        write_manifest(folder)

    monkeypatch.setattr("gptjax.training.manager.write_manifest", watched)
    with open_checkpoints(tmp_path, CheckpointConfig()) as manager:
        save(manager, 5, STATE, {})
    assert seen == [(False, False, "5.orbax-checkpoint-tmp")]
    assert check_manifest(tmp_path / "5") == ("verified", "")


def test_the_manifest_lists_every_file_but_two(saved):
    listed = json.loads((saved / MANIFEST_FILE).read_text())["files"]
    assert set(listed) == {p.relative_to(saved).as_posix() for p in covered(saved)} - {MANIFEST_FILE}
    assert {name.split("/")[0] for name in listed} == {"state", "metadata", "metrics"}
    assert all(entry["bytes"] == (saved / name).stat().st_size for name, entry in listed.items())


def test_any_flipped_bit_is_found(step):
    """400 at random over all bytes, and 10 more in each file, for the small ones."""
    draw, files = random.Random(0), covered(step)
    sizes = [path.stat().st_size for path in files]
    for path in draw.choices(files, sizes, k=400) + 10 * files:
        whole = path.read_bytes()
        position, changed = draw.randrange(len(whole)), bytearray(whole)
        changed[position] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        status, reason = check_manifest(step)
        assert status == "damaged", f"byte {position} of {path}"
        assert reason.startswith(path.relative_to(step).as_posix())
        path.write_bytes(whole)
    assert check_manifest(step).status == "verified"


@pytest.mark.parametrize("cut", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw + b"\0"])
def test_files_of_another_length_are_found_without_reading_them(step, cut):
    for path in covered(step):
        whole, name = path.read_bytes(), path.relative_to(step).as_posix()
        path.write_bytes(cut(whole))
        assert check_manifest(step, max_bytes=0).status == "damaged"
        assert check_manifest(step).reason.startswith(name)
        path.write_bytes(whole)


def test_a_missing_file_is_found(step):
    for path in covered(step):
        whole, name = path.read_bytes(), path.relative_to(step).as_posix()
        path.unlink()
        expected = ("unverified", f"it has no {name}") if name == MANIFEST_FILE else ("damaged", f"{name} is missing")
        assert check_manifest(step) == expected
        path.write_bytes(whole)


def test_a_half_copied_folder_names_three_files_and_the_number_of_others(step):
    shutil.rmtree(step / "state")
    count = sum(name.startswith("state/") for name in json.loads((step / MANIFEST_FILE).read_text())["files"])
    status, reason = check_manifest(step)
    assert status == "damaged"
    assert reason.count("is missing") == 3
    assert reason.endswith(f"and {count - 3} more")


def test_files_of_others_are_no_damage_but_named(step):
    (step / "state" / "notes.txt").write_text("mine")
    (step / "state" / ".nfs0001").write_text("")  # a deleted file that somebody still has open
    assert check_manifest(step) == ("foreign", "state/notes.txt was not saved with it")
    (step / "metadata" / "metadata").unlink()
    assert check_manifest(step).status == "damaged"


def test_what_orbax_writes_later_changes_nothing_that_is_restored(step):
    """So it need not be covered; but what Orbax could not open would stop it from opening any step."""
    for name in WRITTEN_LATER:
        (step / name).unlink()
    assert check_manifest(step).status == "verified"
    restored, metadata = restore(step.parent, 5, ABSTRACT)
    np.testing.assert_array_equal(restored["w"], STATE["w"])
    assert metadata == {"position": 640}
    for broken in (b"{", b"[]", b"\xff"):
        (step / WRITTEN_LATER[0]).write_bytes(broken)
        assert check_manifest(step) == ("damaged", f"{WRITTEN_LATER[0]} is no JSON object")


def test_a_manifest_that_says_the_same_in_other_words_is_not_trusted(step):
    path = step / MANIFEST_FILE
    text = path.read_text()
    values = json.loads(text)
    forged = values | {"files": {}}
    for other in (text + " ", json.dumps(values), json.dumps(forged), "[]", "{}", "null", '{"sha256": 1}'):
        path.write_text(other)
        assert check_manifest(step).reason == "manifest.json was changed: its own sha256 is another", other
    path.write_bytes(b"\xff")
    assert check_manifest(step).status == "damaged"


def test_a_newer_format_is_refused_and_not_called_damaged(step, monkeypatch):
    monkeypatch.setattr(integrity, "FORMAT_VERSION", 2)
    write_manifest(step)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"5/manifest\.json has format 2, this gptjax reads 1; use the gptjax that"):
        check_manifest(step)


@pytest.mark.parametrize(
    ("number", "outcome"), [(errno.EIO, "damaged"), (errno.EACCES, None)], ids=["failing disk", "not permitted"]
)
def test_a_file_that_cannot_be_read(step, monkeypatch, number, outcome):
    """A disk that fails is damage; a user who may not read has only to be told."""

    def failing(path: Path) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(integrity, "_sha256", failing)
    if outcome is None:
        with pytest.raises(UserError, match="cannot be read: Permission denied"):
            check_manifest(step)
        return
    status, reason = check_manifest(step)
    assert status == outcome
    assert "metadata/metadata cannot be read (Input/output error)" in reason
