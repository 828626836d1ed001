"""Prompts to answer, in an order that only a seed and a number decide. Legend: T prompt tokens."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import grain

from gptjax.config import DataConfig
from gptjax.data.conversations import laid_out
from gptjax.data.forms import Task
from gptjax.errors import UserError
from gptjax.text.chat import ChatFormat

MULTIPLE = 16
"""Prompts are padded to the longest that there is, rounded up."""


class Prompt(NamedTuple):
    """A task, laid out up to where its answer begins."""

    task: Task
    token_ids: list[int]


def encode_prompts(
    form: ChatFormat, tasks: Sequence[Task], most_tokens: int, data: DataConfig, bound: str
) -> tuple[list[Prompt], Counter[str]]:
    """The prompts of at most so many tokens, and how many were left out.

    Args:
        bound: what leaves so many, for messages.

    Raises:
        UserError: one is longer, under `stop`; a prompt is not cut, as its end is the question. Or as `laid_out`.
    """
    kept, counts = [], Counter()
    for task, ids in laid_out(tasks, lambda task: form.prompt(task.prompt), data, counts):
        if len(ids) <= most_tokens:
            kept.append(Prompt(task, ids))
            continue
        if data.on_long != "skip":
            raise UserError(
                f"{task.origin}: the prompt has {len(ids)} tokens, of which {bound} leaves {most_tokens} beside "
                "rl.answer_tokens; --data.on-long skip leaves such out"
            )
        counts["too long and left out"] += 1
    return kept, counts


def padded_tokens(prompts: Sequence[Prompt], most_tokens: int) -> int:
    """T: what all prompts are padded to."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    return min(most_tokens, -(-longest // MULTIPLE) * MULTIPLE)


class PromptOrder:
    """Every epoch all prompts once, in an order of its own; without end."""

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        self._prompts = prompts
        self._order = grain.MapDataset.range(len(prompts)).seed(seed).shuffle().repeat()

    def __getitem__(self, number: int) -> Prompt:
        return self._prompts[int(self._order[number])]
