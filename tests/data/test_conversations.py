"""Conversations, ranked answers and tasks out of every form of data file."""

import gzip
import json
import random
from collections import Counter

import pytest

from gptjax.config import DataConfig
from gptjax.data.conversations import laid_out, read_items, split_items
from gptjax.data.forms import conversation_of
from gptjax.data.records import Record
from gptjax.errors import UserError


def record(values):
    return Record(values, "file.jsonl:7")


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
    """Held out by hash of the first question: two answers to one question never part."""
    items = [conversation_of(record({"prompt": f"{i // 2}?", "completion": str(i)})) for i in range(400)]
    notes = Counter()
    train, held_out = split_items(items, DataConfig(validation_fraction=0.2), notes)
    prompts = [{item.messages[0] for item in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(train) + len(held_out) == 400
    assert 40 < len(held_out) < 130
    few = items[:20]
    assert split_items(few, DataConfig(validation_fraction=0.2), notes)[1] == few[16:]
    with pytest.raises(UserError, match="leaves none on one side"):
        split_items(items[:5], DataConfig(validation_fraction=0.05), notes)
    assert not notes


@pytest.mark.parametrize("split", ["hash", "position"])
def test_no_answer_that_is_learned_is_held_out(split):
    """Longer conversations hold shorter ones, and a system message changes no answer."""
    items = []
    for i in range(200):
        turns = [("user", f"question {i}"), ("assistant", f"answer {i}"), ("user", "and?"), ("assistant", f"more {i}")]
        for system, end in ((), 2), ((), 4), ([("system", "Be brief.")], 2):
            listed = [{"role": role, "content": content} for role, content in (*system, *turns[:end])]
            items.append(conversation_of(record({"messages": listed})))
    random.Random(0).shuffle(items)
    sides = split_items(items, DataConfig(validation_fraction=0.1, split=split), Counter())
    learned = [{m.content for item in side for m in item.messages if m.role == "assistant"} for side in sides]
    assert all(sides)
    assert not learned[0] & learned[1]


def test_one_history_for_all_can_be_held_out_and_is_said():
    items = [
        conversation_of(record({"history": [["Rhyme.", "I shall."]], "instruction": f"{i}?", "output": str(i)}))
        for i in range(200)
    ]
    notes = Counter()
    train, held_out = split_items(items, DataConfig(validation_fraction=0.2), notes)
    assert {item.messages[2] for item in train}.isdisjoint(item.messages[2] for item in held_out)
    assert notes == {"that begin with a question of both sides": 200}


def test_fields_that_are_not_used_are_counted(tmp_path):
    """By name, wherever they lie in a record; what is null is no field."""
    said = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b", "tool_calls": None}]
    lines = [{"messages": said, "id": n, "source": "web"} for n in range(3)] + [{"prompt": "a", "completion": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read_items(DataConfig(path=str(tmp_path / "a.jsonl")), conversation_of, skipped := Counter())
    assert skipped == {"with id, messages.name, source, which are not used": 3}


def test_what_cannot_be_laid_out_is_left_out_by_its_place():
    """Whatever goes wrong in a template or a tokenizer, it is a record's fault, with its line, and can be skipped."""
    items = [
        conversation_of(Record({"prompt": text, "completion": "b"}, f"a.jsonl:{n}")) for n, text in enumerate("abc")
    ]

    def lay_out(item):
        if item.messages[0].content == "b":
            raise UserError("it cannot be encoded")
        return item.messages[0].content

    with pytest.raises(UserError, match=r"^a.jsonl:1: it cannot be encoded \(--data.on-error skip"):
        laid_out(items, lay_out, DataConfig(), Counter())
    kept = laid_out(items, lay_out, DataConfig(on_error="skip"), skipped := Counter())
    assert [text for _, text in kept] == ["a", "c"]
    assert skipped == {"records that cannot be laid out": 1}
