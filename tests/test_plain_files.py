"""JSON that any program reads, whatever the numbers are; files of users, however they were written."""

import io
import json
import math
import sys

import numpy as np
import pytest

from gptjax import cli
from gptjax.config import Config
from gptjax.config_files import load_config, to_dict
from gptjax.data.conversations import Task
from gptjax.errors import UserError
from gptjax.evaluation.rewards import exact_match, valid_json
from gptjax.plain_files import named, read_json, to_json
from gptjax.text.files import load_tokenizer
from gptjax.text.special_tokens import read_files
from gptjax.text.templates import read_template
from gptjax.training.metrics import MetricsLog, read_metrics
from gptjax.training.run_dir import next_run_dir, write_json

VALUES = {
    "nan": math.nan,
    "rows": [{"x": math.inf, "y": (1, -math.inf, np.float32("nan"))}, np.int64(3), "猫", True, None],
    "name": "caf\udce9",
}
PLAIN = {"nan": None, "rows": [{"x": None, "y": [1, None, None]}, 3, "猫", True, None], "name": "caf\udce9"}


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_no_number_is_null_wherever_json_is_written(tmp_path, monkeypatch):
    texts = [to_json(VALUES), to_json(VALUES, indent=2, ascii_only=True)]
    write_json(tmp_path / "a.json", VALUES)
    cli.write_json(str(tmp_path / "b.json"), VALUES)
    MetricsLog(tmp_path / "metrics.jsonl").write(VALUES)
    texts += [(tmp_path / name).read_text(encoding="utf-8") for name in ("a.json", "b.json", "metrics.jsonl")]
    for encoding in ("ascii", "cp1252", "utf-8"):
        out = io.TextIOWrapper(io.BytesIO(), encoding, "replace")
        monkeypatch.setattr(sys, "stdout", out)
        cli.write_json("-", VALUES)
        out.flush()
        texts.append(out.buffer.getvalue().decode(encoding))
    assert [strict(text) for text in texts] == [PLAIN] * len(texts)
    assert read_metrics(tmp_path / "metrics.jsonl") == [PLAIN]


def test_letters_stay_letters():
    assert to_json({"a": "猫 ×"}) == '{"a": "猫 ×"}'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_users_in_the_encodings_of_editors(encoding, tmp_path):
    """A byte order mark is no letter of a template, nor the end of a configuration."""
    config = Config()
    tokenizer = {"bos_token": "é"}
    for name, text in (
        ("config.json", json.dumps(to_dict(config))),
        ("tokenizer_config.json", json.dumps(tokenizer, ensure_ascii=False)),
        ("chat_template.jinja", "{{ messages }}é"),
        ("encoder.json", json.dumps({"a": 0, "b": 1, "ab": 2} | {chr(c): c for c in range(3, 9)})),
        ("vocab.bpe", "#version: 0.2\na b\n"),
    ):
        (tmp_path / name).write_text(text, encoding=encoding)
    assert load_config(tmp_path / "config.json") == config
    assert read_files(tmp_path)["tokenizer_config.json"] == tokenizer
    assert read_template(tmp_path / "chat_template.jinja") == "{{ messages }}é"
    assert load_tokenizer(tmp_path / "encoder.json").encode("ab") == [2]


@pytest.mark.parametrize("raw", ['{"a": "é"}'.encode("latin-1"), b"{", b"\0", b"[" * 100_000, b"", b"\xff\xfe{"])
def test_other_files_are_refused_in_one_line(raw, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    for read in (read_json, load_config, lambda path: read_files(path.parent)):
        with pytest.raises(UserError, match=r"config\.json") as refused:
            read(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("answer", ['{"a": NaN}', "[Infinity]", '{"a": [1, -Infinity]}'])
def test_numbers_that_json_has_not_earn_nothing(answer):
    assert valid_json(None, answer) == 0.0
    assert valid_json(None, '{"a": ["NaN", 1e5]}') == 1.0


def test_silence_is_no_right_answer_where_none_is_known():
    assert exact_match(Task((), "", "x"), "") == exact_match(Task((), " ", "x"), "\n") == 0.0
    assert exact_match(Task((), " 7", "x"), "7\n") == 1.0


@pytest.mark.parametrize("letter", ["a", "é", "漢", "🙂"])
@pytest.mark.parametrize("over", [0, 1])
def test_names_as_long_as_a_file_system_has_them(letter, over, tmp_path):
    """Whatever is made of a name is cut to fit and stays another one; half a letter is none."""
    longest = 255 // len(letter.encode()) + over
    name = letter * longest
    made = {named(text, ending) for text in (name, name[:-1] + "b") for ending in ("", ".tmp", "-2")}
    assert len(made) == 6
    for each in made:
        (tmp_path / each).touch(exist_ok=False)
    assert named("short", ".tmp") == "short.tmp"


def test_runs_and_files_of_long_names(tmp_path):
    name = "漢" * 85
    first = next_run_dir(name, tmp_path)
    (first / "x").mkdir(parents=True)
    second = next_run_dir(name, tmp_path)
    (second / "x").mkdir(parents=True)
    assert (first.name, second.name[:70], second.name[-2:]) == (name, "漢" * 70, "-2")
    write_json(tmp_path / ("a" * 250 + ".json"), 1)
    assert [*tmp_path.glob("a*")] == [tmp_path / ("a" * 250 + ".json")]
