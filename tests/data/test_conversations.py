"""Conversations, ranked answers and tasks out of every form of data file."""

import gzip
import json
from collections import Counter

import pytest

from gptjax.config import DataConfig
from gptjax.data.conversations import conversation_of, ranked_answers_of, read_items, split_items, task_of
from gptjax.data.formats import Record
from gptjax.errors import UserError
from gptjax.text.chat import Message

ASK, ANSWER = Message("user", "2+2?"), Message("assistant", "4")


def record(values):
    return Record(values, "file.jsonl:7")


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "id": 3},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"instruction": "2+2?", "output": "4"},
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": "2+2?", "completion": "4<|endoftext|>\n"},
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        {"question": "2+2?", "answer": "4"},
    ],
    ids=lambda values: "+".join(values),
)
def test_forms_of_conversations(values):
    assert conversation_of(record(values)).messages == (ASK, ANSWER)


def test_alpaca_input_follows_its_instruction():
    found = conversation_of(record({"instruction": "Sum up.", "input": "a b", "output": "c"}))
    assert found.messages[0].content == "Sum up.\n\na b"


@pytest.mark.parametrize(
    ("values", "answers", "ranks"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, ("4", "5"), (0, 1)),
        ({"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"}, ("4", "5"), (0, 1)),
        ({"prompt": "2+2?", "answers": ["4", "four", "5"]}, ("4", "four", "5"), (0, 1, 2)),
        ({"prompt": "2+2?", "answers": ["5", "4", "IV"], "scores": [1, 7.5, 7.5]}, ("5", "4", "IV"), (1, 0, 0)),
        (
            {
                "chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
                "rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}],
            },
            ("4", "5"),
            (0, 1),
        ),
    ],
)
def test_forms_of_ranked_answers(values, answers, ranks):
    found = ranked_answers_of(record(values))
    assert (found.prompt, found.answers, found.ranks) == ((ASK,), answers, ranks)


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"question": "2+2?", "answer": "4"}, "4"),
        ({"prompt": "2+2?"}, ""),
        ({"messages": [{"role": "user", "content": "2+2?"}]}, ""),
        ({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}, "4"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "4"),
    ],
)
def test_forms_of_tasks(values, answer):
    found = task_of(record(values))
    assert (found.prompt, found.answer) == ((ASK,), answer)


@pytest.mark.parametrize(
    ("of", "values", "expected"),
    [
        (conversation_of, {"text": "hi"}, "no conversation among the fields text"),
        (conversation_of, {"messages": "hi"}, "field messages is str, not a list"),
        (conversation_of, {"messages": []}, "not a list of messages, or has none"),
        (conversation_of, {"messages": ["hi"]}, "message 1 of messages is str"),
        (conversation_of, {"messages": [{"role": "tool", "content": "x"}]}, "by 'tool'; known are"),
        (conversation_of, {"messages": [{"role": "user"}]}, "field value is missing"),
        (conversation_of, {"prompt": "a", "completion": None}, "field completion is missing"),
        (conversation_of, {"prompt": "a", "completion": "  "}, "answer 1 of the conversation is empty"),
        (conversation_of, {"prompt": 3, "completion": "b"}, "field prompt is int, not a text"),
        (
            conversation_of,
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "message 2 .* roles alternate",
        ),
        (ranked_answers_of, {"prompt": "a", "chosen": "b", "rejected": "b"}, "all the same text"),
        (ranked_answers_of, {"prompt": "a", "chosen": "b", "rejected": ""}, "a ranked answer is empty"),
        (ranked_answers_of, {"prompt": "a", "answers": ["b", "c"], "scores": [1, 1]}, "ranked alike"),
        (ranked_answers_of, {"prompt": "a", "answers": ["b", "c"], "scores": [1]}, "one number for each of 2"),
        (ranked_answers_of, {"prompt": "a", "answers": ["b"]}, "two are the fewest"),
        (ranked_answers_of, {"prompt": "a"}, "no ranked answers among the fields prompt"),
        (task_of, {"text": "a"}, "no prompt among the fields text"),
    ],
)
def test_what_is_none_is_refused_with_its_place(of, values, expected):
    with pytest.raises(UserError, match=f"^file.jsonl:7: .*{expected}"):
        of(record(values))


def test_files_of_every_format(tmp_path):
    values = [{"prompt": f"{i}?", "completion": str(i)} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, values)).encode()))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "c.parquet")
    skipped = Counter()
    items = read_items(DataConfig(path=str(tmp_path)), conversation_of, skipped)
    assert [item.messages[1].content for item in items] == ["0", "1", "2"] * 3
    assert [item.origin.rpartition("/")[2] for item in items][::3] == ["a.json:1", "b.jsonl.gz:1", "c.parquet:1"]
    assert not skipped


def test_broken_records_stop_or_are_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n{broken\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: .*--data.on-error skip"):
        read_items(DataConfig(path=str(file)), conversation_of, Counter())
    skipped = Counter()
    items = read_items(DataConfig(path=str(file), on_error="skip"), conversation_of, skipped)
    assert len(items) == 1
    assert skipped == {"records that are no example": 1, "broken lines": 1}
    for name, content in (("b.json", '{"prompt": "a"}'), ("c.json", "[1]"), ("d.txt", "hello"), ("e.json", "[")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name):
            read_items(DataConfig(path=str(tmp_path / name)), conversation_of, Counter())
    with pytest.raises(UserError, match="no examples to learn from"):
        read_items(DataConfig(), conversation_of, Counter())


def test_no_prompt_is_on_both_sides():
    """Held out by hash of the prompt: two answers to one question never part."""
    items = [conversation_of(record({"prompt": f"{i // 2}?", "completion": str(i)})) for i in range(400)]
    train, held_out = split_items(items, DataConfig(validation_fraction=0.2))
    prompts = [{item.messages[0] for item in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(train) + len(held_out) == 400
    assert 40 < len(held_out) < 130
    few = items[:20]
    assert split_items(few, DataConfig(validation_fraction=0.2))[1] == few[16:]
    with pytest.raises(UserError, match="to hold out"):
        split_items(items[:5], DataConfig(validation_fraction=0.05))
