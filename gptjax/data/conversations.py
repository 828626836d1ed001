"""Conversations, ranked answers and tasks out of data files: read, held out by their first question, and laid out.

`forms.py` says what fields they have. `made://conversations` and `made://preferences` stand for those of `made.py`.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from gptjax.config import DataConfig
from gptjax.data.fields import Fields
from gptjax.data.forms import Conversation, RankedAnswers, Task
from gptjax.data.made import CONVERSATIONS, PREFERENCES, made
from gptjax.data.records import JSON_SUFFIXES, Problem, Record, read_records
from gptjax.data.sources import source_files
from gptjax.data.splits import FEWEST_HASHED_DOCUMENTS, uniform_hash
from gptjax.errors import UserError

SUFFIXES = (*JSON_SUFFIXES, ".parquet")
SKIP = " (--data.on-error skip leaves such out)"
SPLIT_BY = "first question"
"""By what examples are held out, for fingerprints: runs that began when it was the whole prompt had other splits."""

Item = TypeVar("Item", Conversation, RankedAnswers, Task)
Laid = TypeVar("Laid")


def read_items(data: DataConfig, item_of: Callable[[Record], Item], skipped: Counter[str]) -> list[Item]:
    """All items of `data.path`, in order.

    Args:
        item_of: a function of `forms.py`.
        skipped: counts what is left out, by reason, under `data.on_error` skip, and records by the fields that are not
            used.

    Raises:
        UserError: what cannot be read or understood, by file and line; or nothing is there.
    """
    if not data.path or data.path == DataConfig().path:
        raise UserError(f"there are no examples to learn from: give --data.path {data.suggestion or 'FILE'}")
    items, unused = [], Counter()
    for records in _sources(data, skipped):
        for record in records:
            try:
                if isinstance(record, Problem):
                    raise UserError(record.message)
                fields = Fields(record.values)
                items.append(item_of(Record(fields, record.origin)))
                unused.update(fields.unused())
            except UserError as error:
                if data.on_error == "stop":
                    raise UserError(f"{error}{SKIP}") from None
                skipped[record.reason if isinstance(record, Problem) else "records that are no example"] += 1
    if not items:
        raise UserError(f"data.path {' '.join(data.path)} holds no example{', all were skipped' * bool(skipped)}")
    for count in set(unused.values()):
        names = sorted(str(name) for name, times in unused.items() if times == count)
        skipped[f"with {', '.join(names)}, which {'is' if len(names) == 1 else 'are'} not used"] += count
    return items


def laid_out(
    items: Sequence[Item], lay_out: Callable[[Item], Laid], data: DataConfig, skipped: Counter[str]
) -> list[tuple[Item, Laid]]:
    """The items with what they are as token ids.

    Args:
        skipped: counts what is left out under `data.on_error` skip.

    Raises:
        UserError: one cannot be laid out or encoded, with its place.
    """
    kept = []
    for item in items:
        try:
            kept.append((item, lay_out(item)))
        except UserError as error:
            if data.on_error == "stop":
                raise UserError(f"{item.origin}: {error}{SKIP}") from None
            skipped["records that cannot be laid out"] += 1
    return kept


def _sources(data: DataConfig, skipped: Counter[str]) -> Iterator[Iterator[Record | Problem]]:
    """The records of each entry of `data.path`."""
    for entry in data.path:
        if entry in (CONVERSATIONS, PREFERENCES):
            yield (Record(values, f"{entry}:{number}") for number, values in enumerate(made(entry), start=1))
        else:
            files = source_files(dataclasses.replace(data, path=(entry,)), SUFFIXES, skipped)
            yield from (read_records(file.path) for file in files)


def split_items(items: Sequence[Item], data: DataConfig, notes: Counter[str]) -> tuple[list[Item], list[Item]]:
    """Those to train on and those held out: by hash, or the last.

    Examples with the same first question stay on one side, because their answers may be the same. If that leaves one
    side empty (all examples may begin with the same history), examples stay together only if their first two questions
    are the same, and so on.

    Args:
        notes: counts the examples whose first question is on both sides.

    Raises:
        UserError: nothing is left on one side.
    """
    rule = data.split
    if rule == "auto":
        rule = "position" if len(items) < FEWEST_HASHED_DOCUMENTS else "hash"
    asked = [_questions(item) for item in items]
    for depth in range(1, max(map(len, asked), default=0) + 1):
        keys = [questions[:depth] for questions in asked]
        if rule == "position":
            held_out = set(keys[len(items) - round(len(items) * data.validation_fraction) :])
        else:
            texts = {key: key[0] if depth == 1 else json.dumps(key, ensure_ascii=False) for key in keys}
            held_out = {
                key for key, text in texts.items() if uniform_hash(text, "validation") < data.validation_fraction
            }
        sides = [], []
        for item, key in zip(items, keys, strict=True):
            sides[key in held_out].append(item)
        if all(sides):
            if depth > 1:
                notes["that begin with a question of both sides"] += _shared(asked, keys, held_out)
            return sides
    raise UserError(
        f"data.path {' '.join(data.path)}: of {len(items)} examples the split by {rule} leaves none on one side; what "
        f"asks the same stays together; change data.validation_fraction {data.validation_fraction:g}"
    )


def _questions(item: Item) -> tuple[str, ...]:
    messages = item.messages if isinstance(item, Conversation) else item.prompt
    return tuple(message.content for message in messages if message.role == "user")


def _shared(asked: Sequence[tuple[str, ...]], keys: Sequence[tuple[str, ...]], held_out: set[tuple[str, ...]]) -> int:
    """How many examples have a first question that the other side has, too."""
    firsts: tuple[set[str], set[str]] = set(), set()
    for questions, key in zip(asked, keys, strict=True):
        firsts[key in held_out].add(questions[0])
    return sum(questions[0] in firsts[0] & firsts[1] for questions in asked)


def left_out(skipped: Counter[str]) -> str:
    """What was cut or left out, and how often, for the end of a message."""
    return "".join(f", {count:,} {reason}" for reason, count in sorted(skipped.items()))


def fingerprint(*parts: Any) -> str:
    """sha256, in hex, of plain data: of examples, of the tokenizer, of how they are laid out."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
