"""`python -m gptjax attention`, as called, and its pictures."""

import importlib.util
import json

import numpy as np
import pytest

from gptjax.commands import attention
from gptjax.errors import UserError
from gptjax.evaluation import pictures
from gptjax.evaluation.inside import Lens
from gptjax.evaluation.pictures import plot_attention, require_fits


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
        (["--text", "cat and dog " * 60], r"tokens, more than the 32 of the model's context; shorten it"),
        (["--text", ""], "--text is empty"),
        (["--layer", "2"], "--layer 2: the model has layers 0 to 1"),
        (["--text", "xyz " * 12], "more than the 32 of the model's context"),
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


def test_the_number_of_tokens_that_is_named_works(run, tmp_path):
    """The least of what fits the picture and of what fits the context."""
    with pytest.raises(UserError) as error:
        attention.main([str(run), "--text", "7" * 72])
    assert "72 tokens, more than the 32 of" in str(error.value)
    assert attention.main([str(run), "--text", "7" * 32, "--layer", "0", "--out", str(tmp_path / "a.svg")]) == 0
    with pytest.raises(UserError, match="65 tokens, more than the 64 that fit a picture"):
        require_fits(65, context_length=1024)
    require_fits(64, context_length=1024)


def test_two_kinds_of_picture_have_two_names(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert attention.main([str(run), "--text", "The"]) == 0
    before = (tmp_path / "attention.png").read_bytes()
    assert attention.main([str(run), "--text", "The", "--logit-lens"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention.png", "lens.png"]
    assert (tmp_path / "attention.png").read_bytes() == before


@pytest.mark.parametrize("options", [[], ["--logit-lens"]])
def test_numbers_are_not_lost_with_the_picture(run, tmp_path, monkeypatch, options):
    def fails(*arguments):
        raise UserError("cannot draw")

    monkeypatch.setattr(pictures, "plot_attention", fails)
    monkeypatch.setattr(pictures, "plot_logit_lens", fails)
    with pytest.raises(UserError, match="cannot draw"):
        attention.main([str(run), "--json", str(tmp_path / "a.json"), "--out", str(tmp_path / "a.png"), *options])
    assert json.loads((tmp_path / "a.json").read_text())["run"] == str(run)


def test_a_font_with_the_characters_is_used_where_there_is_one(tmp_path, monkeypatch):
    """Without one Chinese is numbers; with one, for which a font with signs stands that matplotlib's own lacks, it is
    drawn, and no warning says that it was not."""
    pictures._fonts.cache_clear(), pictures._drawable.cache_clear()
    try:
        monkeypatch.setattr(pictures, "CJK_FONTS", ())
        assert pictures._drawable("⌒中") == "U+2312U+4E2D"
        pictures._fonts.cache_clear(), pictures._drawable.cache_clear()
        monkeypatch.setattr(pictures, "CJK_FONTS", ("No Such Font", "STIXGeneral", "cmr10"))
        assert pictures._fonts() == ["DejaVu Sans", "STIXGeneral"]
        assert pictures._drawable("a⌒中") == "a⌒U+4E2D"
        figure = plot_attention(np.ones((1, 1, 1, 1)), ["⌒"], tmp_path / "a.png")
        assert figure.axes[0].get_xticklabels()[0].get_text() == "⌒"
        lens = Lens(np.zeros((1, 1), int), np.ones((1, 1)), np.zeros((1, 1)))
        pictures.plot_logit_lens(lens, ["⌒"], [["⌒"]], tmp_path / "b.png")
    finally:
        pictures._fonts.cache_clear(), pictures._drawable.cache_clear()


def test_too_many_panels_name_the_number_that_fits():
    with pytest.raises(UserError, match=r"48 layers of 25 heads are 1200 panels.*at most 7 with --layer"):
        plot_attention(np.ones((48, 25, 2, 2)), ["a", "b"])


def test_odd_labels_are_drawn_without_a_warning(tmp_path):
    """Characters that the font lacks, formulas and control characters: warnings are errors here."""
    weights = np.tri(3)[None, None] / np.arange(1, 4)[None, None, :, None]
    plot_attention(weights, ["中", "$x^", "\\n"], tmp_path / "a.png")
