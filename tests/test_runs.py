"""Whole runs through the entry points: what a user meets, including kills, resumes and refusals."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train
from gptjax import cli
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.load import load_run
from gptjax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
LOSSES = ("loss", "grad_norm", "learning_rate", "tokens", "val_loss", "val_bits_per_byte")


def start(workplace: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """`python train.py` in a process of its own, on one device."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        command, cwd=workplace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(workplace: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    process = start(workplace, *arguments, **variables)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def losses(directory: Path) -> list[dict]:
    return [
        {name: record[name] for name in ("step", *LOSSES) if name in record}
        for record in read_metrics(directory / "metrics.jsonl")
    ]


@pytest.fixture(scope="session")
def uninterrupted(workplace) -> Path:
    """A run that nothing disturbed."""
    code, output = run(workplace, "tiny.py", "--run-dir", "runs/uninterrupted")
    assert code == 0, output
    return workplace / "runs" / "uninterrupted"


def test_a_run_explains_itself(uninterrupted, workplace):
    """The run's folder holds what resuming, sampling and writing about it need, in the documented words."""
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "samples.md", "summary.json", "loss.png"} <= names
    config = json.loads((uninterrupted / "config.json").read_text())
    assert None not in [value for section in config.values() if isinstance(section, dict) for value in section.values()]
    assert {"versions", "devices", "source"} <= set(config["environment"])
    training, evaluation = read_metrics(uninterrupted / "metrics.jsonl")[-2:]
    fields = "step tokens loss learning_rate grad_norm tokens_per_second mfu data_wait_fraction seconds"
    assert set(fields.split()) <= set(training)
    assert training["mfu"] is None  # this CPU's peak is unknown, and unknown stays unknown
    assert {"val_loss", "val_bits_per_byte", "val_perplexity"} <= set(evaluation)
    summary = json.loads((uninterrupted / "summary.json").read_text())
    fields = "final_loss val_loss val_bits_per_byte val_perplexity parameters tokens tokens_per_second mfu"
    assert set(f"{fields} wall_seconds productive_seconds peak_memory_bytes stopped".split()) <= set(summary)
    assert summary["stopped"] == "finished"
    assert summary["tokens"] == 12 * 16 * 16
    first = read_metrics(uninterrupted / "metrics.jsonl")[0]
    assert evaluation["val_loss"] < first["loss"]  # it learned something


def test_retention_keeps_newest_and_best(uninterrupted):
    steps = {int(path.name) for path in (uninterrupted / "checkpoints").iterdir() if path.name.isdigit()}
    evaluations = {r["step"]: r["val_loss"] for r in losses(uninterrupted) if "val_loss" in r}
    assert steps == {8, 12, min(evaluations, key=evaluations.get)}


@pytest.mark.parametrize("killed_after", [5, 9])
def test_killed_run_resumes_bit_identically(uninterrupted, workplace, killed_after):
    """SIGKILL, then `train.py RUN`: every remaining loss and evaluation equals the uninterrupted run's."""
    directory = workplace / "runs" / f"killed-{killed_after}"
    process = start(workplace, "tiny.py", "--run-dir", str(directory))
    for line in process.stdout:
        if line.startswith(f"step {killed_after:>2}/12"):
            process.kill()
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    code, output = run(workplace, str(directory))
    assert code == 0, output
    if killed_after > 8:  # saving step 8 has waited for the save of step 4
        assert "steps 0 to 12" not in output
    assert losses(directory) == losses(uninterrupted)


