"""Whole runs on bad batches, bad learning rates and bad machines."""

import json
import math
import shutil

import pytest

import train
from benchmarks.injection import flipped_bit, scaled_rows
from gptjax import cli
from gptjax.stages import resume
from gptjax.training import checkpoint
from gptjax.training.metrics import read_metrics
from gptjax.training.run_dir import write_json


def test_divergence_ends_honestly(inside, capsys):
    """A learning rate that breaks the model for good: back to a checkpoint as often as allowed, then status 3."""
    options = ["--optimizer.peak-learning-rate", "1e38", "--checkpoint.every-steps", "1", "--run-dir", "runs/diverged"]
    assert train.main(["tiny.py", *options, "--optimizer.warmup-steps", "0"]) == cli.EXIT_OF["diverged"] == 3
    assert "diverged: step" in capsys.readouterr().out
    summary = json.loads((inside / "runs" / "diverged" / "summary.json").read_text())
    assert summary["stopped"] == "diverged"
    assert summary["step"] >= 1


@pytest.fixture
def poisoned():
    """The data from row 96 to row 128, steps 7 and 8, is poison: its loss is no number."""
    with scaled_rows(96, 128, math.nan):
        yield


def test_a_bad_batch_is_skipped(inside, poisoned, capsys):
    """Two steps whose loss is no number are skipped, counted and told, and the run goes on as if they had not been."""
    assert train.main(["tiny.py", "--run-dir", "runs/poisoned"]) == 0
    records = read_metrics(inside / "runs" / "poisoned" / "metrics.jsonl")
    lines = {record["step"]: record for record in records if "loss" in record}
    assert [lines[step]["skipped_steps"] for step in (6, 7, 8, 9, 12)] == [0, 1, 2, 2, 2]
    assert lines[7]["loss"] is lines[8]["grad_norm"] is None
    assert lines[12]["loss"] < lines[1]["loss"]
    assert "skipped 2" in capsys.readouterr().out
    assert json.loads((inside / "runs" / "poisoned" / "summary.json").read_text())["skipped_steps"] == 2


def test_a_diverged_run_goes_back_and_leaves_the_batches_out(inside, poisoned, capsys):
    """Two skipped steps are a divergence here: the run returns to step 4, sees other data in steps 5 and 6, and ends
    at its last step with every loss a number. Its logs say what happened, and its account counts the lost time."""
    assert train.main(["tiny.py", "--guard.max-skipped", "2", "--run-dir", "runs/rolled-back"]) == 0
    directory = inside / "runs" / "rolled-back"
    records = read_metrics(directory / "metrics.jsonl")
    events = [record for record in records if "rolled_back_from" in record]
    assert [(event["step"], event["rolled_back_from"], event["left_out_sequences"]) for event in events] == [(4, 8, 64)]
    lines = [record for record in records if "loss" in record]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert None not in [line["loss"] for line in lines]
    output = capsys.readouterr().out
    assert "diverged: step 8: 2 steps in a row were skipped" in output
    assert "back to step 4, and on without the next 64 sequences; tries left: 2" in output
    assert "checkpoint 8" not in output
    metadata = checkpoint.read_metadata(directory / "checkpoints", 12)
    assert metadata["progress"] == {"step": 12, "sequences": 12 * 16, "tokens": 12 * 16 * 16, "left_out": 64}
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["seconds"]["lost"] > 0
    assert sum(summary["seconds"].values()) == pytest.approx(summary["wall_seconds"])


def test_longer_bad_data_is_left_out_by_going_back_again(inside):
    """Twice as many sequences where no checkpoint was saved since, from the same one."""
    with scaled_rows(96, 160, math.inf):
        assert train.main(["tiny.py", "--guard.max-skipped", "2", "--run-dir", "runs/rolled-back-twice"]) == 0
    records = read_metrics(inside / "runs" / "rolled-back-twice" / "metrics.jsonl")
    events = [record for record in records if "rolled_back_from" in record]
    expected = [(4, 8, 64, 64), (4, 7, 224, 224)]  # by step 7 the metrics of step 6 are seen
    names = ("step", "rolled_back_from", "left_out_sequences", "left_out")
    assert [tuple(event[name] for name in names) for event in events] == expected
    assert [record["skipped_steps"] for record in records if "loss" in record] == [0] * 12


def test_a_run_without_a_checkpoint_to_go_back_to_has_diverged(inside, poisoned, capsys):
    options = ["--guard.max-skipped", "2", "--checkpoint.every-steps", "0", "--run-dir", "runs/nowhere-to-go"]
    assert train.main(["tiny.py", *options]) == cli.EXIT_OF["diverged"]
    assert "back to step" not in capsys.readouterr().out


def test_a_machine_that_computes_wrong_ends_the_run(inside, capsys):
    """The second computation of step 9 has one other bit in one parameter: status 4, before anything is saved of it."""
    options = ["--guard.rerun-every-steps", "3", "--checkpoint.every-steps", "9", "--run-dir", "runs/faulty"]
    with flipped_bit(call=11) as calls:  # steps 1 to 3, 3 again, 4 to 6, 6 again, 7 to 9
        assert train.main(["tiny.py", *options]) == cli.EXIT_OF["corrupted"] == 4
    assert calls[-1] == 12
    assert "corrupted: step 9, computed twice from the same state, gave two params." in capsys.readouterr().out
    directory = inside / "runs" / "faulty"
    assert json.loads((directory / "summary.json").read_text())["stopped"] == "corrupted"
    assert [path.name for path in (directory / "checkpoints").iterdir() if path.name.isdigit()] == []


