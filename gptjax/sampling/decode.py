"""Decoding on the device: prefill, then jitted chunks of tokens with sampling fused into the loop.

Prompts of unequal length share a batch: each is padded to the right to a common number of slots, and
every row's generated tokens follow in the same slots at positions of their own (`model/cache.py`).

Shape suffixes: B batch, T prompt tokens, N new tokens, V padded vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.cache import EMPTY, Cache, empty_cache
from gptjax.model.gpt import GPT, Params, unstack
from gptjax.parallel import sharding
from gptjax.parallel.precision import MATRICES, compute_copy, compute_dtype
from gptjax.sampling.filters import Setting, apply_filters, one_hot

MATRICES_READ = (*MATRICES, "embedding")
"""Names of the parameters that a forward pass reads as matrices: the embedding is also the tied head."""


class DecodeState(NamedTuple):
    """What decoding carries from token to token. All of it is donated to the next chunk."""

    cache: Cache
    logits_BV: jax.Array
    """Float32 logits of the next token."""
    positions_B: jax.Array
    """Position of the next token."""
    done_B: jax.Array
    """Whether the end-of-text token has been drawn."""
    seen_BV: jax.Array
    """Tokens of the prompt and of the text so far, for the repetition penalty."""
    keys_B: jax.Array
    """Each row's random key."""


@functools.partial(jax.jit, static_argnames="config")
def decoding_params(config: ModelConfig, params: Params) -> Params:
    """Parameters as the loop reads them: matrices in the compute type and layers unstacked, once and not per token."""
    params = compute_copy(params, compute_dtype(config), MATRICES_READ)
    return params | {"blocks": unstack(params["blocks"])}


@functools.partial(jax.jit, static_argnames=("config", "num_slots"))
@sharding.whole_sequences()
def prefill(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, num_slots: int
) -> tuple[jax.Array, Cache]:
    """Run the prompts into a new cache. Compiles once per shape of `tokens_BT` and `num_slots`.

    Args:
        tokens_BT: prompts, padded to the right by any tokens; nothing sees the padding.
        lengths_B: tokens of each prompt, at least 1.
        num_slots: tokens a row of the cache holds: T and all that will be generated.

    Returns:
        Float32 logits (B, V) of the token after each prompt, and the cache with slots [0, T) written.
    """
    B, T = tokens_BT.shape
    tokens_BT = sharding.reshard(tokens_BT, "batch", "sequence")
    lengths_B = sharding.reshard(lengths_B, "batch")
    counted_BT = jax.lax.broadcasted_iota(jnp.int32, (B, T), 1, out_sharding=sharding.spec("batch", "sequence"))
    positions_BT = jnp.where(counted_BT < lengths_B[:, None], counted_BT, EMPTY)
    logits_BTV, cache = GPT(config).apply(
        {"params": params},
        tokens_BT,
        positions=positions_BT,
        cache=empty_cache(config, B, num_slots),
        select_B=lengths_B - 1,
    )
    return _sampling_layout(logits_BTV), cache


def start_decoding(
    logits_BV: jax.Array, cache: Cache, lengths_B: jax.Array, seen_BV: jax.Array, keys_B: jax.Array
) -> DecodeState:
    """The state after a prefill.

    Args:
        lengths_B: tokens of each prompt.
        seen_BV: true at the tokens of each prompt.
        keys_B: one random key per row (see `row_keys`).
    """
    rows = sharding.reshard(lengths_B, "batch"), sharding.reshard(jnp.zeros(lengths_B.shape, bool), "batch")
    return DecodeState(
        cache, logits_BV, *rows, sharding.reshard(seen_BV, "batch", "features"), sharding.reshard(keys_B, "batch")
    )


def row_keys(seed: int, num_rows: int) -> jax.Array:
    """(B,) random keys that depend on seed and row alone, so that a row draws the same in every batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(num_rows))


@functools.partial(jax.jit, static_argnames=("config", "num_tokens"), donate_argnames=("state",))
@sharding.whole_sequences()
def decode_n_tokens(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    settings: Mapping[str, Setting],
    end_of_text_id: int,
    num_tokens: int,
) -> tuple[jax.Array, DecodeState]:
    """Draw `num_tokens` tokens for every row, which needs as many free slots in the cache.

    The trip count is static and finished rows go on as padding, because a loop that asked after each
    token would make the host wait for the device. A token's randomness is its row's key folded with its
    position, so that chunks of any size draw the same text.

    Args:
        params: best `decoding_params`.
        settings: the filters that are on (`filter_settings`); scalars or one value per row.
        end_of_text_id: ends a row; a finished row draws nothing else.

    Returns:
        (B, N) tokens and the new state; the old one is donated.
    """

    def step(state: DecodeState, _: None) -> tuple[DecodeState, jax.Array]:
        tokens_B = sample(state.logits_BV, state.seen_BV, state.keys_B, state.positions_B, settings)
        tokens_B = jnp.where(state.done_B, end_of_text_id, tokens_B)
        logits_BTV, cache = GPT(config).apply(
            {"params": params}, tokens_B[:, None], positions=state.positions_B[:, None], cache=state.cache
        )
        return DecodeState(
            cache=cache,
            logits_BV=_sampling_layout(logits_BTV),
            positions_B=state.positions_B + 1,
            done_B=state.done_B | (tokens_B == end_of_text_id),
            seen_BV=state.seen_BV | one_hot(tokens_B, state.seen_BV),
            keys_B=state.keys_B,
        ), tokens_B

    state, tokens_NB = jax.lax.scan(step, state, length=num_tokens)
    return sharding.reshard(tokens_NB.T, "stack", "stack"), state  # whole, so that every process can read them


def sample(
    logits_BV: jax.Array,
    seen_BV: jax.Array,
    keys_B: jax.Array,
    positions_B: jax.Array,
    settings: Mapping[str, Setting],
) -> jax.Array:
    """Draw one token per row, int32 (B,), after `apply_filters`; without `temperature` the likeliest."""
    logits_BV = apply_filters(logits_BV, seen_BV, settings)
    if "temperature" not in settings:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def _sampling_layout(logits_BTV: jax.Array) -> jax.Array:
    """Float32 logits (B, V) of the only token, whole along the vocabulary, which filters sort."""
    return sharding.reshard(logits_BTV, "batch", "sequence", "features")[:, 0].astype(jnp.float32)
