"""`python -m gptjax attention`, as called, and its pictures."""

import importlib.util
import json

import numpy as np
import pytest

from gptjax.commands import attention
from gptjax.errors import UserError
from gptjax.evaluation.pictures import plot_attention


def test_every_head_is_drawn_and_numbers_are_given(run, tmp_path, capsys):
    out, numbers = tmp_path / "a.png", tmp_path / "a.json"
    assert attention.main([str(run), "--out", str(out), "--json", str(numbers)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    result = json.loads(numbers.read_text())
    weights = np.array(result["weights"])
    T = len(result["tokens"])
    assert weights.shape == (2, 4, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-4)
    printed = capsys.readouterr().out
    assert all(token in printed for token in result["tokens"])
    assert f"{result['tokens'][0]} 1.00" in printed, "the first token sees itself alone"


def test_layers_are_chosen(run, tmp_path, capsys):
    assert attention.main([str(run), "--layer", "1", "--out", str(tmp_path / "a.png"), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == [1]
    assert len(result["weights"]) == 1


def test_logit_lens(run, tmp_path, capsys):
    out = tmp_path / "lens.png"
    assert attention.main([str(run), "--logit-lens", "--text", "The 猫", "--out", str(out), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert np.shape(result["predicted"]) == np.shape(result["probability"]) == (2, len(result["tokens"]))
    assert out.read_bytes().startswith(b"\x89PNG")
    assert attention.main([str(run), "--logit-lens", "--layer", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "after layer 1" in printed
    assert "after layer 0" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "cat and dog " * 60], r"more than the 64 that fit a picture"),
        (["--text", ""], "--text is empty"),
        (["--layer", "2"], "--layer 2: the model has layers 0 to 1"),
        (["--out", "nowhere/a.png"], r"cannot write the picture nowhere.a\.png"),
        (["--text", "xyz " * 12], "but must have 1 to 32, the context"),
    ],
)
def test_refusals_are_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        attention.main([str(run), *arguments])
    assert "\n" not in str(error.value)


def test_without_matplotlib_its_extra_is_named(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "gptjax\[log\]"'):
        attention.main([str(run)])


def test_too_many_panels_name_the_number_that_fits():
    with pytest.raises(UserError, match=r"48 layers of 25 heads are 1200 panels.*at most 7 with --layer"):
        plot_attention(np.ones((48, 25, 2, 2)), ["a", "b"])


def test_odd_labels_are_drawn_without_a_warning(tmp_path):
    """Characters that the font lacks, formulas and control characters: warnings are errors here."""
    weights = np.tri(3)[None, None] / np.arange(1, 4)[None, None, :, None]
    plot_attention(weights, ["中", "$x^", "\\n"], tmp_path / "a.png")