def test_a_rollback_outlives_its_process(inside):
    """Killed between going back and the next save, a run leaves the same sequences out when it goes on."""
    directory = inside / "runs" / "went-back"
    with scaled_rows(96, 128, math.nan):
        options = ["--guard.max-skipped", "2", "--checkpoint.keep-newest", "9", "--run-dir", str(directory)]
        assert train.main(["tiny.py", *options]) == 0
        expected = read_metrics(directory / "metrics.jsonl")
        for step in checkpoint.all_steps(directory / "checkpoints"):
            if step > 4:
                shutil.rmtree(directory / "checkpoints" / str(step))
        (directory / "summary.json").unlink()
        assert train.main([str(directory)]) == 0
    same = ("step", "loss", "val_loss", "left_out")
    found = read_metrics(directory / "metrics.jsonl")
    assert [[r.get(name) for name in same] for r in found] == [[r.get(name) for name in same] for r in expected]
    # So does the try: until a step beyond it has been saved, it counts against those that are left.
    assert [resume.tried_rollbacks(directory, step) for step in (4, 8)] == [[4], []]


def test_a_rollback_keeps_what_it_no_longer_uses(inside, capsys):
    """A mistyped learning rate ruins a run that goes on: no checkpoint from before is lost, whatever is tried next."""
    arguments = ["tiny.py", "--run-dir", "runs/mistyped", "--checkpoint.every-steps", "2"]
    assert train.main([*arguments, "--training.steps", "6"]) == 0
    wrong = ["--training.steps", "16", "--optimizer.peak-learning-rate", "1e38", "--guard.max-skipped", "1"]
    accept = ["--accept-changes", "optimizer.peak_learning_rate"]
    assert train.main([*arguments, *wrong, *accept]) == cli.EXIT_OF["diverged"]
    names = {path.name for path in (inside / "runs" / "mistyped" / "checkpoints").iterdir()}
    assert {"6", "6.rolled-back"} & names
    assert {"4", "4.rolled-back"} & names
    capsys.readouterr()
    assert train.main([*arguments, "--training.steps", "16", *accept]) == 0
    assert f"steps {4 if '4' in names else 2} to 16" in capsys.readouterr().out


def test_a_configuration_that_was_changed_by_hand_is_refused(inside):
    assert train.main(["tiny.py", "--run-dir", "runs/edited", "--training.steps", "4"]) == 0
    path = inside / "runs" / "edited" / "config.json"
    path.write_text(path.read_text().replace('"beta2": 0.95', '"beta2": 0.91'))
    with pytest.raises(cli.UserError, match=r"runs/edited was made with another configuration: .*beta2 0.95 → 0.91"):
        train.main(["runs/edited", "--training.steps", "8"])


def test_a_run_that_ends_before_its_first_line_has_a_summary(inside):
    """Wrong at the first comparison, with nothing logged by then: status 4 all the same."""
    options = ["--guard.rerun-every-steps", "3", "--training.log-every-steps", "10", "--run-dir", "runs/silent"]
    with flipped_bit(call=3):
        assert train.main(["tiny.py", *options]) == 4
    assert json.loads((inside / "runs" / "silent" / "summary.json").read_text())["stopped"] == "corrupted"


def test_accepted_changes(inside, capsys):
    """What a resume refuses can be accepted by name, on record; other text too, with the tokenizer that the run has."""
    arguments = ["tiny.py", "--run-dir", "runs/accepting", "--training.steps"]
    assert train.main([*arguments, "4"]) == 0
    changed = [*arguments, "8", "--optimizer.beta2", "0.9"]
    with pytest.raises(cli.UserError, match=r"beta2 0.95 → 0.9; .* or go on with --accept-changes optimizer.beta2$"):
        train.main(changed)
    with pytest.raises(cli.UserError, match=r"names no field .*; did you mean optimizer.beta2\?"):
        train.main([*changed, "--accept-changes", "optimizer.bata2"])
    capsys.readouterr()
    assert train.main([*changed, "--accept-changes", "optimizer.beta2"]) == 0
    assert "changed for this run: optimizer.beta2 0.95 → 0.9" in capsys.readouterr().out
    assert json.loads((inside / "runs" / "accepting" / "config.json").read_text())["optimizer"]["beta2"] == 0.9

    tokenizer = (inside / "runs" / "accepting" / "tokenizer.json").read_bytes()
    (inside / "other").mkdir()
    for file in sorted((inside / "corpus").iterdir())[:120]:
        (inside / "other" / file.name).write_text(file.read_text().upper())
    other = ["runs/accepting", "--training.steps", "12", "--data.path", "other"]
    with pytest.raises(cli.UserError, match=r"data.path .* or go on with --accept-changes data.path"):
        train.main(other)
    assert train.main([*other, "--accept-changes", "data.path"]) == 0
    assert (inside / "runs" / "accepting" / "tokenizer.json").read_bytes() == tokenizer
    assert "steps 8 to 12" in capsys.readouterr().out


def test_the_seconds_of_a_last_save_are_not_forgotten(tmp_path):
    """A checkpoint says what was spent before its own save, the summary of the process that stopped there all."""
    said = {"step": 5.0, "checkpoint": 1.0}
    write_json(tmp_path / "summary.json", {"stopped": "preempted", "step": 4, "seconds": said | {"checkpoint": 3.0}})
    assert resume.count_lost(tmp_path, 4, said) == {"step": 5.0, "checkpoint": 3.0}
    assert resume.count_lost(tmp_path, 3, said) == said  # another step's: what it has spent is told by the metrics
