"""Conversations packed into rows, so that little of a row is empty. Legend: T tokens of a row, R rows."""

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.errors import UserError


class Example(NamedTuple):
    """A text and what of it is learned, both of the same length."""

    token_ids: np.ndarray
    """int32."""
    learned: np.ndarray
    """bool."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a row: best-fit decreasing, which at worst needs 11/9 of the fewest rows (Johnson 1973).

    Args:
        lengths: of the items, each from 1 to `capacity`.

    Returns:
        The items' numbers, row by row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[item], -1))
        if place == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(item)
        if left > lengths[item]:
            bisect.insort(room, (left - lengths[item], row))
    return rows


class PackedRows:
    """Rows of examples that do not see each other, as mappings of arrays (T+1,).

    `tokens` and `loss_mask`, 1 where a token is to be predicted; `segment_ids`, the example of each token; `positions`,
    which each example counts from 0. What is left of a row is filled with `padding_id`, and learned by nobody.
    """

    def __init__(self, examples: Sequence[Example], sequence_length: int, padding_id: int):
        """
        Args:
            examples: none longer than T+1.
        """
        self._examples, self._capacity, self._padding_id = examples, sequence_length + 1, padding_id
        self._rows = pack([len(example.token_ids) for example in examples], self._capacity)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fill(self) -> float:
        """Share of all rows' tokens that are of examples."""
        return sum(len(example.token_ids) for example in self._examples) / (len(self) * self._capacity)

    def __getitem__(self, row: int) -> Mapping[str, np.ndarray]:
        tokens_T = np.full(self._capacity, self._padding_id, np.int32)
        loss_mask_T = np.zeros(self._capacity, np.float32)
        segment_ids_T = np.full(self._capacity, len(self._rows[row]), np.int32)
        positions_T = np.zeros(self._capacity, np.int32)
        start = 0
        for segment, item in enumerate(self._rows[row]):
            token_ids, learned = self._examples[item]
            here = slice(start, start + len(token_ids))
            tokens_T[here], loss_mask_T[here], segment_ids_T[here] = token_ids, learned, segment
            loss_mask_T[start] = 0.0  # what comes before it is another example
            positions_T[here] = np.arange(len(token_ids))
            start = here.stop
        positions_T[start:] = np.arange(self._capacity - start)
        return {"tokens": tokens_T, "loss_mask": loss_mask_T, "segment_ids": segment_ids_T, "positions": positions_T}


def fit_rows(
    examples: Sequence[Example], origins: Sequence[str], sequence_length: int, on_long: str, shifted: bool = True
) -> tuple[list[Example], Counter[str]]:
    """The examples that a row can hold, and how many were cut or left out.

    Args:
        origins: where each is from.
        on_long: `truncate` keeps as many tokens as fit, if any of them is learned, `skip` leaves an example out.
        shifted: whether a row's tokens are inputs and, shifted by one, labels, so that T+1 of them fit; else T do.

    Raises:
        UserError: one is too long, under `stop`.
    """
    capacity = sequence_length + shifted
    kept, counts = [], Counter()
    for example, origin in zip(examples, origins, strict=True):
        if len(example.token_ids) <= capacity:
            kept.append(example)
            continue
        if on_long == "stop":
            longer = sum(len(other.token_ids) > capacity for other in examples)
            longest = max(len(other.token_ids) for other in examples)
            raise UserError(
                f"{origin}: {len(example.token_ids)} tokens do not fit training.sequence_length {sequence_length} (as "
                f"{longer} of {len(examples)} examples do not); --data.on-long truncate cuts such, skip leaves them "
                f"out, and training.sequence_length {longest - shifted} would hold "
                f"{'them all' if len(examples) > 1 else 'this one'}"
            )
        cut = Example(*(values[:capacity] for values in example))
        if on_long == "truncate" and cut.learned.any():
            kept.append(cut)
            counts["too long and cut"] += 1
        else:
            counts["too long and left out"] += 1
    return kept, counts
