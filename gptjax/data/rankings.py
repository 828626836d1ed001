"""Ranked answers as rows: prompt and answer together, one row an answer. Legend: K answers, T tokens, P pairs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.conversations import laid_out
from gptjax.data.forms import RankedAnswers
from gptjax.data.packing import Example, fit_rows
from gptjax.text.chat import ChatFormat, Encoded, Message

MULTIPLE = 16
"""Rows are as long as the longest that there is, rounded up, if training.sequence_length is no shorter."""


class EncodedAnswers(NamedTuple):
    """The answers to one prompt."""

    answers: list[Example]
    """Each with its prompt, of which nothing is learned."""
    ranks: tuple[int, ...]


def encode_answers(
    form: ChatFormat, items: Sequence[RankedAnswers], sequence_length: int, data: DataConfig, shifted: bool
) -> tuple[list[EncodedAnswers], Counter[str]]:
    """All answers that fit, of prompts that keep two of different ranks; and what was cut or left out.

    Args:
        shifted: as `fit_rows` takes it.

    Raises:
        UserError: as `fit_rows` and `laid_out`.
    """

    def encode(item: RankedAnswers) -> list[Encoded]:
        return [form.encode([*item.prompt, Message("assistant", answer)]) for answer in item.answers]

    kept, counts = [], Counter()
    for item, all_encoded in laid_out(items, encode, data, counts):
        answers, ranks = [], []
        for encoded, rank in zip(all_encoded, item.ranks, strict=True):
            learned = np.array(encoded.learned)
            last_turn = np.flatnonzero(
                ~learned[: np.flatnonzero(learned)[-1]]
            )  # earlier answers are part of the prompt
            learned[: last_turn[-1] + 1] = False
            example = Example(np.array(encoded.token_ids, np.int32), learned)
            fitted, found = fit_rows([example], [item.origin], sequence_length, data.on_long, shifted)
            counts += found
            answers += fitted
            ranks += [rank] * len(fitted)
        if len(set(ranks)) > 1:
            kept.append(EncodedAnswers(answers, tuple(ranks)))
        else:
            counts["prompts without two answers left"] += 1
    return kept, counts


def longest_answer(groups: Sequence[EncodedAnswers]) -> int:
    """Tokens of the longest answer with its prompt."""
    return max(len(answer.token_ids) for group in groups for answer in group.answers)


def rounded(num_tokens: int, most: int) -> int:
    """What rows are padded to that hold so many tokens: few lengths, which meshes can divide."""
    return min(most, -(-num_tokens // MULTIPLE) * MULTIPLE)


class RankedRows:
    """For each prompt `tokens` (K, T), `ends` (K, T), 1 at the last token that is learned, and `ranks` (K,).

    K is the most answers that a prompt has; of those that are not there the rank is -1.
    """

    def __init__(self, groups: Sequence[EncodedAnswers], num_answers: int, num_tokens: int, padding_id: int):
        self._groups, self._shape, self._padding_id = groups, (num_answers, num_tokens), padding_id

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int) -> Mapping[str, np.ndarray]:
        group = self._groups[number]
        tokens_KT = np.full(self._shape, self._padding_id, np.int32)
        ends_KT, ranks_K = np.zeros(self._shape, np.float32), np.full(self._shape[0], -1, np.int32)
        for k, (answer, rank) in enumerate(zip(group.answers, group.ranks, strict=True)):
            tokens_KT[k, : len(answer.token_ids)], ranks_K[k] = answer.token_ids, rank
            ends_KT[k, np.flatnonzero(answer.learned)[-1]] = 1.0
        ends_KT[len(group.answers) :, 0] = 1.0
        return {"tokens": tokens_KT, "ends": ends_KT, "ranks": ranks_K}


class PairRows:
    """Each pair of answers that is no tie, the better one first: `tokens` and `loss_mask`, both (2, T).

    Answers that were cut to the same tokens are one answer, of which there is nothing to prefer.
    """

    def __init__(self, groups: Sequence[EncodedAnswers], num_tokens: int, padding_id: int):
        self.num_tokens, self._padding_id = num_tokens, padding_id
        self._pairs = [
            (better, worse)
            for group in groups
            for better, rank in zip(group.answers, group.ranks, strict=True)
            for worse, other in zip(group.answers, group.ranks, strict=True)
            if rank < other and not np.array_equal(better.token_ids, worse.token_ids)
        ]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        tokens_2T = np.full((2, self.num_tokens), self._padding_id, np.int32)
        loss_mask_2T = np.zeros((2, self.num_tokens), np.float32)
        for side, answer in enumerate(self._pairs[number]):
            here = slice(0, len(answer.token_ids))
            tokens_2T[side, here], loss_mask_2T[side, here] = answer.token_ids, answer.learned
        return {"tokens": tokens_2T, "loss_mask": loss_mask_2T}