@pytest.mark.parametrize(
    ("number", "stopped", "status"),
    [
        (signal.SIGTERM, "preempted", cli.EXIT_OF["preempted"]),
        (signal.SIGINT, "interrupted", cli.EXIT_OF["interrupted"]),
    ],
)
def test_a_signal_saves_and_has_its_exit_status(uninterrupted, workplace, number, stopped, status):
    """A signal between checkpoints: the step it came in is saved, and the run goes on from just there.

    It is sent while the step compiles, so that it can neither come too early nor too late.
    """
    directory = workplace / "runs" / stopped
    process = start(workplace, "tiny.py", "--run-dir", str(directory))
    for line in process.stdout:
        if line.startswith("training: steps"):
            process.send_signal(number)
            break
    output, _ = process.communicate(timeout=120)
    summary = json.loads((directory / "summary.json").read_text())
    assert process.returncode == status == {"preempted": 75, "interrupted": 130}[stopped], output
    assert summary["stopped"] == stopped
    steps = [int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]
    assert steps == [summary["step"]] == [1]
    assert f"python train.py {directory}" in output
    code, output = run(workplace, str(directory))
    assert code == 0, output
    assert f"steps {summary['step']} to 12" in output
    assert losses(directory) == losses(uninterrupted)


def test_the_step_compiles_once_and_is_kept(workplace, tmp_path):
    """A ramping batch and cut dispatches are one program, and a second start takes it from the persistent cache."""
    options = ["tiny.py", "--training.batch-ramp-start", "8", "--training.batch-ramp-tokens", "512"]
    options += ["--training.steps-per-dispatch", "3", "--checkpoint.every-steps", "5"]
    variables = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    variables |= {"JAX_LOG_COMPILES": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    kept = []
    for name in ("first", "second"):
        code, output = run(workplace, *options, "--run-dir", f"runs/{name}", **variables)
        assert code == 0, output
        assert output.count("Compiling jit(train_step)") == 1
        kept.append({path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")})
    assert kept[0] == kept[1]
    assert any("train_step" in name for name in kept[0])


def test_finished_run_says_so_and_gives_the_next_command(uninterrupted, inside, capsys):
    assert train.main(["tiny.py", "--run-dir", "runs/uninterrupted", "--mesh.data", "8"]) == 0
    output = capsys.readouterr().out
    assert "is finished" in output
    assert "python sample.py runs/uninterrupted" in output


@pytest.fixture(scope="session")
def in_process(workplace, uninterrupted) -> Path:
    """A run over eight devices, in this process, of another length."""
    here = Path.cwd()
    os.chdir(workplace)
    try:
        assert train.main(["tiny.py", "--run-dir", "runs/eight", "--training.steps", "4"]) == 0
    finally:
        os.chdir(here)
    return workplace / "runs" / "eight"


def test_eight_devices_give_the_losses_of_one(in_process, uninterrupted):
    """Dropout included: draws are over global shapes. Schedules differ after warm-up, so three steps are compared."""
    ours = [r["loss"] for r in losses(in_process) if "loss" in r][:3]
    theirs = [r["loss"] for r in losses(uninterrupted) if "loss" in r][:3]
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_more_steps_and_scanned_layers_continue_a_run(in_process, inside, capsys):
    """What may change on resume changes and is printed; one parameter layout serves scan and unroll."""
    assert train.main(["runs/eight", "--training.steps", "6", "--model.scan-layers", "--mesh.fsdp", "2"]) == 0
    output = capsys.readouterr().out
    assert "training.steps 4 → 6" in output
    assert "model.scan_layers False → True" in output
    assert "mesh.fsdp 1 → 2" in output
    assert [r["step"] for r in losses(in_process) if "loss" in r] == list(range(1, 7))
    assert sample.main(["runs/eight", "--prompt", "the ", "--max-tokens", "4"]) == 0


@pytest.mark.parametrize(
    ("override", "field"),
    [
        (["--model.num-layers", "3"], "model.num_layers 2 → 3"),
        (["--optimizer.peak-learning-rate", "0.1"], "optimizer.peak_learning_rate 0.01 → 0.1"),
        (["--training.seed", "1"], "training.seed 0 → 1"),
        (["--tokenizer.kind", "byte"], "tokenizer.kind bpe → byte"),
        (["--optimizer.kind", "muon"], "optimizer.kind adamw → muon"),
    ],
)
def test_another_configuration_is_refused_with_its_fields(uninterrupted, inside, override, field, refusal):
    before = (uninterrupted / "config.json").read_bytes()
    assert refusal(train.main, "tiny.py", "--run-dir", "runs/uninterrupted", *override).count(field) == 1
    assert (uninterrupted / "config.json").read_bytes() == before


def test_a_batch_that_cannot_fit_is_refused_before_the_data_is_read(inside, monkeypatch, refusal):
    """Where devices say what they can hold: with the estimate and the largest that fits."""
    monkeypatch.setattr("gptjax.stages.train.memory_bytes", lambda device: 1_000_000)
    size = ["--training.batch-size", "800", "--training.micro-batch-size", "800"]
    line = refusal(train.main, "tiny.py", "--data.path", "missing", *size)
    assert "800 sequences of 16 tokens needs at least" in line
    assert "the largest training.micro_batch_size that fits is" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tiny.py", "--data.path", "corpsu"], ["corpsu", "corpus"]),
        (["tiny.py", "--data.path", "empty"], ["empty"]),
        (["tiny.py", "--data.path", "broken.jsonl"], ["broken.jsonl", "2"]),
        (["tiny.py", "--data.path", "other.jsonl"], ["text", "body"]),
        (["tiny.py", "--data.path", "latin1.txt"], ["latin1.txt"]),
        (["tiny.py", "--data.path", "short.txt"], ["validation", "tokens"]),
        (["tiny.py", "--model.vocab-size", "200"], ["200", "300"]),
        (["tiny.py", "--training.sample-prompt", "the cat sat on a mat " * 9], ["sample_prompt", "16"]),
        (["tiny.py", "--tokenizer.kind", "char", "--training.sample-prompt", "Q"], ["'Q'"]),
        (["tiny.py", "--model.fp8"], ["model.fp8", "compute capability 8.9", "this is cpu"]),
        (["tiny.py", "--mesh.tensor", "3"], ["3", "8 devices"]),
        (["tiny.py", "--mesh.tensor", "8"], ["num_heads 4", "nearest that does is 4"]),
        (["tiny.py", "--training.micro-batch-size", "4"], ["4 sequences", "8 devices"]),
        (["tiny.py", "--run-dir", "tiny.py/run"], ["cannot write", "tiny.py"]),
        (["tiny.py", "--data.weights", "0"], ["data.weights has 0", "positive"]),
        (["tiny.py", "--data.weights", "1", "2"], ["2 numbers for 1 sources"]),
        (["tiny.py", "--tokenizer.path", "nowhere.json"], ["nowhere.json"]),
        (["tiny.py", "--tokenizer.path", "tiny.py"], ["tiny.py is not a tokenizer.json"]),
        (["configs/quickstart.py", "--data.path", "x"], ["no configuration file configs/quickstart.py"]),
    ],
)
def test_bad_input_is_one_line(inside, arguments, expected, refusal):
    (inside / "empty").mkdir(exist_ok=True)
    (inside / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n', encoding="utf-8")
    (inside / "other.jsonl").write_text('{"body": "good"}\n', encoding="utf-8")
    (inside / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (inside / "short.txt").write_text("too short", encoding="utf-8")
    error = refusal(train.main, *arguments, *(["--run-dir", "runs/refused"] if "--run-dir" not in arguments else []))
    assert all(part in error for part in expected), error
    assert not (inside / "runs" / "refused").exists()


def test_a_run_trained_in_eight_bits_is_used_without(uninterrupted, tmp_path):
    """On any device, and with the products whose losses its evaluations were."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["model"]["fp8"] = True
    path.write_text(json.dumps(values), encoding="utf-8")
    loaded = load_run(tmp_path / "run")
    assert not loaded.model.config.fp8
    assert loaded.config.model == loaded.model.config


def test_a_missing_logger_is_told_before_there_is_a_run(inside, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = ["tiny.py", "--training.log-to", "wandb", "--run-dir", "runs/unlogged"]
    assert 'pip install "gptjax[wandb]"' in refusal(train.main, *arguments)
    assert not (inside / "runs" / "unlogged").exists()


def test_the_quickstart_trains_on_the_standard_library(inside, capsys):
    """The configuration that everyone meets first, for two steps and without its evaluation of everything."""
    options = ["--training.steps", "2", "--training.eval-sequences", "8", "--tokenizer.vocab-size", "300"]
    assert train.main([*options, "--training.sample-tokens", "4"]) == 0
    output = capsys.readouterr().out
    assert "source code of Python's standard library" in output
    assert "python sample.py runs/quickstart --prompt 'def __init__(self'" in output


def test_changed_text_is_refused_on_resume(workplace, inside, refusal):
    """A run must not go on over other tokens as if nothing had happened."""
    (inside / "words.txt").write_text("some words that will change, " * 100, encoding="utf-8")
    options = ["--data.path", "words.txt", "--tokenizer.kind", "byte", "--run-dir", "runs/changed"]
    assert train.main(["tiny.py", *options, "--training.steps", "2"]) == 0
    (inside / "words.txt").write_text("other words that have changed, " * 100, encoding="utf-8")
    assert "changed" in refusal(train.main, "runs/changed", "--training.steps", "4")


def test_sampling_a_run(uninterrupted, inside, capsys, tmp_path):
    """One prompt streams; several make JSON lines; both draw the same text; seeds reproduce."""
    options = ["runs/uninterrupted", "--prompt", "the ", "--max-tokens", "8"]
    assert sample.main(options) == 0
    streamed = capsys.readouterr().out
    assert sample.main([*options, "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {"prompt", "text", "token_ids", "finish_reason"}
    assert streamed == record["prompt"] + record["text"] + "\n"
    assert len(record["token_ids"]) <= 8
    assert sample.main([*options, "--num-samples", "3", "--json", str(tmp_path / "out.jsonl")]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert records[0] == record
    assert len({r["text"] for r in records}) > 1


def test_how_a_run_is_sampled_changes_no_greedy_text(uninterrupted, inside, capsys):
    """With guesses of the run itself or of the text, or prompts in pieces; eight bits work; and it can be timed."""
    options = ["runs/uninterrupted", "--prompt", "the ", "--max-tokens", "6", "--temperature", "0"]
    assert sample.main(options) == 0
    expected = capsys.readouterr().out
    for more in (["--draft", "runs/uninterrupted", "--timing"], ["--draft-tokens", "2"], ["--prefill-chunk", "1"]):
        assert sample.main([*options, *more]) == 0
        said = capsys.readouterr()
        assert said.out == expected
        assert ("first token after" in said.err) == ("--timing" in more)
    assert sample.main([*options, "--weights", "int8", "--kv-cache", "int8"]) == 0
    assert capsys.readouterr().out.startswith("the ")


def test_a_draft_with_another_tokenizer(uninterrupted, inside, monkeypatch, refusal):
    own, number = Tokenizer.token_bytes, itertools.count()
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self: [*own(self), b"x" * next(number)])
    error = refusal(sample.main, "runs/uninterrupted", "--draft", "runs/uninterrupted")
    assert "another tokenizer" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runs/uninterupted"], ["runs/uninterupted is not a run", "uninterrupted"]),
        (["runs/uninterrupted", "--step", "5"], ["5", "12"]),
        (["runs/uninterrupted", "--step", "newest"], ["newest", "last"]),
        (["runs/uninterrupted", "--prompt", "the cat sat on a mat " * 20], ["16"]),
        (["runs/uninterrupted", "--temperature", "-1"], ["temperature"]),
        (["runs/uninterrupted", "--temperature", "nan"], ["temperature"]),
        (["runs/uninterrupted", "--top-k", "1000000"], ["top_k", "vocabulary"]),
        (["runs/uninterrupted", "--stop", ""], ["stop string is empty"]),
    ],
)
def test_bad_sampling_is_one_line(uninterrupted, inside, arguments, expected, refusal):
    error = refusal(sample.main, *arguments)
    assert all(part in error for part in expected), error


def test_ten_lines_of_notebook(uninterrupted, inside):
    """README's notebook code, as it stands there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0].replace("runs/quickstart", "runs/uninterrupted")
    names: dict = {}
    exec(code, names)
    assert names["completion"].text
    assert names["figure"].axes[0].lines
