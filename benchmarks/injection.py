"""Faults inside a run, for the tests and for `faults.py`: rows with a bad loss, and a device that computes wrong.

`python benchmarks/injection.py scale 96 128 nan CONFIG ...` trains as `train.py CONFIG ...` does, with the loss of rows
96 to 127 of the training order multiplied by NaN; `flip 11 CONFIG ...` flips one bit of what the eleventh call of the
compiled step gives.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from gptjax import cli
from gptjax.data.loader import RowStream
from gptjax.stages import callbacks
from gptjax.stages import train as stages
from gptjax.training.losses import language_model_loss
from gptjax.training.step import make_train_step

MARK = 5
"""A row of nothing but this token is bad."""


@contextlib.contextmanager
def scaled_rows(first: int, last: int, factor: float) -> Iterator[None]:
    """In runs inside, the loss of a micro-batch with rows from `first` to before `last`, as they come in the order of
    training, is multiplied by `factor`; these rows hold one token only."""
    take = RowStream.take

    def marked(self: RowStream, num_rows: int, state: Any = None) -> np.ndarray:
        share = self._share  # of several processes each takes its own rows of every batch
        numbers = (self.position + np.arange(0, num_rows, share.batch_size)[:, None] + share.rows).ravel()
        rows = take(self, num_rows)
        rows[(numbers >= first) & (numbers < last)] = MARK
        return rows

    def scaled(model, *arguments, **options):
        loss = language_model_loss(model, *arguments, **options)

        def with_factor(params, batch, key):
            total, sums = loss(params, batch, key)
            scale = jnp.where((batch["tokens"] == MARK).all(axis=1).any(), factor, 1.0)
            return total * scale, sums | {"loss": sums["loss"] * scale}

        return with_factor

    with mock.patch.object(RowStream, "take", marked), mock.patch.object(callbacks, "language_model_loss", scaled):
        yield


@contextlib.contextmanager
def flipped_bit(call: int) -> Iterator[list[int]]:
    """In runs inside, the lowest bit of the first parameter is another after the `call`-th call of the compiled step.

    Yields:
        A list that grows by one entry with each call.
    """
    calls: list[int] = []

    def faulty(*parts, **settings):
        train_step = make_train_step(*parts, **settings)

        def step(*arguments):
            calls.append(len(calls) + 1)
            state, metrics = train_step(*arguments)
            if calls[-1] == call:
                leaves, tree = jax.tree.flatten(state.params)
                values = np.array(leaves[0])
                values.view(np.uint32).flat[0] ^= 1
                leaves[0] = jax.device_put(values, leaves[0].sharding)
                state = state._replace(params=jax.tree.unflatten(tree, leaves))
            return state, metrics

        return step

    with mock.patch.object(stages, "make_train_step", faulty):
        yield calls


def main(arguments: list[str]) -> int:
    if arguments[0] == "scale":
        with scaled_rows(int(arguments[1]), int(arguments[2]), float(arguments[3])):
            return train.main(arguments[4:])
    with flipped_bit(int(arguments[1])):
        return train.main(arguments[2:])


if __name__ == "__main__":
    cli.run_command(main)
