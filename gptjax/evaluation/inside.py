"""Looking inside a model: what each head attends to, and what each layer would predict.

Shape suffixes: T tokens, S tokens looked at, N heads, L layers, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.gpt import Params, final_logits
from gptjax.model.trace import Stream, Trace


class Lens(NamedTuple):
    """What the residual stream after each layer would predict as the next token."""

    token_ids_LT: np.ndarray
    """The most probable token."""
    probability_LT: np.ndarray
    """Its probability."""
    entropy_LT: np.ndarray
    """Entropy of the prediction, in nats."""


def attention_weights(config: ModelConfig, params: Params, tokens: Sequence[int]) -> np.ndarray:
    """The weights of every head, float32 (L, N, T, S): row t sums to 1 and is 0 after t.

    Raises:
        UserError: no tokens, or more than the context.
    """
    return np.asarray(_trace(config, params, _one_row(config, tokens)))[:, 0]


def logit_lens(config: ModelConfig, params: Params, tokens: Sequence[int]) -> Lens:
    """The final norm and the head applied to the residual stream after each layer (nostalgebraist 2020).

    The last layer's prediction is the model's own.

    Raises:
        UserError: no tokens, or more than the context.
    """
    return Lens(*map(np.asarray, _predictions(config, params, _one_row(config, tokens))))


def looked_at_most(weights_NTS: np.ndarray, count: int = 3) -> list[list[tuple[int, float]]]:
    """For each token the positions of the tokens that it looks at most, averaged over heads, with their weights."""
    mean_TS = weights_NTS.mean(axis=0)
    return [
        [(int(s), float(row[s])) for s in np.argsort(-row[: t + 1], kind="stable")[:count]]
        for t, row in enumerate(mean_TS)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _trace(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return Trace(config).apply({"params": params}, tokens_BT)


@functools.partial(jax.jit, static_argnums=0)
def _predictions(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> tuple[jax.Array, ...]:
    """What `Lens` has of each layer, whose logits are there one layer at a time."""

    def of_layer(x_BTD: jax.Array) -> tuple[jax.Array, ...]:
        log_probability_TV = jax.nn.log_softmax(final_logits(config, params, x_BTD)[0].astype(jnp.float32))
        probability_TV = jnp.exp(log_probability_TV)
        entropy_T = -jnp.where(probability_TV > 0, probability_TV * log_probability_TV, 0.0).sum(-1)
        return log_probability_TV.argmax(-1), probability_TV.max(-1), entropy_T

    stream_LBTD = Stream(config).apply({"params": params}, tokens_BT)[1:]
    return jax.lax.map(of_layer, stream_LBTD)


def _one_row(config: ModelConfig, tokens: Sequence[int]) -> jax.Array:
    if not 0 < len(tokens) <= config.context_length:
        raise UserError(f"the text has {len(tokens)} tokens, but must have 1 to {config.context_length}, the context")
    return jnp.asarray([tokens], jnp.int32)
