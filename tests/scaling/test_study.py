"""A study is data, its runs are done once, and what is predicted is written down before it is trained."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from gptjax.__main__ import main
from gptjax.config import Config, ModelConfig, TokenizerConfig, TrainingConfig
from gptjax.errors import UserError
from gptjax.model.accounting import training_flops_per_token
from gptjax.scaling.conduct import Stopped, conduct, open_folder
from gptjax.scaling.laws import counted_parameters
from gptjax.scaling.predict import comparison, predict
from gptjax.scaling.study import Study, expand, load_study
from gptjax.training.schedule import final_progress

BASE = Config(
    model=ModelConfig(num_layers=1, num_heads=1, model_dim=16, context_length=16),
    tokenizer=TokenizerConfig(kind="byte"),
    training=TrainingConfig(batch_size=2, eval_every_steps=0, sample_every_steps=0),
)
SIZES = {f"w{width}": {"model.model_dim": width} for width in (16, 32, 64, 128)}


def study(**changes):
    fields = {"question": "?", "base": BASE, "sizes": SIZES, "tokens": (320, 640, 1280)} | changes
    return Study(**fields)


def test_every_combination_is_a_run_in_whole_steps():
    grid = {"training.seed": (0, 1), "optimizer.peak_learning_rate": (0.01, 0.002)}
    runs = expand(study(grid=grid, tokens=(330, 1_500_000)))
    assert len(runs) == 4 * 4 * 2
    assert (runs[0].name, runs[0].config.training.steps, runs[0].tokens) == (
        "w16-seed_0-peak_learning_rate_0.01-330tokens", 10, 320,
    )  # fmt: skip
    assert runs[1].name.endswith("-1.5Mtokens")
    assert runs[1].trunk == runs[0].trunk
    assert {run.config.training.seed for run in runs} == {0, 1}


def test_budgets_by_parameters_and_by_flops():
    model = dataclasses.replace(BASE.model, vocab_size=272)
    parameters = counted_parameters(model, "total")
    (run,) = expand(study(sizes={"a": {}}, tokens=(), tokens_per_parameter=(20,), counts="total"))
    assert (run.parameters, run.budget) == (parameters, 20)
    assert run.tokens == pytest.approx(20 * parameters, abs=16)
    (run,) = expand(study(sizes={"a": {}}, tokens=(), flops=(1e9,)))
    assert run.flops == run.tokens * training_flops_per_token(model).total == pytest.approx(1e9, rel=0.01)


def test_a_batch_that_grows_has_its_budget():
    """Steps are those that see the budget's tokens, small batches included, and what is planned is what is trained."""
    ramp = {"batch_size": 64, "micro_batch_size": 4, "batch_ramp_start": 4, "batch_ramp_tokens": 20_000}
    base = dataclasses.replace(BASE, training=dataclasses.replace(BASE.training, **ramp))
    for run in expand(study(base=base, tokens=(9_000, 40_000))):
        assert run.tokens == final_progress(run.config.training, 16).tokens == pytest.approx(run.budget, abs=64 * 16)


def test_all_runs_are_evaluated_on_the_same():
    """As many held-out sequences as the shortest run pays for, or as many as the file says."""
    runs = expand(study(tokens=(32 * 1000, 32 * 10_000)))
    assert {run.config.training.eval_sequences for run in runs} == {3 * 2 * 1000 // 20}
    runs = expand(study(grid={"training.eval_sequences": (0, 7)}, tokens=(320,)))
    assert {run.config.training.eval_sequences for run in runs} == {0, 7}


def test_budgets_are_counted_in_rows():
    """A run whose rows are shorter than its context has more steps for its tokens, of fewer FLOPs."""
    half = dataclasses.replace(BASE, training=dataclasses.replace(BASE.training, sequence_length=8))
    (run,), (short,) = (expand(study(base=base, sizes={"a": {}}, tokens=(320,))) for base in (BASE, half))
    assert (run.tokens, short.tokens) == (320, 320)
    assert short.config.training.steps == 2 * run.config.training.steps
    assert short.flops < run.flops


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {}}, "no sizes"),
        ({"flops": (1e9,)}, "this has tokens and flops"),
        ({"tokens": ()}, "this has none of them"),
        ({"tokens": (0,)}, "a budget must be positive"),
        ({"predict": ("w99",)}, "predict names .*but the sizes are w16"),
        ({"grid": {"model.width": (1,)}}, "grid sets model.width, which is no field"),
        ({"grid": {"training.seed": (1, 1)}}, "must be different values"),
        ({"branch_cooldowns": True}, "needs optimizer.schedule wsd"),
    ],
)
def test_what_is_no_study(changes, message):
    with pytest.raises(UserError, match=message):
        study(**changes)


