"""`python -m gptjax evaluate`, as called."""

import json
import math
import shutil

import pytest

from gptjax.commands import evaluate
from gptjax.errors import UserError
from gptjax.evaluation import pictures
from gptjax.evaluation.pictures import plot_positions


def results(*arguments: str, capsys) -> list[dict]:
    assert evaluate.main([*map(str, arguments), "--json", "-"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_runs_own_validation_split(run, capsys):
    """Windows that do not overlap give what the run itself found, but for the tokens that its rows leave out."""
    (result,) = results(run, "--stride", "32", capsys=capsys)
    summary = json.loads((run / "summary.json").read_text())
    assert result["nats_per_token"] == pytest.approx(summary["val_loss"], rel=0.02)
    assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]))
    assert sum(d["nats"] for d in result["documents"]) == pytest.approx(result["nats_per_token"] * result["tokens"])
    assert sum(result["tokens_by_position"]) == result["tokens"]
    assert result["step"] == 4


def test_a_run_is_read_without_the_kernel_that_trained_it(run, tmp_path, capsys):
    """A run that was told to train with a kernel of another device is read by what runs here."""
    folder = shutil.copytree(run, tmp_path / "run")
    config = (folder / "config.json").read_text(encoding="utf-8")
    assert config.count('"attention_kernel": "auto"') == 1
    config = config.replace('"attention_kernel": "auto"', '"attention_kernel": "cudnn"')
    (folder / "config.json").write_text(config, encoding="utf-8")
    (result,), (expected,) = (results(path, capsys=capsys) for path in (folder, run))
    assert result["nats_per_token"] == expected["nats_per_token"]


def test_given_text_several_runs_any_step(run, tmp_path, capsys):
    """Bytes are those of the text, whatever the step; earlier steps predict worse."""
    text = "The cat sat on mat 9. 猫坐在垫子上。\n" * 20
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    (last,) = results(run, "--data", path, capsys=capsys)
    (best,) = results(run, "--data", path, "--step", "best", capsys=capsys)
    assert last["bytes"] == best["bytes"] == len(text.encode())
    assert [d["origin"] for d in last["documents"]] == [str(path)]
    both = results(run, run, "--data", path, "--context-length", "16", capsys=capsys)
    assert len(both) == 2
    assert both[0] == both[1]
    assert both[0]["nats_per_token"] > last["nats_per_token"] * 0.9
    assert both[0]["stride"] == 8


def test_tables_and_picture(run, tmp_path, capsys):
    """What is printed names the run and the figures of the JSON, uncut; the picture is there."""
    out = tmp_path / "positions.png"
    assert evaluate.main([str(run), "--out", str(out), "--json", str(tmp_path / "all.json")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "all.json").read_text())
    assert str(run) in printed
    assert f"{result['nats_per_token']:.4f}" in printed
    assert f"{result['bits_per_byte']:.4f}" in printed
    assert "windows of 32 tokens, 16 apart" in printed
    assert out.read_bytes().startswith(b"\x89PNG")


def test_positions_are_counted_alike_everywhere(run, capsys):
    """1 is the first that a window predicts, with one token before it: in the numbers, the table and the picture."""
    (result,) = results(run, capsys=capsys)
    losses, counts = result["nats_per_token_by_position"], result["tokens_by_position"]
    assert len(losses) == len(counts) == 1 + 32
    assert (losses[0], counts[0]) == (None, 0)
    assert counts[1] == len(result["documents"]), "only the first window of a document predicts its first token"
    assert evaluate._bins([result]) == ["1", "2-3", "4-7", "8-15", "16-31", "32"]
    means = [*evaluate._by_bin(result, ["1", "2-3", "32"])]
    between = (losses[2] * counts[2] + losses[3] * counts[3]) / (counts[2] + counts[3])
    assert means == [f"{losses[1]:.3f}", f"{between:.3f}", f"{losses[32]:.3f}"]
    (line,) = plot_positions({"run": losses}).axes[0].lines
    assert [*map(tuple, line.get_xydata())] == [*enumerate(losses)][1:]


def test_numbers_are_not_lost_with_the_picture(run, tmp_path, monkeypatch):
    def fails(*arguments):
        raise UserError("cannot draw")

    monkeypatch.setattr(pictures, "plot_positions", fails)
    with pytest.raises(UserError, match="cannot draw"):
        evaluate.main([str(run), "--json", str(tmp_path / "a.json"), "--out", str(tmp_path / "a.png")])
    assert json.loads((tmp_path / "a.json").read_text())["run"] == str(run)


def test_another_field_is_suggested_by_this_commands_own_option(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match=r"no field 'text', but body \(--text-field NAME reads another\)$"):
        evaluate.main([str(run), "--data", str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", "33"], r"a stride of 33 is not between 1 and the window's 32 tokens"),
        (["--stride", "0"], "a stride of 0 is not between"),
        (["--context-length", "64"], r"windows of 64 tokens do not fit the model's context of 32"),
        (["--data", "missing.txt"], "missing.txt does not exist"),
        (["--step", "3"], "step"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_refusals_are_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main([str(run), *arguments])
    assert "\n" not in str(error.value)


def test_a_text_shorter_than_a_window_is_one(run, tmp_path, capsys):
    """By default; a longer one that was asked for is refused, with what works."""
    path = tmp_path / "short.txt"
    path.write_text("The cat.")
    (result,) = results(run, "--data", path, capsys=capsys)
    assert result["context_length"] == result["tokens"]
    works = f"fewer than one window of 32; --context-length {result['tokens']} works"
    with pytest.raises(UserError, match=works):
        evaluate.main([str(run), "--data", str(path), "--context-length", "32"])


def test_no_run_is_asked_for():
    with pytest.raises(UserError, match="no run given"):
        evaluate.main([])


def test_other_text_than_was_trained_on_is_no_validation_split(run):
    """What was held out may be what was trained on by now: the run's own split is refused, given text is not."""
    text = run.parent / "text.txt"
    before = text.read_bytes()
    try:
        text.write_bytes(before + before[:400])
        with pytest.raises(UserError, match=r"no longer what .* was trained on"):
            evaluate.main([str(run)])
    finally:
        text.write_bytes(before)
