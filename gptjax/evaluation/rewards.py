"""What an answer is worth: plain functions that check it, and a reward model.

A function takes a task and the text of an answer and gives a number. Users write their own: FILE.py:FUNCTION.
"""

import json
import math
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from gptjax.data.forms import Task
from gptjax.errors import UserError

Reward = Callable[[Task, str], float]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def number_match(task: Task, answer: str) -> float:
    """1 where the answer's last number, or that after `####`, is that of the right answer, as GSM8K is scored."""
    wanted, found = _last_number(task.answer), _last_number(answer)
    return float(wanted is not None and found is not None and math.isclose(wanted, found, rel_tol=1e-9))


def exact_match(task: Task, answer: str) -> float:
    """1 where the answer is the right one, but for space around it; 0 where no right one is known."""
    return float(answer.strip() == task.answer.strip() != "")


def valid_json(task: Task, answer: str) -> float:
    """1 where the answer is a JSON object or array, without Python's NaN and Infinity."""
    try:
        return float(isinstance(json.loads(answer, parse_constant=_no_json), dict | list))
    except (ValueError, RecursionError):
        return 0.0


def _no_json(constant: str) -> NoReturn:
    raise ValueError(constant)


def matches(pattern: str) -> Reward:
    """1 where the whole answer matches a regular expression.

    Raises:
        UserError: it is none.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"rl.reward regex:{pattern} is no regular expression: {error}") from None

    def reward(task: Task, answer: str) -> float:
        return float(compiled.fullmatch(answer.strip()) is not None)

    return reward


def length_near(words: int) -> Reward:
    """1 for an answer of so many words, falling by the share that it is off; 0 at none, or at twice as many."""

    def reward(task: Task, answer: str) -> float:
        return max(0.0, 1.0 - abs(len(answer.split()) - words) / words)

    return reward


JUDGED_BY_ANSWER = ("number", "exact")
"""These compare with a task's right answer, so that each must have one."""
NAMED = {"number": number_match, "exact": exact_match, "json": valid_json}


def find_reward(name: str) -> Reward | None:
    """The function of `rl.reward`; None where that is a folder, which is to be a reward model.

    Raises:
        UserError: it names nothing, or a file that has no such function.
    """
    if name in NAMED:
        return NAMED[name]
    kind, colon, argument = name.partition(":")
    if colon and kind == "regex":
        return matches(argument)
    if colon and kind == "length":
        if not argument.isdecimal() or int(argument) == 0:
            raise UserError(f"rl.reward {name} needs a number of words, such as length:50")
        return length_near(int(argument))
    if name and Path(name).is_dir():
        return None
    file, _, function = name.rpartition(":")
    if file.endswith(".py"):
        return _of_file(Path(file), function)
    known = ", ".join([*NAMED, "regex:PATTERN", "length:WORDS"])
    raise UserError(
        f"rl.reward {name or 'is empty, and'} names no reward; there are {known}, FILE.py:FUNCTION, and the folders of "
        "reward models (configs/reward.py)"
    )


def judge(reward: Reward, tasks: Sequence[Task], answers: Sequence[str]) -> list[float]:
    """The reward of each answer.

    Raises:
        UserError: the function raises, or gives what is no finite number; with the prompt.
    """
    found = []
    for task, answer in zip(tasks, answers, strict=True):
        try:
            value = float(reward(task, answer))
        except Exception as error:  # whatever the user's function does
            raise UserError(f"the reward of {_shown(task, answer)} raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise UserError(f"the reward of {_shown(task, answer)} is {value}, which is no number to learn from")
        found.append(value)
    return found


def _shown(task: Task, answer: str) -> str:
    prompt = task.prompt[-1].content
    return f"answer {answer[:60]!r} to prompt {prompt[:80]!r} ({task.origin})"


def _last_number(text: str) -> float | None:
    marked = text.rpartition("####")[2] if "####" in text else text
    found = _NUMBER.findall(marked)
    return float(found[-1].replace(",", "")) if found else None


def _of_file(path: Path, function: str) -> Reward:
    if not path.is_file():
        raise UserError(f"rl.reward {path}:{function}: there is no such file")
    try:
        found = runpy.run_path(str(path)).get(function)
    except Exception as error:  # whatever the user's Python does
        raise UserError(f"rl.reward {path}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"rl.reward {path} has no function {function!r}; it is to take a task and an answer's text")
    return found
