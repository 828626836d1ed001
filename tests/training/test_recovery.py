"""Which step is used when some are damaged, and what becomes of those."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import CheckpointConfig
from gptjax.errors import UserError
from gptjax.training.checkpoint import all_steps, open_checkpoints, restore, save, steps_by_age, steps_by_loss
from gptjax.training.integrity import MANIFEST_FILE
from gptjax.training.recovery import choose, require_usable, tidy, verify_step

ABSTRACT = {"x": jax.ShapeDtypeStruct((4,), jnp.float32)}


def write(directory: Path, *steps: int) -> None:
    """Checkpoints whose loss grows with the step."""
    with open_checkpoints(directory, CheckpointConfig(keep_newest=9)) as manager:
        for step in steps:
            save(manager, step, {"x": jnp.full(4, step, jnp.float32)}, {}, {"val_loss": float(step)})


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("written")
    write(directory, 4, 8, 12)
    return directory


@pytest.fixture
def checkpoints(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def damage(folder: Path, part: str = "state") -> str:
    """Flip a bit, and give the file's name."""
    path = max((path for path in (folder / part).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    return path.relative_to(folder).as_posix()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_damage_the_first_is_used_and_nothing_is_said(checkpoints):
    assert choose(checkpoints, steps_by_age, glance=True) == (12, "verified", {})
    assert choose(checkpoints, steps_by_loss) == (4, "verified", {})
    assert choose(checkpoints, steps_by_age).lines() == []


@pytest.mark.parametrize(("order", "damaged", "used"), [(steps_by_age, 12, 8), (steps_by_loss, 4, 8)])
def test_the_next_is_used_in_place_of_a_damaged_one(checkpoints, order, damaged, used):
    name = damage(checkpoints / str(damaged))
    before = contents(checkpoints)
    choice = choose(checkpoints, order)
    assert choice.step == used
    assert choice.lines() == [
        f"checkpoint {damaged} is damaged ({name} was changed: its sha256 is another); using {used}"
    ]
    assert contents(checkpoints) == before
    assert choose(checkpoints, order, verify=False).step == damaged


def test_a_loss_that_cannot_be_read_may_be_the_best_so_its_step_is_looked_at(checkpoints):
    (checkpoints / "12" / "metrics" / "metrics").write_text("{")
    choice = choose(checkpoints, steps_by_loss)
    assert (choice.step, list(choice.damaged)) == (4, [12])


def test_all_damaged_is_one_line_with_all_of_them(checkpoints):
    names = {step: damage(checkpoints / str(step)) for step in (4, 8, 12)}
    before = contents(checkpoints)
    with pytest.raises(UserError) as error:
        choose(checkpoints, steps_by_age)
    assert all(f"{step} ({name} was changed" in str(error.value) for step, name in names.items())
    assert "\n" not in str(error.value)
    assert contents(checkpoints) == before


def test_a_damaged_step_is_put_aside_and_the_run_can_save_it_again_and_again(checkpoints):
    for ending in ("damaged", "damaged-2", "damaged-3"):
        damage(checkpoints / "12")
        choice = choose(checkpoints, steps_by_age, glance=True)
        (line,) = tidy(checkpoints, choice)
        assert line.startswith("checkpoint 12 is damaged (state/")
        assert line.endswith(f"; using 8, and keeping it as 12.{ending}")
        assert all_steps(checkpoints) == [4, 8]
        write(checkpoints, 12)
        assert all_steps(checkpoints) == [4, 8, 12]
        assert restore(checkpoints, 12, ABSTRACT)[0]["x"][0] == 12
    assert len([*checkpoints.glob("12.damaged*")]) == 3
    assert choose(checkpoints, steps_by_age).step == 12


def test_older_steps_that_would_stop_orbax_are_put_aside_as_well(checkpoints):
    """Orbax reads the metrics of all steps when it opens a folder, and refuses the folder for one that is broken."""
    (checkpoints / "4" / "metrics" / "metrics").write_text("{")
    with pytest.raises(UserError, match="cannot be opened"):
        write(checkpoints, 16)
    assert restore(checkpoints, 12, ABSTRACT)[0]["x"][0] == 12, "reading another step is no problem"
    choice = choose(checkpoints, steps_by_age, glance=True)
    assert (choice.step, list(choice.damaged)) == (12, [4])
    assert len([*tidy(checkpoints, choice)]) == 1
    write(checkpoints, 16)
    assert all_steps(checkpoints) == [8, 12, 16]


def test_a_step_without_checksums_is_used_and_said_and_gets_them(checkpoints):
    (checkpoints / "12" / MANIFEST_FILE).unlink()
    choice = choose(checkpoints, steps_by_age)
    assert (choice.step, choice.status) == (12, "unverified")
    assert choice.lines() == ["checkpoint 12 is used unverified: it was saved without checksums"]
    assert not (checkpoints / "12" / MANIFEST_FILE).exists(), "choosing writes nothing"
    (line,) = tidy(checkpoints, choice)
    assert line.endswith("and has them from now on")
    assert verify_step(checkpoints, 12).status == "verified"


def test_checksums_that_cannot_be_added_are_said(checkpoints, monkeypatch):
    (checkpoints / "12" / MANIFEST_FILE).unlink()

    def read_only(folder: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("gptjax.training.recovery.write_manifest", read_only)
    (line,) = tidy(checkpoints, choose(checkpoints, steps_by_age))
    assert "which cannot be added" in line
    assert "Read-only file system" in line


def test_a_folder_that_is_not_ours_is_damaged(checkpoints):
    (checkpoints / "16").mkdir()
    (checkpoints / "16" / "model.bin").write_bytes(b"\0")
    assert verify_step(checkpoints, 16) == ("damaged", "it has neither checksums nor state and metadata")
    assert choose(checkpoints, steps_by_age).step == 12


def test_files_of_others_are_refused_and_cost_no_steps(checkpoints):
    (checkpoints / "12" / "notes.txt").write_text("mine")
    for use in (lambda: choose(checkpoints, steps_by_age), lambda: require_usable(checkpoints, 12)):
        with pytest.raises(UserError, match=r"checkpoint 12 in .* holds other files: notes\.txt was not .*; move them"):
            use()


def test_a_step_that_was_asked_for_is_not_replaced(checkpoints):
    name = damage(checkpoints / "8")
    with pytest.raises(UserError, match=rf"checkpoint 8 in .* is damaged: {name} was .*; those that are not: 4, 12$"):
        require_usable(checkpoints, 8)
    with pytest.raises(UserError, match=r"step 7 is not in .*; those that are: 4, 8, 12$"):
        require_usable(checkpoints, 7)
    assert require_usable(checkpoints, 8, verify=False).step == 8
    assert require_usable(checkpoints, 12).step == 12


def test_a_step_that_a_run_removes_meanwhile_is_not_called_damaged(checkpoints):
    """The newest goes when a newer one comes: the folder is looked at again."""
    write(checkpoints, 16)
    newer = (checkpoints / "16").rename(checkpoints.parent / "16")
    asked: list[list[int]] = []

    def order(directory: Path) -> list[int]:
        if len(asked) == 1:
            shutil.rmtree(directory / "12")
            newer.rename(directory / "16")
        asked.append(steps_by_age(directory))
        if len(asked) == 1:
            shutil.rmtree(directory / "12" / "state")
        return asked[-1]

    assert choose(checkpoints, order) == (16, "verified", {})
    assert asked[:2] == [[12, 8, 4], [16, 8, 4]]
