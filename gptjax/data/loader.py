"""Rows of tokens in training order and in file order. Legend: B batch, T tokens."""

from collections.abc import Iterator, Sequence
from typing import Protocol

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

    def __init__(self, tokens: Tokens, context_length: int):
        self._tokens, self._context_length = tokens, context_length
        if len(self) == 0:
            raise UserError(
                f"{len(tokens)} tokens are too few for one row of model.context_length {context_length} and the token "
                f"after it; take more data, or model.context_length {max(1, len(tokens) - 1)} or less"
            )

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._context_length

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = row * self._context_length
        return np.asarray(self._tokens[start : start + self._context_length + 1], np.int32)


class RowStream:
    """Rows in training order, without end: of each source every epoch all rows once, in an order of its own.

    Where there are several sources, rows are drawn from them in proportion to their weights. The order is a function
    of rows, weights and seed alone, and `position`, the rows taken so far, is the whole state: a stream made with it
    goes on where this one stands, whatever its threads have read ahead.
    """

    def __init__(
        self,
        sources: Sequence[TokenRows],
        seed: int,
        position: int = 0,
        *,
        weights: Sequence[float] = (),
        num_threads: int = 2,
        prefetch_rows: int = 128,
    ):
        """Start at `position`. `weights` has one number for each source; one source needs none."""
        self.position = position
        # Repeated before any batch is cut, so that no epoch loses its tail.
        orders = [
            grain.MapDataset.source(rows).seed(seed + number).shuffle().repeat() for number, rows in enumerate(sources)
        ]
        order = grain.MapDataset.mix(orders, weights=weights) if len(orders) > 1 else orders[0]
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_rows)
        self._iterator = iter(order[position:].to_iter_dataset(options))

    def take(self, num_rows: int) -> np.ndarray:
        """The next rows, int32 [num_rows, T+1]."""
        rows = np.stack([next(self._iterator) for _ in range(num_rows)])
        self.position += num_rows
        return rows

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()


def evaluation_rows(rows: TokenRows, batch_size: int, limit: int) -> Iterator[tuple[np.ndarray, int]]:
    """`limit` rows (0: all), evenly spaced in file order, as batches int32 [B, T+1] and how many of their rows count.

    The last batch is filled up by repeating its last row, so that all have one shape.
    """
    total = min(limit, len(rows)) if limit else len(rows)
    chosen = [number * len(rows) // total for number in range(total)]
    for start in range(0, total, batch_size):
        batch = chosen[start : start + batch_size]
        filled = batch + batch[-1:] * (batch_size - len(batch))
        yield np.stack([rows[row] for row in filled]), len(batch)
