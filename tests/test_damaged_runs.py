"""What befalls runs: flipped bits, a full disk, a second run, a folder that is moved away."""

import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import sample
import train
from gptjax.config import CheckpointConfig
from gptjax.config_files import load_config, replace_fields
from gptjax.errors import UserError
from gptjax.stages.callbacks import watcher
from gptjax.stages.train import train as train_run
from gptjax.training.checkpoint import all_steps, open_checkpoints, save
from gptjax.training.lock import LOCK_FILE
from gptjax.training.metrics import Console, read_metrics

ROOT = Path(__file__).parent.parent
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OPTIONS = "--model.num-layers 1 --training.micro-batch-size 16 --checkpoint.keep-newest 9".split()


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    """A run of 8 steps, with checkpoints 4 and 8."""
    here = Path.cwd()
    os.chdir(workplace)
    try:
        assert train.main(["tiny.py", *OPTIONS, "--training.steps", "8", "--run-dir", "runs/trained"]) == 0
    finally:
        os.chdir(here)
    return workplace / "runs" / "trained"


@pytest.fixture
def run(trained, inside, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def damage(run: Path, step: int) -> None:
    arrays = [path for path in (run / "checkpoints" / str(step) / "state").rglob("*") if path.is_file()]
    path = max(arrays, key=lambda path: path.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_comes_to_the_same(run, trained, capsys):
    """Steps 5 to 8 come again, with the same losses: what is restored is step 4, and nothing of the damaged one."""
    damage(run, 8)
    (run / "summary.json").unlink()  # else the run is finished
    assert train.main([str(run)]) == 0
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if "damaged" in line]
    assert line.startswith("checkpoint 8 is damaged (state/")
    assert line.endswith("; using 4, and keeping it as 8.damaged")
    assert "steps 4 to 8" in output
    losses = [[r[name] for r in read_metrics(folder / "metrics.jsonl") for name in ("loss", "val_loss") if name in r]
              for folder in (run, trained)]  # fmt: skip
    assert losses[0] == losses[1]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"4", "8", "8.damaged"}


def test_when_all_are_damaged_nothing_is_changed(run, refusal):
    for step in (4, 8):
        damage(run, step)
    (run / "summary.json").unlink()
    before = contents(run)
    line = refusal(train.main, str(run))
    assert "all are damaged: 8 (state/" in line
    assert ", 4 (state/" in line
    assert contents(run) == before
    assert "all are damaged" in refusal(sample.main, str(run))
    assert contents(run) == before


def test_sampling_falls_back_in_one_line_and_touches_nothing(run, capsys, refusal):
    damage(run, 8)
    before = contents(run)
    assert sample.main([str(run), "--prompt", "the ", "--max-tokens", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("checkpoint 8 is damaged (state/")
    assert printed.err.endswith("; using 4\n")
    assert printed.err.count("\n") == 1
    assert "damaged" not in printed.out
    line = refusal(sample.main, str(run), "--step", "8")
    assert line.endswith("those that are not: 4\n")
    assert contents(run) == before


def test_a_failed_save_is_noticed_at_the_next_dispatch(tmp_path):
    """Not at the next save, which may be hours away."""
    with open_checkpoints(tmp_path, CheckpointConfig()) as manager:
        should_stop = watcher(lambda: False, manager, lambda: None)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        try:
            save(manager, 1, {"x": jax.random.normal(jax.random.key(0), (2**18,))}, {})
            while manager.is_saving_in_progress():
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with pytest.raises(UserError, match=r"could not be saved in .* \(File too large\); those .* stay: none$"):
            should_stop()
        assert should_stop() is False, "it is said once"


def test_an_older_step_that_would_stop_orbax_stops_no_run(run, capsys):
    (run / "checkpoints" / "4" / "metrics" / "metrics").write_text("{")
    assert train.main([str(run), "--training.steps", "9"]) == 0
    output = capsys.readouterr().out
    assert "checkpoint 4 is damaged (metrics/metrics has 1 bytes" in output
    assert "steps 8 to 9" in output
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"4.damaged", "8", "9"}


def test_a_full_disk_ends_the_run_in_one_line(run):
    """Files of a process of its own may not grow past 20 kB, so that the first save fails, at step 307 of a million."""

    options = "--training.steps 1000000 --training.eval-every-steps 0 --checkpoint.every-steps 307".split()
    options += "--training.log-every-steps 100".split()
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", LIMITED, str(ROOT / "train.py"), str(run), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: a checkpoint could not be saved in ")
    assert result.stderr.endswith(" (File too large); those that are there stay: 4, 8\n")
    assert result.stderr.count("\n") == 1
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"4", "8"}
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] >= 300


class Meddling(Console):
    """Does something when step 10 is shown."""

    def __init__(self, meddle):
        super().__init__(io.StringIO())
        self.meddle = meddle

    def log(self, record, steps):
        super().log(record, steps)
        if record["step"] == 10:
            self.meddle()


def start_again(run: Path, console: Console) -> None:
    """Train the run anew, from its first step on, for 12 steps."""
    config = load_config(run / "config.json")
    shutil.rmtree(run)
    train_run(replace_fields(config, {"run_dir": str(run), "training.steps": 12}), console=console)


def test_a_second_run_is_refused_and_the_first_undisturbed(run):
    refused = []

    def second() -> None:
        with pytest.raises(UserError) as error:
            train_run(replace_fields(load_config(run / "config.json"), {"run_dir": str(run)}), console=Meddling(None))
        refused.append(str(error.value))

    start_again(run, Meddling(second))
    assert f"{run} is in use by process {os.getpid()} on " in refused[0]
    assert all_steps(run / "checkpoints") == [4, 8, 12]
    assert not (run / LOCK_FILE).exists()


def test_a_folder_that_is_moved_away_is_not_made_again(run, tmp_path):
    moved = tmp_path / "moved"

    def move() -> None:
        while 8 not in all_steps(run / "checkpoints"):  # being saved; threads that write would complain, and be noisy
            pass
        run.rename(moved)

    with pytest.raises(UserError, match="was moved, renamed or deleted while this run wrote there"):
        start_again(run, Meddling(move))
    assert not run.exists()
    assert all_steps(moved / "checkpoints") == [4, 8]
    assert train.main([str(moved)]) == 0
    assert all_steps(moved / "checkpoints") == [4, 8, 12]
