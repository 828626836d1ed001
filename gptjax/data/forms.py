"""Conversations, ranked answers and tasks out of records, whatever their fields are called.

| form | fields |
|---|---|
| messages | `messages`: objects with `role` and `content`, a text or text parts |
| ShareGPT | `conversations`: objects with `from` (human, gpt, system) and `value` |
| Alpaca | `instruction`, `input` (may be empty), `output` |
| Dolly | `instruction`, `context` (may be empty), `response` |
| prompt and completion | `prompt`, `completion`; texts, or lists of messages |
| GSM8K | `question`, `answer` |

Beside each of these, `system` (or `system_prompt`) is the system message, and `history` is earlier turns, as pairs or
as messages. An assistant's message with `weight` 0 or `train` false is context, and is not learned.

Ranked answers have a prompt in one of these forms, and `chosen` and `rejected`, or `answers` from best to worst, or
`answers` with one number each in `scores`. If there is no prompt field, the prompt is read from the answers: the turns
that two whole conversations share, or the lines that two texts share at their beginning (hh-rlhf).

A task is a prompt and, if there is one, its right answer: that of the form, or `ground_truth`, `solution`, or
`ground_truth` inside `reward_model`. A field that is null counts as absent.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gptjax.data.fields import Fields, first, messages_of, text_of
from gptjax.data.records import Record
from gptjax.errors import UserError, at
from gptjax.text.chat import Message, check
from gptjax.text.tokenizer import END_OF_TEXT_NAMES

TURNS = ("messages", "conversations")
PROMPTS = ("instruction", "prompt", "question")
COMPLETIONS = ("completion", "output", "response", "answer")
RIGHT_ANSWERS = ("ground_truth", "solution")
SYSTEM = ("system", "system_prompt")
_SPEAKER = re.compile(r"\s*^(Human|Assistant):[ \n]?", re.MULTILINE)
"""Begins a turn in the texts of hh-rlhf."""


class Conversation(NamedTuple):
    """Messages that end with an assistant's answer."""

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


def conversation_of(record: Record) -> Conversation:
    """
    Raises:
        UserError: the record is in none of the forms, or its roles do not alternate, or no answer is learned.
    """
    values, origin = _fields(record), record.origin
    with at(origin):
        messages = _conversation(values)
        check(messages, answered=True)
        if not any(message.learned for message in messages if message.role == "assistant"):
            raise UserError("no answer of the conversation is to be learned: weight or train leaves all of them out")
    return Conversation(messages, origin)


def ranked_answers_of(record: Record) -> RankedAnswers:
    """
    Raises:
        UserError: the record has no ranked answers, all are equal, or one is empty.
    """
    values, origin = _fields(record), record.origin
    with at(origin):
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
        UserError: the record has no prompt, or a right answer that is no text.
    """
    values, origin = _fields(record), record.origin
    with at(origin):
        if {"chosen", "rejected"} <= set(values) or "answers" in values:
            prompt, answers, ranks = _ranked(values)
            return Task(prompt, answers[ranks.index(min(ranks))], origin)
        prompt, answer = _prompt(values), ""
        if prompt[-1].role == "assistant":
            prompt, answer = prompt[:-1], prompt[-1].content
        check(prompt, answered=False)
        answer = _right_answer(values) or answer
    return Task(prompt, answer, origin)


def require_right_answer(task: Task) -> Task:
    """The task, which is judged by its right answer.

    Raises:
        UserError: it has none.
    """
    if not task.answer.strip():
        names = ", ".join((*RIGHT_ANSWERS, *COMPLETIONS))
        raise UserError(f"{task.origin}: there is no right answer to judge by; its field may be called {names}")
    return task


def _fields(record: Record) -> Fields:
    return record.values if isinstance(record.values, Fields) else Fields(record.values)


def _conversation(values: Fields) -> tuple[Message, ...]:
    if name := first(TURNS, values):
        return _after_what_stands_beside(values, messages_of(values, name))
    if name := first(COMPLETIONS, values):
        return (*_prompt(values), *_answer(values, name))
    raise UserError(
        f"no conversation among the fields {', '.join(values) or 'none'}; messages, conversations, instruction and "
        "output, prompt and completion, or question and answer would be one"
    )


def _prompt(values: Fields) -> tuple[Message, ...]:
    """What is to be answered; of turns all that are there."""
    name = first((*PROMPTS, *TURNS), values)
    if name is None:
        names = ", ".join((*PROMPTS, *TURNS))
        raise UserError(f"no prompt among the fields {', '.join(values) or 'none'}; one of {names} would be")
    if name in TURNS or isinstance(values[name], list):
        turns = messages_of(values, name)
    else:
        text = text_of(values, name)
        more = first(("input", "context"), values) if name == "instruction" else None
        added = "" if more is None else text_of(values, more)
        turns = (Message("user", f"{text}\n\n{added}" if added else text),)
    return _after_what_stands_beside(values, turns)


def _after_what_stands_beside(values: Fields, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The system message and the earlier turns that have fields of their own, and then these."""
    system = turns[:1] if turns[0].role == "system" else ()
    turns = turns[len(system) :]
    name = first(SYSTEM, values)
    if name and (text := text_of(values, name)).strip():
        if system and system[0].content.strip() != text.strip():
            raise UserError(f"field {name} and the first of the messages are two different system messages")
        system = (Message("system", text),)
    return (*system, *_history(values), *turns)


