"""How well a model predicts held-out text: nats a token, bits a byte, perplexity.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

import collections
import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.model.gpt import GPT, Params
from gptjax.parallel import sharding
from gptjax.parallel.precision import compute_copy, compute_dtype
from gptjax.training.losses import Batch, bounded_chunk, inputs_and_labels, lay_out, loss_of_labels

DISPATCHED_BATCHES = 8
"""How many batches an evaluation is ahead of the device."""


class Perplexity(NamedTuple):
    """What an evaluation found, over `num_tokens` predicted tokens that stand for `num_bytes` of UTF-8."""

    nats_per_token: float
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; infinite where the tokens stand for no text."""
        return self.nats_per_token * self.num_tokens / math.log(2) / self.num_bytes if self.num_bytes else math.inf

    @property
    def perplexity(self) -> float:
        """exp(nats per token); comparable only for one tokenizer."""
        return math.exp(min(self.nats_per_token, 700.0))  # a diverged run must not overflow


def evaluate(
    config: ModelConfig,
    params: Params,
    batches: Iterable[tuple[np.ndarray | Mapping[str, np.ndarray], int]],
    token_bytes_V: np.ndarray,
    separator: int | None = None,
    batch_size: int | None = None,
    chunk_tokens: int = 0,
    packed: bool = False,
    opening: int | None = None,
) -> Perplexity:
    """Predict every label of the batches once, each row on its own, under the current mesh.

    Args:
        batches: (B, T+1) int32 token ids, or a `Batch`, with the number of rows that count: the last is filled up.
        token_bytes_V: UTF-8 bytes that each token stands for.
        separator: the token between documents that do not see each other; None: they do.
        batch_size: B, where a process has only its rows of the batches; None: they are whole.
        chunk_tokens: as `loss_of_labels` takes it; 0: as many as `bounded_chunk` says.
        packed: as `inputs_and_labels` takes it.
        opening: as `language_model_loss` takes it.
    """
    weights = jax.jit(compute_copy, static_argnums=1)(params, compute_dtype(config))
    token_bytes = np.asarray(token_bytes_V, np.int32)

    def sums_of(rows: np.ndarray | Mapping[str, np.ndarray], num_rows: int) -> tuple[jax.Array, ...]:
        rows = rows if isinstance(rows, Mapping) else {"tokens": rows}
        batch = {name: sharding.put_batch(values, batch_size) for name, values in rows.items()}
        return _sums(config, weights, batch, num_rows, token_bytes, separator, chunk_tokens, packed, opening)

    # The sums of a batch fit float32 exactly enough, the total is float64. While the device works on some batches the
    # next is read, and no more: what is waiting lies on the device.
    total, dispatched = np.zeros(3), collections.deque()
    for rows, num_rows in batches:
        dispatched.append(sums_of(rows, num_rows))
        if len(dispatched) > DISPATCHED_BATCHES:
            total += [float(x) for x in dispatched.popleft()]
    for sums in dispatched:
        total += [float(x) for x in sums]
    nats, num_tokens, num_bytes = total
    return Perplexity(float(nats / num_tokens), int(num_tokens), int(num_bytes))


@functools.partial(jax.jit, static_argnames=("config", "separator", "chunk_tokens", "packed", "opening"))
def _sums(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    num_rows: int,
    token_bytes: jax.Array,
    separator: int | None,
    chunk_tokens: int,
    packed: bool,
    opening: int | None,
):
    inputs_BT, labels_BT, places = inputs_and_labels(batch, separator, packed)
    output = loss_of_labels(config, labels_BT, chunk_tokens or bounded_chunk(config, labels_BT.size))
    (nll_BT, _), _ = GPT(config).apply({"params": params}, inputs_BT, **places, output=output)
    row_BT = jax.lax.broadcasted_iota(jnp.int32, labels_BT.shape, 0, out_sharding=sharding.spec("batch", "sequence"))
    counts_BT = row_BT < num_rows
    if "loss_mask" in batch:
        counts_BT &= lay_out(batch["loss_mask"][:, 1:]) > 0
    if opening is not None:
        counts_BT &= labels_BT != opening
    bytes_BT = token_bytes.at[labels_BT].get(out_sharding=sharding.spec("batch", "sequence"))
    return jnp.where(counts_BT, nll_BT, 0.0).sum(), counts_BT.sum(), jnp.where(counts_BT, bytes_BT, 0).sum()
