"""What all entry points refuse, and how: one line on standard error, status 2, and before the work."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import sample
from gptjax.__main__ import COMMANDS
from gptjax.__main__ import main as gptjax_main
from gptjax.commands import attention
from gptjax.errors import UserError
from gptjax.evaluation import inside

ROOT = Path(__file__).parents[2]
MAIN = "gptjax/__main__.py"
REFUSED = [
    (MAIN, ["prepare", "missing.txt"], "missing.txt does not exist"),
    (MAIN, ["tokenizer", "train", "missing.txt"], "missing.txt does not exist"),
    (MAIN, ["tokenizer", "show", "missing.json"], "no tokenizer missing.json"),
    (MAIN, ["evaluate", "missing"], "missing is not a run"),
    (MAIN, ["attention", "missing"], "missing is not a run"),
    (MAIN, ["study", "missing.py"], "no study's file missing.py"),
    (MAIN, ["coordinates", "missing.py"], "no configuration file missing.py"),
    (MAIN, ["plan", "configs/gpt3_175b.py"], "no configuration file configs/gpt3_175b.py"),
    (MAIN, ["fit", "missing.csv"], "no table missing.csv"),
    (MAIN, ["report", "missing"], "missing is neither a study's folder"),
    (MAIN, ["recipe", "missing.py"], "no recipe missing.py; configs/recipe_tiny.py is one"),
    (MAIN, ["import", "missing", "run"], "missing is no directory, no GGUF file and no model of the Hugging Face hub"),
    (MAIN, ["export", "missing", "hf"], "missing is not a run"),
    (MAIN, ["verify", "missing"], "missing is not a run"),
    (MAIN, ["env", "--json", "no/where.json"], "--json no/where.json is in no"),
    (MAIN, ["nothing"], "no command 'nothing'"),
    ("train.py", ["missing.py"], "no configuration file missing.py"),
    ("sample.py", ["missing"], "missing is not a run"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_refusal_is_one_line_and_status_2(script, arguments, message, tmp_path, monkeypatch, capsys):
    """Of every program as it is started: with its own `if __name__ == "__main__"`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert [*tmp_path.iterdir()] == [], "a refusal leaves nothing behind"


def test_every_command_is_refused_above():
    assert {arguments[0] for script, arguments, _ in REFUSED if script == MAIN} - {"nothing"} == set(COMMANDS)


def test_a_refusal_of_a_process_of_its_own(tmp_path):
    """With JAX loaded, whose own words on standard error would drown the line."""
    command = [sys.executable, "-m", "gptjax", "evaluate", "missing"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: missing is not a run")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "missing.txt", "--json", "no/x.json"],
        ["tokenizer", "train", "missing.txt", "--json", "no/x.json"],
        ["tokenizer", "train", "missing.txt", "--out", "no/x.json"],
        ["tokenizer", "show", "missing.json", "--json", "no/x.json"],
        ["evaluate", "missing", "--json", "no/x.json"],
        ["evaluate", "missing", "--out", "no/x.png"],
        ["attention", "missing", "--json", "no/x.json"],
        ["attention", "missing", "--out", "no/x.png"],
        ["verify", "missing", "--json", "no/x.json"],
        ["env", "--json", "no/x.json"],
    ],
    ids=" ".join,
)
def test_where_results_go_is_checked_before_the_work(arguments, tmp_path, monkeypatch):
    """The input is missing too, but the output is complained of: it was looked at first."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        gptjax_main(arguments)
    assert str(error.value).startswith(f"{arguments[-2]} {arguments[-1]} is in no, which is no folder that exists")


def test_outputs_that_no_file_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--json no/x\.json is in no, which"):
        sample.main(["missing", "--json", "no/x.json"])
    with pytest.raises(UserError, match=r"--json \. is a folder"):
        gptjax_main(["env", "--json", "."])
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"--json x\.json cannot be written"):
        gptjax_main(["env", "--json", "x.json"])


@pytest.mark.parametrize("command", ["evaluate", "attention"])
def test_pictures_of_no_kind_are_refused_before_the_work(command):
    with pytest.raises(UserError, match=r"a\.xyz names no kind of picture; its name may end in .*\.png"):
        gptjax_main([command, "missing", "--out", "a.xyz"])


def test_text_that_the_tokenizer_loses_is_refused_everywhere(losing_run):
    """What would be drawn, continued or taken apart is another text than the one given."""
    loss = "the tokenizer cannot encode this text without loss: 'The cat' becomes 'the cat'"
    with pytest.raises(UserError, match=loss):
        gptjax_main(["attention", str(losing_run), "--text", "The cat"])
    with pytest.raises(UserError, match=loss):
        gptjax_main(["tokenizer", "show", str(losing_run), "--text", "The cat"])
    for options in ([], ["--num-samples", "2"]):
        with pytest.raises(UserError, match=loss):
            sample.main([str(losing_run), "--prompt", "The cat", *options])


def test_panels_are_counted_before_the_work(run, monkeypatch):
    monkeypatch.setattr("gptjax.evaluation.pictures.MAX_PANELS", 4)
    monkeypatch.setattr(inside, "attention_weights", None)
    with pytest.raises(UserError, match="2 layers of 4 heads are 8 panels"):
        attention.main([str(run), "--text", "The"])
