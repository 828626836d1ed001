"""How well a model predicts held-out text: nats a token, bits a byte, perplexity.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.model.gpt import GPT, Params
from gptjax.parallel import sharding
from gptjax.parallel.precision import compute_copy, compute_dtype
from gptjax.training.losses import inputs_and_labels, loss_of_labels


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
    batches: Iterable[tuple[np.ndarray, int]],
    token_bytes_V: np.ndarray,
    separator: int | None = None,
    batch_size: int | None = None,
    chunk_tokens: int = 0,
) -> Perplexity:
    """Predict every label of the batches once, each row on its own, under the current mesh.

    Args:
        batches: (B, T+1) int32 token ids, with the number of rows that count: the last batch is filled up.
        token_bytes_V: UTF-8 bytes that each token stands for.
        separator: the token between documents that do not see each other; None: they do.
        batch_size: B, where a process has only its rows of the batches; None: they are whole.
        chunk_tokens: as `loss_of_labels` takes it.
    """
    weights = jax.jit(compute_copy, static_argnums=1)(params, compute_dtype(config))
    token_bytes = np.asarray(token_bytes_V, np.int32)
    sums = [  # dispatched without waiting; the sums of a batch fit float32 exactly enough, the total is float64
        _sums(
            config, weights, sharding.put_batch(tokens_BT, batch_size), num_rows, token_bytes, separator, chunk_tokens
        )
        for tokens_BT, num_rows in batches
    ]
    nats, num_tokens, num_bytes = np.sum([[float(x) for x in batch] for batch in sums], axis=0)
    return Perplexity(float(nats / num_tokens), int(num_tokens), int(num_bytes))


@functools.partial(jax.jit, static_argnames=("config", "separator", "chunk_tokens"))
def _sums(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    num_rows: int,
    token_bytes: jax.Array,
    separator: int | None,
    chunk_tokens: int,
):
    inputs_BT, labels_BT, places = inputs_and_labels({"tokens": tokens_BT}, separator)
    output = loss_of_labels(config, labels_BT, chunk_tokens)
    (nll_BT, _), _ = GPT(config).apply({"params": params}, inputs_BT, **places, output=output)
    row_BT = jax.lax.broadcasted_iota(jnp.int32, labels_BT.shape, 0, out_sharding=sharding.spec("batch", "sequence"))
    counts_BT = row_BT < num_rows
    bytes_BT = token_bytes.at[labels_BT].get(out_sharding=sharding.spec("batch", "sequence"))
    return jnp.where(counts_BT, nll_BT, 0.0).sum(), counts_BT.sum(), jnp.where(counts_BT, bytes_BT, 0).sum()
