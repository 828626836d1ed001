"""Conversations, ranked answers and tasks out of data files, whatever the field calls their parts.

| form | fields |
|---|---|
| messages | `messages`: objects with `role` and `content` |
| ShareGPT | `conversations`: objects with `from` (human, gpt, system) and `value` |
| Alpaca | `instruction`, `input` (may be empty), `output` |
| prompt and completion | `prompt`, `completion`; texts, or lists of messages |
| GSM8K | `question`, `answer` |

Ranked answers have, beside a prompt in one of these forms, `chosen` and `rejected`, or `answers` with the best first,
or `answers` with a number each in `scores`. A task is a prompt and, where there is one, the answer that is right.
`made://conversations` and `made://preferences` stand for those of `made.py`.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from gptjax.config import DataConfig
from gptjax.data import formats
from gptjax.data.formats import Problem, Record
from gptjax.data.made import CONVERSATIONS, PREFERENCES, made
from gptjax.data.sources import source_files
from gptjax.data.splits import FEWEST_HASHED_DOCUMENTS, uniform_hash
from gptjax.errors import UserError
from gptjax.text.chat import Message, check
from gptjax.text.tokenizer import END_OF_TEXT_NAMES

SUFFIXES = (".json", ".jsonl", ".parquet")
_ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
_ROLE_OF |= {"system": "system"}


class Conversation(NamedTuple):
    """What was said, to the end of an answer."""

    messages: tuple[Message, ...]
    origin: str


class RankedAnswers(NamedTuple):
    """A prompt, and answers of which some are better than others."""

    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    ranks: tuple[int, ...]
    """Of each answer; less is better, and equal is a tie."""
    origin: str


class Task(NamedTuple):
    """A prompt, and what its answer is judged by."""

    prompt: tuple[Message, ...]
    answer: str
    """The right one; empty where none is given."""
    origin: str


Item = TypeVar("Item", Conversation, RankedAnswers, Task)


def conversation_of(record: Record) -> Conversation:
    """
    Raises:
        UserError: the record is in none of the forms, or its roles do not alternate, or an answer is empty.
    """
    messages = _messages(record)
    with _at(record.origin):
        check(messages, answered=True)
    return Conversation(messages, record.origin)


def ranked_answers_of(record: Record) -> RankedAnswers:
    """
    Raises:
        UserError: the record has no ranked answers, all are equal, or one is empty.
    """
    values, origin = record.values, record.origin
    with _at(origin):
        prompt, answers, ranks = _ranked(values)
        check(prompt, answered=False)
        if len(answers) < 2:
            raise UserError(f"{len(answers)} answer is ranked; two are the fewest that can be compared")
        if "" in [answer.strip() for answer in answers]:
            raise UserError("a ranked answer is empty")
        if len(set(answers)) == 1:
            raise UserError("the answers are all the same text, of which none can be better")
        if len(set(ranks)) == 1:
            raise UserError("the answers are all ranked alike, so that there is nothing to learn from them")
    return RankedAnswers(prompt, answers, ranks, origin)


def task_of(record: Record) -> Task:
    """
    Raises:
        UserError: the record has no prompt.
    """
    values, origin = record.values, record.origin
    with _at(origin):
        if {"chosen", "rejected"} <= set(values) or "answers" in values:
            prompt, answers, ranks = _ranked(values)
            return Task(prompt, answers[ranks.index(min(ranks))], origin)
        if set(values) & {"completion", "output", "answer", "messages", "conversations"}:
            messages = _messages(record)
        else:
            messages = _prompt(values)
        answer = messages[-1].content if messages[-1].role == "assistant" else ""
        prompt = messages[:-1] if messages[-1].role == "assistant" else messages
        check(prompt, answered=False)
    return Task(prompt, answer, origin)


def read_items(data: DataConfig, item_of: Callable[[Record], Item], skipped: Counter[str]) -> list[Item]:
    """All items of `data.path`, in order.

    Args:
        item_of: one of the functions above.
        skipped: counts what is left out, by reason, under `data.on_error` skip.

    Raises:
        UserError: what cannot be read or understood, by file and line; or nothing is there.
    """
    if not data.path or data.path == DataConfig().path:
        raise UserError(f"there are no examples to learn from: give --data.path {data.suggestion or 'FILE'}")
    items = []
    for records in _sources(data):
        for record in records:
            try:
                if isinstance(record, Problem):
                    raise UserError(record.message)
                items.append(item_of(record))
            except UserError as error:
                if data.on_error == "stop":
                    raise UserError(f"{error} (--data.on-error skip leaves such out)") from None
                skipped[record.reason if isinstance(record, Problem) else "records that are no example"] += 1
    if not items:
        raise UserError(f"data.path {' '.join(data.path)} holds no example{', all were skipped' * bool(skipped)}")
    return items


def _sources(data: DataConfig) -> Iterator[Iterator[Record | Problem]]:
    """The records of each entry of `data.path`."""
    for entry in data.path:
        if entry in (CONVERSATIONS, PREFERENCES):
            yield (Record(values, f"{entry}:{number}") for number, values in enumerate(made(entry), start=1))
        else:
            files = source_files(dataclasses.replace(data, path=(entry,)), SUFFIXES)
            yield from (formats.read_records(file.path) for file in files)


def split_items(items: Sequence[Item], data: DataConfig) -> tuple[list[Item], list[Item]]:
    """Those to train on and those held out: by hash of the prompt, so that no prompt is on both sides, or the last.

    Raises:
        UserError: nothing is left on one side.
    """
    rule = data.split
    if rule == "auto":
        rule = "position" if len(items) < FEWEST_HASHED_DOCUMENTS else "hash"
    if rule == "position":
        cut = len(items) - round(len(items) * data.validation_fraction)
        sides = list(items[:cut]), list(items[cut:])
    else:
        sides = [], []
        for item in items:
            prompt = item.messages[:-1] if isinstance(item, Conversation) else item.prompt
            key = json.dumps(prompt, ensure_ascii=False)
            sides[uniform_hash(key, "validation") < data.validation_fraction].append(item)
    if not all(sides):
        raise UserError(
            f"data.path {' '.join(data.path)}: of {len(items)} examples the split by {rule} leaves {len(sides[0])} to "
            f"train on and {len(sides[1])} to hold out; change data.validation_fraction {data.validation_fraction:g}"
        )
    return sides


def left_out(skipped: Counter[str]) -> str:
    """What was cut or left out, and how often, for the end of a message."""
    return "".join(f", {count:,} {reason}" for reason, count in sorted(skipped.items()))


def fingerprint(*parts: Any) -> str:
    """sha256, in hex, of plain data: of examples, of the tokenizer, of how they are laid out."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _at(origin: str) -> Iterator[None]:
    """Puts the place of a record before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _messages(record: Record) -> tuple[Message, ...]:
    """The whole conversation of a record."""
    values = record.values
    with _at(record.origin):
        for name in ("messages", "conversations"):
            if name in values:
                return _listed(values[name], name)
        for name in ("completion", "output", "answer"):
            if name in values:
                return (*_prompt(values), *_answer(values[name], name))
        raise UserError(
            f"no conversation among the fields {', '.join(values) or 'none'}; messages, conversations, instruction and "
            "output, prompt and completion, or question and answer would be one"
        )


def _prompt(values: Mapping[str, Any]) -> tuple[Message, ...]:
    if "instruction" in values:
        instruction, more = _text(values, "instruction"), values.get("input") or ""
        return (Message("user", f"{instruction}\n\n{more}" if more else instruction),)
    for name in ("prompt", "question"):
        if name in values:
            if isinstance(values[name], list):
                return _listed(values[name], name)
            return (Message("user", _text(values, name)),)
    raise UserError(f"no prompt among the fields {', '.join(values) or 'none'}; prompt, question or instruction is one")


def _answer(value: Any, name: str) -> tuple[Message, ...]:
    if isinstance(value, list):
        return _listed(value, name)
    # Files that were made for bare language models spell the end out.
    text = _text({name: value}, name).rstrip("\n")
    end = next((end for end in END_OF_TEXT_NAMES if text.endswith(end)), "")
    return (Message("assistant", text.removesuffix(end)),)


def _listed(values: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(values, list) or not values:
        raise UserError(f"field {name} is {type(values).__name__}, not a list of messages, or has none")
    messages = []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, Mapping):
            raise UserError(f"message {number} of {name} is {type(value).__name__}, not an object")
        said_by = value.get("role", value.get("from"))
        if said_by not in _ROLE_OF:
            raise UserError(f"message {number} of {name} is by {said_by!r}; known are {', '.join(_ROLE_OF)}")
        field = "content" if "content" in value else "value"
        messages.append(Message(_ROLE_OF[said_by], _text(value, field)))
    return tuple(messages)


def _ranked(values: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[str, ...], tuple[int, ...]]:
    """Prompt, answers and their ranks."""
    if {"chosen", "rejected"} <= set(values):
        sides = [_listed(side, name) if isinstance(side, list) else None for name, side in _pair(values)]
        if None not in sides:  # whole conversations that differ in their last message
            chosen, rejected = sides
            if chosen[:-1] != rejected[:-1] and not ({"prompt", "instruction", "question"} & set(values)):
                raise UserError("chosen and rejected answer different prompts")
            prompt = chosen[:-1] or _prompt(values)
            return prompt, (chosen[-1].content, rejected[-1].content), (0, 1)
        return _prompt(values), tuple(_text(values, name) for name, _ in _pair(values)), (0, 1)
    answers = values.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(
            f"no ranked answers among the fields {', '.join(values) or 'none'}; chosen and rejected, or a list of "
            "texts in answers would be some"
        )
    scores = values.get("scores")
    if scores is None:
        return _prompt(values), tuple(answers), tuple(range(len(answers)))
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise UserError(f"scores has not one number for each of {len(answers)} answers")
    order = sorted(set(scores), reverse=True)
    return _prompt(values), tuple(answers), tuple(order.index(score) for score in scores)


def _pair(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, values[name]) for name in ("chosen", "rejected"))


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise UserError(f"field {name} is {'missing' if value is None else type(value).__name__}, not a text")
    return value
