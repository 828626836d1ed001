"""Conversations that are made here, so that the whole recipe runs without a download: tasks about Python's words.

Demonstrations are half curt and half in whole sentences. Of ranked answers the right one in a whole sentence is best,
then the right one without, then a wrong one: what a model that has learned from demonstrations does only sometimes, and
what a reward model can learn to tell apart.
"""

import builtins
import keyword
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

CONVERSATIONS, PREFERENCES = "made://conversations", "made://preferences"
NUM_CONVERSATIONS, NUM_PREFERENCES = 4000, 2000
_NAMES = (name for name in dir(builtins) if type(getattr(builtins, name)).__module__ != "_sitebuiltins")
WORDS = tuple(sorted({w for w in (*keyword.kwlist, *_NAMES) if w.isalpha() and w.islower() and len(w) > 1}))
"""Python's keywords and the names of its built-in functions, without those that only a terminal has."""


class _Task(NamedTuple):
    question: str
    answer: str
    sentence: str
    """In which `{}` is the answer."""
    wrong: str


def made(name: str) -> Iterator[dict[str, Any]]:
    """The records of one of the two sources, always the same ones."""
    draw = random.Random(name)
    if name == CONVERSATIONS:
        for _ in range(NUM_CONVERSATIONS):
            messages = [{"role": "system", "content": "You know Python."}] if draw.random() < 0.2 else []
            for _ in range(draw.choice((1, 1, 2))):
                task = _task(draw)
                answer = task.sentence.format(task.answer) if draw.random() < 0.5 else task.answer
                messages += [{"role": "user", "content": task.question}, {"role": "assistant", "content": answer}]
            yield {"messages": messages}
    else:
        for _ in range(NUM_PREFERENCES):
            task = next(task for task in iter(lambda: _task(draw), None) if task.wrong != task.answer)
            wrong = task.sentence.format(task.wrong) if draw.random() < 0.5 else task.wrong
            yield {"prompt": task.question, "answers": [task.sentence.format(task.answer), task.answer, wrong]}


def _task(draw: random.Random) -> _Task:
    word, other = draw.sample(WORDS, 2)
    a, b = draw.randint(1, 9), draw.randint(1, 9)
    kinds = (
        _Task(f"Write {word} in capitals.", word.upper(), "In capitals that is {}.", other.upper()),
        _Task(f"Which is first in the alphabet, {word} or {other}?", *_ordered(word, other)),
        _Task(f"What is {a} + {b}?", str(a + b), f"The sum of {a} and {b} is {{}}.", str(a + b + draw.choice((-1, 1)))),
        _Task(f"Write {word} twice.", f"{word} {word}", "Twice that is {}.", f"{word} {other}"),
        _Task(f"What is the first letter of {word}?", word[0], f"The first letter of {word} is {{}}.", other[-1]),
        _keyword(word),
    )
    return draw.choice(kinds)


def _ordered(word: str, other: str) -> tuple[str, str, str]:
    first, second = sorted((word, other))
    return first, "In the alphabet {} is first.", second


def _keyword(word: str) -> _Task:
    right, wrong = ("Yes", "No") if keyword.iskeyword(word) else ("No", "Yes")
    return _Task(f"Is {word} a keyword?", right, f"{{}}, Python has {word} among its names.", wrong)