def test_what_cannot_be_trained():
    with pytest.raises(UserError, match="w16: a budget of 8 is 8 tokens, less than a step's 32"):
        expand(study(tokens=(8,)))
    with pytest.raises(UserError, match="two runs of the study would be called"):
        expand(study(tokens=(1_000_000, 1_000_100)))
    with pytest.raises(UserError, match=r"a: .*num_heads"):
        expand(study(sizes={"a": {"model.num_heads": 3}}))


def test_files_that_are_no_study(tmp_path):
    for text, message in (("x = 1", "does not assign"), ("1/0", "ZeroDivisionError")):
        (tmp_path / "s.py").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load_study(tmp_path / "s.py")


def finish(folder, name, loss, stopped="finished", step=10**6):
    directory = folder / "runs" / name
    directory.mkdir(parents=True, exist_ok=True)
    card = {"stopped": stopped, "step": step, "val_loss": loss, "wall_seconds": 1.0}
    (directory / "summary.json").write_text(json.dumps(card), encoding="utf-8")


def law(run):
    return 1.5 + 30 / run.parameters**0.4 + 20 / run.tokens**0.5


class Launcher:
    """Trains by a formula, and remembers what it was asked for."""

    def __init__(self, runs, **fates):
        self.runs, self.fates, self.asked = runs, fates, []

    def __call__(self, trunks, folder):
        self.asked.append(list(trunks))
        for run in self.runs:
            if run.trunk in trunks and run.trunk not in self.fates:
                finish(folder, run.name, law(run))
        return {trunk: self.fates.get(trunk, 0) for trunk in trunks}


def conducted(of, folder, launcher, say=lambda text: None):
    runs = open_folder(of, folder, extend=False)
    return conduct(runs, [*of.grid], folder, launcher, lambda *a: predict(*a, counts=of.counts), say)


def test_a_prediction_is_written_before_its_runs_and_once(tmp_path):
    of = study(predict=("w128",))
    launcher = Launcher(expand(of))
    seen = []

    def launch(trunks, folder):
        seen.append((list(trunks), (folder / "prediction.json").exists()))
        return launcher(trunks, folder)

    found = conducted(of, tmp_path, launch)
    assert seen == [(["w16", "w32", "w64"], False), (["w128"], True)]
    rows = comparison(found, tmp_path)
    assert len(rows) == 3
    assert all(abs(row["error"]) < 1e-3 and row["low"] <= row["measured"] * 1.001 for row in rows)
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 12
    assert float(table[0]["loss"]) == pytest.approx(law(expand(of)[0]))
    before = (tmp_path / "prediction.json").read_text(encoding="utf-8")
    conducted(of, tmp_path, launch)
    assert len(seen) == 2, "what has finished is not trained again"
    assert (tmp_path / "prediction.json").read_text(encoding="utf-8") == before


def test_what_was_trained_cannot_be_predicted(tmp_path):
    of = study(predict=("w128",))
    finish(tmp_path, expand(of)[-1].name, 3.0)
    with pytest.raises(UserError, match="was trained before there was a prediction"):
        conducted(of, tmp_path, Launcher(expand(of)))


def test_failures_are_listed_and_nothing_is_predicted_from_them(tmp_path):
    of = study(predict=("w128",))
    launcher = Launcher(expand(of), w32=1)
    found = conducted(of, tmp_path, launcher)
    assert {result.status for result in found if result.run.trunk == "w32"} == {"failed"}
    assert {result.status for result in found if result.run.trunk == "w128"} == {"waiting"}
    assert not (tmp_path / "prediction.json").exists()
    launcher.fates = {}
    conducted(of, tmp_path, launcher)
    assert launcher.asked[1:] == [["w32"], ["w128"]]


def test_diverged_runs_are_left_out_and_said(tmp_path):
    of = study(predict=("w128",), tokens=(320, 640, 1280, 2560))
    runs = expand(of)
    finish(tmp_path, runs[0].name, None, stopped="diverged", step=3)

    def launch(trunks, folder):
        for run in runs[1:]:
            if run.trunk in trunks:
                finish(folder, run.name, law(run))
        return dict.fromkeys(trunks, 0)

    conducted(of, tmp_path, launch)
    prediction = json.loads((tmp_path / "prediction.json").read_text(encoding="utf-8"))
    assert prediction["excluded"] == [f"{runs[0].name}: diverged"]
    assert len(prediction["points"]) == 11