def _history(values: Fields) -> Iterator[Message]:
    if "history" not in values:
        return
    history = values["history"]
    if not isinstance(history, list):
        raise UserError(f"field history is {type(history).__name__}, not a list of turns")
    if history and all(isinstance(turn, Mapping) for turn in history):
        yield from messages_of(values, "history")
        return
    for number, pair in enumerate(history, start=1):
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise UserError(f"turn {number} of history is no pair of question and answer")
        asked_and_answered = values.inner(dict(zip(("question", "answer"), pair, strict=True)), f"history {number}")
        for role, field in (("user", "question"), ("assistant", "answer")):
            yield Message(role, text_of(asked_and_answered, field))


def _answer(values: Fields, name: str) -> tuple[Message, ...]:
    if isinstance(values[name], list | Mapping):
        return messages_of(values, name)
    # Files that were made for bare language models spell the end out.
    text = text_of(values, name).rstrip("\n")
    end = next((end for end in END_OF_TEXT_NAMES if text.endswith(end)), "")
    return (Message("assistant", text.removesuffix(end)),)


def _ranked(values: Fields) -> tuple[tuple[Message, ...], tuple[str, ...], tuple[int, ...]]:
    """Prompt, answers and their ranks."""
    if {"chosen", "rejected"} <= set(values):
        return *_pair(values), (0, 1)
    if "answers" not in values or not isinstance(values["answers"], list):
        raise UserError(
            f"no ranked answers among the fields {', '.join(values) or 'none'}; chosen and rejected, or a list of "
            "texts in answers would be some"
        )
    numbered = values.inner(dict(enumerate(values["answers"], start=1)), "answers")
    answers = tuple(text_of(numbered, number) for number in range(1, len(values["answers"]) + 1))
    if "scores" not in values:
        return _prompt(values), answers, tuple(range(len(answers)))
    scores = values["scores"]
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise UserError(f"scores has not one number for each of {len(answers)} answers")
    scores = [_score(score, number) for number, score in enumerate(scores, start=1)]
    order = sorted(set(scores), reverse=True)
    return _prompt(values), answers, tuple(order.index(score) for score in scores)


def _score(value: Any, number: int) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"score {number} is {'null' if value is None else repr(value)}, not a number")
    return score


def _pair(values: Fields) -> tuple[tuple[Message, ...], tuple[str, str]]:
    """The prompt, and what is chosen and rejected."""
    sides = [values["chosen"], values["rejected"]]
    if all(isinstance(side, list | Mapping) for side in sides):
        sides = [messages_of(values, name) for name in ("chosen", "rejected")]
    elif not all(isinstance(side, str) for side in sides):
        raise UserError("chosen and rejected must both be texts, or both messages")
    elif first((*PROMPTS, *TURNS), values):
        return _prompt(values), (text_of(values, "chosen"), text_of(values, "rejected"))
    else:
        sides = _without_a_prompt(text_of(values, "chosen"), text_of(values, "rejected"))
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise UserError("chosen and rejected answer different prompts")
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise UserError("chosen or rejected does not end with an answer")
    prompt = _after_what_stands_beside(values, chosen[:-1]) if chosen[:-1] else _prompt(values)
    return prompt, (chosen[-1].content, rejected[-1].content)


def _without_a_prompt(chosen: str, rejected: str) -> list[tuple[Message, ...]]:
    """Two texts as turns: those that speakers' names tell apart, or the lines that both begin with and the rest."""
    sides = [_spoken(text) for text in (chosen, rejected)]
    if all(sides):
        return sides
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = "".join(character for character, _ in alike)
    cut = max((match.end() for match in re.finditer(r"\s", shared)), default=0)
    if "\n" not in shared[:cut].strip():
        raise UserError(
            f"there is no prompt: no field {', '.join((*PROMPTS, *TURNS))}, and chosen and rejected have no line in "
            "common at their beginning"
        )
    prompt = Message("user", shared[:cut].strip())
    return [(prompt, Message("assistant", text[cut:])) for text in (chosen, rejected)]


def _spoken(text: str) -> tuple[Message, ...]:
    """The turns of a text in which `Human:` and `Assistant:` begin them; none where it begins otherwise."""
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        return ()
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[speaker], said.strip()) for speaker, said in zip(parts[::2], parts[1::2], strict=True))


def _right_answer(values: Fields) -> str:
    """What a task's answer is judged by; empty where no field has one."""
    if isinstance(values.get("reward_model"), Mapping):
        values = values.inner(values["reward_model"], "reward_model")
    name = first((*RIGHT_ANSWERS, *COMPLETIONS), values)
    if name is None:
        return ""
    if isinstance(values[name], int | float) and not isinstance(values[name], bool):
        return str(values[name])
    return _answer(values, name)[-1].content
