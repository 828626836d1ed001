"""Rows of tokens in training order and in file order. Legend: B batch, T tokens."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from gptjax.errors import UserError


class Tokens(Protocol):
    """What rows are cut from: a `TokenArray`, or any one-dimensional integer array."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: slice) -> np.ndarray: ...


class TokenRows:
    """A random-access source of int32 rows [T+1]: row i is `tokens[i*T : (i+1)*T + 1]`.

    A row's first T tokens are the inputs and its last T the labels, so neighbours share one token, and
    every token but the first is a label exactly once. Less than one row at the end is left out.

    Raises:
        UserError: there is not one row.
    """

    def __init__(self, tokens: Tokens, sequence_length: int):
        self._tokens, self._sequence_length = tokens, sequence_length
        if len(self) == 0:
            raise UserError(
                f"{len(tokens)} tokens are too few for one row of training.sequence_length {sequence_length} and the "
                f"token after it; take more data, or training.sequence_length {max(1, len(tokens) - 1)} or less"
            )

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._sequence_length

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = row * self._sequence_length
        return np.asarray(self._tokens[start : start + self._sequence_length + 1], np.int32)


class Rows(Protocol):
    """Random access to rows: arrays of tokens as `TokenRows` has them, or mappings of arrays."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Any: ...


class Share(NamedTuple):
    """What a process reads of every batch."""

    rows: np.ndarray
    """Numbers of the rows within the batch, in order."""
    batch_size: int


class _Shared:
    """The rows of a share in an endless order, as Grain reads them."""

    def __init__(self, order: grain.MapDataset, share: Share, position: int):
        self._order, self._share, self._position = order, share, position

    def __len__(self) -> int:
        return (len(self._order) - self._position) // self._share.batch_size * len(self._share.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        batch, row = divmod(index, len(self._share.rows))
        return self._order[self._position + batch * self._share.batch_size + int(self._share.rows[row])]


class _Mixture:
    """Endless orders of rows, mixed in proportion to weights.

    Evenly: after any number of rows each source has had its share of them, give or take one for each source before it.
    Shares are the weights' as they are written, 0.7 seven tenths; Grain's own mixture rounds them by up to 1 %. Where
    it does not, the order is its order.
    """

    def __init__(self, orders: Sequence[grain.MapDataset], weights: Sequence[float]):
        exact = [Fraction(repr(weight)) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        self._orders, self._shares = orders, [int(weight * unit) for weight in exact]

    def __len__(self) -> int:
        return min(map(len, self._orders))

    def __getitem__(self, index: int) -> Any:
        number, row = self.place(index)
        return self._orders[number][row]

    def place(self, index: int) -> tuple[int, int]:
        """The source that gives this row, and which of its own it is.

        Of the rows that the sources before leave over, each source takes those at which its share gains a whole row.
        """
        left = sum(self._shares)
        for number, share in enumerate(self._shares):
            rest = left - share
            others, others_after = index * rest // left, (index + 1) * rest // left
            if others == others_after:
                return number, index - others
            index, left = others, rest
        raise AssertionError("the last source leaves nothing over")


def stack(rows: Sequence[Any]) -> Any:
    """Rows as one array, or, where each is a mapping, as one array for each name."""
    if isinstance(rows[0], Mapping):
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return np.stack(rows)


class RowStream:
    """Rows in training order, without end: of each source every epoch all rows once, in an order of its own.

    Where there are several sources, rows are drawn from them in proportion to their weights. The order is a function
    of rows, weights and seed alone, and `position`, the rows taken so far, is the whole state: a stream made with it
    goes on where this one stands, whatever its threads have read ahead. Of several processes each reads a share of
    the rows, and the order of all rows together does not depend on how many they are.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        seed: int,
        position: int = 0,
        *,
        weights: Sequence[float] = (),
        share: Share | None = None,
        num_threads: int = 2,
        prefetch_rows: int = 128,
    ):
        """Start at `position`. `weights` has one number for each source; one source needs none.

        Args:
            share: rows of each batch that are read; None: all. `position` is a multiple of the batch.
        """
        self.position, self._share = position, share or Share(np.zeros(1, int), 1)
        self.metrics: dict[str, float] = {}
        self.on_policy = False
        # Repeated before any batch is cut, so that no epoch loses its tail.
        orders = [
            grain.MapDataset.source(rows).seed(seed + number).shuffle().repeat() for number, rows in enumerate(sources)
        ]
        order = grain.MapDataset.source(_Mixture(orders, weights)) if len(orders) > 1 else orders[0]
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_rows)
        mine = order[position:] if share is None else grain.MapDataset.source(_Shared(order, share, position))
        self._iterator = iter(mine.to_iter_dataset(options))

    def take(self, num_rows: int, state: Any = None) -> Any:
        """Of the next `num_rows`, a multiple of the batch, those of this share, stacked: int32 [rows, T+1] of tokens.

        Args:
            state: of training; these rows do not depend on it.
        """
        batches = num_rows // self._share.batch_size
        rows = stack([next(self._iterator) for _ in range(batches * len(self._share.rows))])
        self.position += num_rows
        return rows

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()


def evenly_spaced(total: int, limit: int) -> Iterator[int]:
    """Numbers of `limit` (0: all) of so many rows, in order."""
    count = min(limit, total) if limit else total
    return (number * total // count for number in range(count))


def evaluation_rows(rows: Rows, batch_size: int, limit: int, share: Share | None = None) -> Iterator[tuple[Any, int]]:
    """`limit` rows (0: all), evenly spaced in file order, as batches [B, ...] and how many of their rows count.

    The last batch is filled up by repeating its last row, so that all have one shape.

    Args:
        share: rows of each batch that are read; None: all.
    """
    mine = range(batch_size) if share is None else share.rows
    chosen = evenly_spaced(len(rows), limit)
    while batch := [*itertools.islice(chosen, batch_size)]:
        filled = batch + batch[-1:] * (batch_size - len(batch))
        yield stack([rows[filled[number]] for number in mine]), len(batch)
