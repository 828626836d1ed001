"""`python -m gptjax tokenizer`, as called."""

import json
from pathlib import Path

import pytest

from gptjax.commands import tokenizer
from gptjax.config import DataConfig, TokenizerConfig
from gptjax.data.prepare import prepare
from gptjax.errors import UserError
from gptjax.text.files import load_tokenizer

SOURCES = ("english.txt", "chinese.jsonl")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "english.txt").write_text("The cat sat on the mat, and the mat was flat. " * 200)
    (tmp_path / "chinese.jsonl").write_text((json.dumps({"text": "床前明月光，疑是地上霜。"}) + "\n") * 50)
    return list(SOURCES)


def test_training_gives_the_tokenizer_that_prepare_would_train(sources, tmp_path, capsys):
    """And the table holds the bytes and tokens of each source."""
    options = ["--tokenizer.vocab-size", "300", "--out", "made.json"]
    assert tokenizer.main(["train", *sources, *options, "--json", "table.json"]) == 0
    prepared = prepare(DataConfig(path=tuple(sources)), TokenizerConfig(vocab_size=300), log=lambda line: None)
    made = load_tokenizer("made.json")
    assert made.fingerprint == prepared.tokenizer.fingerprint
    table = json.loads((tmp_path / "table.json").read_text())
    english, chinese = table["compression"]
    assert english["bytes"] == (tmp_path / "english.txt").stat().st_size
    assert english["tokens"] == len(made.encode((tmp_path / "english.txt").read_text()))
    assert chinese["bytes"] == 3 * chinese["characters"] == 3 * 12 * 50
    printed = capsys.readouterr().out
    assert "bytes/token" in printed
    assert f"{english['bytes'] / english['tokens']:.3f}" in printed


def test_show_tells_kind_tokens_and_compression(run, sources, capsys):
    """Of a run's folder: the same tokenizer that it was trained with."""
    assert tokenizer.main(["show", str(run), "--text", "The 猫\n", "--data", *sources, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    its_own = load_tokenizer(run / "tokenizer.json")
    assert found["fingerprint"] == its_own.fingerprint
    assert found["token_ids"] == its_own.encode("The 猫\n")
    assert len(found["compression"]) == 2
    assert found["special_tokens"] == its_own.special_token_ids
    assert found["end_of_text"] == {"token": "<|endoftext|>", "id": 0}
    assert len(found["longest_tokens"]) == 8
    assert tokenizer.main(["show", str(run), "--text", "The 猫\n"]) == 0
    printed = capsys.readouterr().out
    assert "|".join(found["tokens"]) in printed
    assert "end_of_text: <|endoftext|> (0)" in printed
    assert "special_tokens: <|endoftext|>, <|im_start|>, " in printed
    assert f"longest_tokens: {', '.join(found['longest_tokens'])}" in printed


def test_the_measured_text_is_bounded(sources, capsys):
    (row,) = json.loads(_json(["show", _made(sources), "--data", "chinese.jsonl", "--megabytes", "0.0001"], capsys))[
        "compression"
    ]
    assert row["bytes"] == 3 * 36, "the first documents that reach a hundred bytes"


def _made(sources) -> str:
    tokenizer.main(["train", *sources, "--tokenizer.kind", "byte", "--out", "byte.json"])
    return "byte.json"


def _json(arguments, capsys) -> str:
    capsys.readouterr()
    assert tokenizer.main([*arguments, "--json", "-"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tokenizer takes train or show"),
        (["make"], "not 'make'"),
        (["show"], "no tokenizer given"),
        (["show", "nowhere.json"], "no tokenizer nowhere.json"),
        (["show", "english.txt"], "is not a tokenizer.json"),
        (["train", "english.txt", "--out", "."], "is a folder"),
        (["train", "english.txt", "--out", "no/where.json"], "in no, which is no folder that exists"),
        (["train", "english.txt", "--tokenizer.path", "a.json"], r"tokenizer\.path a\.json .* makes a new one"),
        (["train", *SOURCES, "--data.weights", "3", "1"], r"data\.weights is for training a model"),
        (["train", *SOURCES, "--data.weights", "3"], r"data\.weights is for training a model"),
        (["show", "byte.json", "--data", "other.jsonl"], r"but body \(--text-field NAME reads another\)$"),
        (["train", "missing.txt"], "missing.txt does not exist"),
    ],
)
def test_refusals_are_one_line(sources, arguments, message):
    if "byte.json" in arguments:
        _made(sources)
        Path("other.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match=message) as error:
        tokenizer.main(arguments)
    assert "\n" not in str(error.value)


def test_what_is_skipped_in_training_is_skipped_in_the_table(sources, capsys):
    with open("chinese.jsonl", "a") as file:
        file.write("broken\n")
    options = ["--data.on-error", "skip", "--tokenizer.kind", "byte"]
    _, chinese = json.loads(_json(["train", *sources, *options], capsys))["compression"]
    assert chinese["bytes"] == 3 * 12 * 50


def test_help_without_a_verb(capsys):
    assert tokenizer.main(["--help"]) == 0
    assert "tokenizer train SOURCE" in capsys.readouterr().out