def test_a_signal_stops_the_study(tmp_path):
    with pytest.raises(Stopped) as stop:
        conducted(study(), tmp_path, Launcher(expand(study()), w16=75))
    assert stop.value.status == 75


def test_a_study_that_changed_is_refused_and_may_be_extended(tmp_path):
    open_folder(study(), tmp_path, extend=False)
    with pytest.raises(UserError, match=r"w16-320tokens: model.num_layers 1 → 2"):
        open_folder(
            study(base=dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, num_layers=2))),
            tmp_path,
            extend=True,
        )
    with pytest.raises(UserError, match="no longer has the run w16-320tokens"):
        open_folder(study(tokens=(640, 1280)), tmp_path, extend=True)
    more = study(tokens=(320, 640, 1280, 2560))
    with pytest.raises(UserError, match=r"4 new runs, w16-2.56ktokens the first; --extend adds them"):
        open_folder(more, tmp_path, extend=False)
    assert len(open_folder(more, tmp_path, extend=True)) == 16
    with pytest.raises(UserError, match="began with counts"):
        open_folder(study(counts="total"), tmp_path, extend=True)


STUDY = """
from gptjax.config import *
from gptjax.scaling.study import Study
study = Study(
    question="Does it learn?",
    base=Config(
        model=ModelConfig(num_layers=1, num_heads=1, model_dim=16, context_length=16),
        tokenizer=TokenizerConfig(kind="byte"), data=DataConfig(path="text.txt"),
        optimizer=OptimizerConfig(schedule="wsd", warmup_steps=2, wsd_decay_fraction=0.5),
        training=TrainingConfig(
            batch_size=8, eval_every_steps=0, sample_every_steps=0, sample_tokens=1, sample_prompt="t"
        ),
        checkpoint=CheckpointConfig(every_steps=0, keep_newest=1),
    ),
    sizes={"a": {}}, tokens=(1280, 2560), branch_cooldowns=True,
)
"""


def test_a_study_from_its_command_and_its_report(tmp_path, monkeypatch, capsys):
    """In this process, as its job would: cooldowns branch off, and come to what a run of its own comes to."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be, that is the question\n" * 100, encoding="utf-8")
    Path("s.py").write_text(STUDY, encoding="utf-8")
    assert main(["study", "s.py", "--dry-run"]) == 0
    assert "2 runs in 1 chains" in capsys.readouterr().out
    assert not Path("studies").exists()
    open_folder(load_study("s.py"), Path("studies/s"), extend=False)
    assert main(["study", "s.py", "--chain", "a"]) == 0
    runs = {run.name: run for run in expand(load_study("s.py"))}
    summaries = {name: json.loads(Path(f"studies/s/runs/{name}/summary.json").read_text("utf-8")) for name in runs}
    assert [summary["step"] for summary in summaries.values()] == [10, 20]
    from gptjax.stages.train import train

    longest = runs["a-2.56ktokens"].config
    alone = train(dataclasses.replace(longest, run_dir="alone"))
    assert alone["val_loss"] == summaries["a-2.56ktokens"]["val_loss"], "the branch is the run, to the bit"
    capsys.readouterr()
    assert main(["study", "s.py", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["finished", "finished"], "nothing is trained again"
    with pytest.raises(UserError, match="no run of the study has the trunk b; there are: a"):
        main(["study", "s.py", "--chain", "b"])
    assert main(["report", "studies/s", "--out", "report"]) == 0
    text = Path("report/report.md").read_text(encoding="utf-8")
    assert "> Does it learn?" in text
    assert f"{alone['val_loss']:.4f}" in text
    assert "No law is fitted: " in text
    assert str(tmp_path) not in text.replace(str(tmp_path / "data"), ""), "a report names no machine's folders"
    assert main(["report", "studies/s/runs/a-2.56ktokens", "--out", "run"]) == 0
    text = Path("run/report.md").read_text(encoding="utf-8")
    for words in ("Goodput", "curves.png", "versions.jax", "`optimizer.schedule` | `wsd`", "## Samples"):
        assert words in text
    assert Path("run/curves.png").stat().st_size > 1000
