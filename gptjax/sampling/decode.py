"""Decoding on the device: prefill, then jitted chunks of tokens with sampling fused into the loop.

Prompts of unequal length share a batch: they are padded to the right, and each row's tokens go on at positions of their
own (`model/cache.py`).

Shape suffixes: B batch, T prompt tokens, N new tokens, V padded vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.cache import Cache, empty_cache, resize, take_rows
from gptjax.model.gpt import GPT, Params, head_logits, mask_padding, unstack
from gptjax.model.int8 import Int8, quantize
from gptjax.parallel import sharding
from gptjax.parallel.precision import MATRICES, compute_dtype
from gptjax.sampling.draw import draw
from gptjax.sampling.filters import Setting, apply_filters, likeliest, one_hot
from gptjax.training.losses import loss_of_labels

MATRICES_READ = (*MATRICES, "embedding")
"""Names of the parameters that a forward pass reads as matrices: the embedding is also the tied head."""


class DecodeState(NamedTuple):
    """What decoding carries from token to token. All of it is donated to the next chunk."""

    cache: Cache
    """Of all tokens so far: its lengths are the positions of the next ones."""
    logits_BV: jax.Array
    """Float32 logits of the next token."""
    ends_B: jax.Array
    """Length at which a row is done, whatever it draws."""
    done_B: jax.Array
    """Whether a row has reached its end, or drawn the end-of-text token."""
    seen_BV: jax.Array
    """Tokens of the prompt and of the text so far, for the repetition penalty."""
    keys_B: jax.Array
    """Each row's random key."""


class Prefilled(NamedTuple):
    """What a prefill gives."""

    logits_BV: jax.Array
    """Float32 logits of the token after each prompt."""
    cache: Cache
    logprobs_BT: jax.Array | None
    """Log-probability of each token of a prompt after those before it, if asked for; 0 for the first and in padding."""


class Drawn(NamedTuple):
    """Tokens that were drawn."""

    tokens_BN: jax.Array
    """Of a row that is done the end-of-text token."""
    logprobs_BN: jax.Array | None
    """Log-probability of each by the model alone, whatever filters made of it, if asked for; 0 once a row is done."""


def decoding_params(config: ModelConfig, params: Params, in_int8: bool = False) -> Params:
    """Parameters as the loop reads them: matrices in the compute type and layers unstacked, once and not per token.

    What has been made so before comes back as it is, and is not copied.

    Args:
        in_int8: whether matrices are rounded to eight bits, with a scale for each output.
    """
    if isinstance(params["blocks"], list) and isinstance(params["embedding"], Int8) >= in_int8:
        return params
    return _decoding_params(config, params, in_int8)


@functools.partial(jax.jit, static_argnames=("config", "in_int8"))
def _decoding_params(config: ModelConfig, params: Params, in_int8: bool) -> Params:
    def made(path: tuple, leaf: jax.Array | Int8) -> jax.Array | Int8:
        name = path[-1].key
        if name not in MATRICES_READ or isinstance(leaf, Int8):
            return leaf
        return quantize(leaf, axis=0 if name == "w" else 1) if in_int8 else leaf.astype(compute_dtype(config))

    params = params | {"blocks": unstack(params["blocks"])}
    return jax.tree_util.tree_map_with_path(made, params, is_leaf=lambda leaf: isinstance(leaf, Int8))


@functools.partial(
    jax.jit, static_argnames=("config", "num_slots", "chunk_tokens", "call_tokens", "in_int8", "with_logprobs")
)
@sharding.whole_sequences()
def prefill(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    num_slots: int,
    *,
    chunk_tokens: int = 512,
    call_tokens: int = 1,
    in_int8: bool = False,
    with_logprobs: bool = False,
) -> Prefilled:
    """Run the prompts into a new cache. Compiles once per shape of `tokens_BT` and `num_slots`.

    Args:
        tokens_BT: prompts, padded to the right by any tokens; nothing sees the padding.
        lengths_B: tokens of each prompt, at least 1.
        num_slots: tokens a row of the cache holds; at least T.
        chunk_tokens: most tokens of a row that go through the model at once, which bounds the memory of long prompts.
            The first chunk sees itself, with the kernels that training has; the others see the cache.
        call_tokens: as `empty_cache` takes it, of the calls to come.
        in_int8: as `empty_cache` takes it. The first chunk sees what is not rounded.
        with_logprobs: whether the prompts' own log-probabilities are computed, from the same pass: with logits of a
            whole chunk.
    """
    B, T = tokens_BT.shape
    num_chunks = -(-T // chunk_tokens)
    C = -(-T // num_chunks)
    tokens_BT = sharding.reshard(tokens_BT, "batch", "sequence")
    lengths_B = sharding.reshard(lengths_B, "batch")
    # One column more than the chunks have: the label of the last token, which counts for nothing.
    padded_BT = jnp.pad(tokens_BT, [(0, 0), (0, num_chunks * C + 1 - T)])
    model, variables = GPT(config), {"params": params}

    def run(cache: Cache, start: jax.Array | int, is_first: bool):
        """One chunk: the logits after each row's last token in it, the log-probabilities of its labels, the cache."""
        inputs_BC, labels_BC = (jax.lax.dynamic_slice_in_dim(padded_BT, start + i, C, axis=1) for i in (0, 1))
        last_B = jnp.clip(lengths_B - 1 - start, 0, C - 1)

        def output(head, x_BCD):
            last_B1D = jnp.take_along_axis(x_BCD, last_B[:, None, None], axis=1)
            logits_BV = _sampling_layout(mask_padding(head_logits(config, head, last_B1D), config.vocab_size))
            nll_BC = loss_of_labels(config, labels_BC)(head, x_BCD)[0] if with_logprobs else None
            return logits_BV, nll_BC

        (logits_BV, nll_BC), cache = model.apply(variables, inputs_BC, cache=cache, in_order=is_first, output=output)
        return logits_BV, nll_BC, cache._replace(lengths_B=jnp.minimum(cache.lengths_B, lengths_B))

    cache = empty_cache(config, B, num_chunks * C, call_tokens=C, in_int8=in_int8)
    logits_BV, nll_BC, cache = run(cache, 0, True)
    nlls = [nll_BC]
    if num_chunks > 1:

        def advance(carry, start):
            logits_BV, cache = carry
            new_BV, nll_BC, cache = run(cache, start, False)
            ends_here_B1 = (lengths_B > start)[:, None]
            return (jnp.where(ends_here_B1, new_BV, logits_BV), cache), nll_BC

        starts = jnp.arange(1, num_chunks) * C
        (logits_BV, cache), nll_IBC = jax.lax.scan(advance, (logits_BV, cache), starts)
        nlls += [] if nll_IBC is None else list(nll_IBC)
    logprobs_BT = None
    if with_logprobs:
        before_BT = jnp.pad(jnp.concatenate(nlls, axis=1), [(0, 0), (1, 0)])[:, :T]
        column_BT = jax.lax.broadcasted_iota(jnp.int32, (B, T), 1, out_sharding=sharding.spec("batch", "sequence"))
        logprobs_BT = jnp.where(column_BT < lengths_B[:, None], -before_BT, 0.0)
    return Prefilled(logits_BV, resize(config, cache, num_slots, call_tokens), logprobs_BT)


@jax.jit
@sharding.whole_sequences()
def start_decoding(
    prefilled: Prefilled,
    rows_B: jax.Array,
    ends_B: jax.Array,
    seen_BV: jax.Array,
    keys_B: jax.Array,
) -> DecodeState:
    """The state after a prefill.

    Args:
        rows_B: the prompt that each row continues, by its number: of one prefill there may be many samples.
        ends_B: length of each row, its prompt included, at which it is done.
        seen_BV: true at the tokens of each row's prompt.
        keys_B: one random key per row (see `row_keys`).
    """
    rows_B, ends_B = (sharding.reshard(x, "batch") for x in (rows_B, ends_B))
    cache = take_rows(prefilled.cache, rows_B)
    logits_BV = prefilled.logits_BV.at[rows_B].get(out_sharding=sharding.spec("batch", "features"))
    seen_BV, keys_B = sharding.reshard(seen_BV, "batch", "features"), sharding.reshard(keys_B, "batch")
    return DecodeState(cache, logits_BV, ends_B, cache.lengths_B >= ends_B, seen_BV, keys_B)


@functools.partial(jax.jit, static_argnames=("config", "num_slots", "call_tokens"))
def with_slots(config: ModelConfig, state: DecodeState, num_slots: int, call_tokens: int = 1) -> DecodeState:
    """The state with room for `num_slots` tokens a row."""
    return state._replace(cache=resize(config, state.cache, num_slots, call_tokens))


def row_keys(seed: int, num_rows: int) -> jax.Array:
    """(B,) random keys that depend on seed and row alone, so that a row draws the same in every batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(num_rows))


@functools.partial(
    jax.jit, static_argnames=("config", "num_tokens", "with_logprobs", "tempered"), donate_argnames=("state",)
)
@sharding.whole_sequences()
def decode_n_tokens(
    config: ModelConfig,
    params: Params,
    state: DecodeState,
    settings: Mapping[str, Setting],
    stop_ids_E: jax.Array,
    num_tokens: int,
    *,
    with_logprobs: bool = False,
    tempered: bool = False,
) -> tuple[Drawn, DecodeState]:
    """Draw `num_tokens` tokens for every row, which needs a free slot for each until the row is done.

    The trip count is static and rows that are done stay where they are, because a loop that asked after each token
    would make the host wait for the device. A token's randomness is its row's key folded with its position, so that
    chunks of any size draw the same text.

    Args:
        params: best `decoding_params`.
        settings: the filters that are on (`filter_settings`); scalars or one value per row.
        stop_ids_E: each of these ends a row; at least one, which may be no token.
        tempered: whether log-probabilities are those at the temperature that tokens are drawn at.
    """

    def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[jax.Array, jax.Array | None]]:
        positions_B = state.cache.lengths_B
        tokens_B = sample(state.logits_BV, state.seen_BV, state.keys_B, positions_B, settings)
        tokens_B = jnp.where(state.done_B, stop_ids_E[0], tokens_B)
        logprobs_B = None
        if with_logprobs:
            logits_BV = state.logits_BV / settings["temperature"] if tempered else state.logits_BV
            logprobs_B = jnp.where(state.done_B, 0.0, log_probability(logits_BV, tokens_B))
        logits_BTV, cache = GPT(config).apply({"params": params}, tokens_B[:, None], cache=state.cache)
        return DecodeState(
            cache=cache._replace(lengths_B=jnp.where(state.done_B, positions_B, positions_B + 1)),
            logits_BV=_sampling_layout(logits_BTV),
            ends_B=state.ends_B,
            done_B=state.done_B | is_stop(tokens_B, stop_ids_E) | (positions_B + 1 >= state.ends_B),
            seen_BV=state.seen_BV | one_hot(tokens_B, state.seen_BV),
            keys_B=state.keys_B,
        ), (tokens_B, logprobs_B)

    state, drawn_NB = jax.lax.scan(step, state, length=num_tokens)
    # Whole on every device, so that every process can read them.
    return Drawn(*jax.tree.map(lambda x_NB: sharding.reshard(x_NB.T, "stack", "stack"), drawn_NB)), state


def sample(
    logits_BV: jax.Array,
    seen_BV: jax.Array,
    keys_B: jax.Array,
    positions_B: jax.Array,
    settings: Mapping[str, Setting],
) -> jax.Array:
    """Draw one token per row, int32 (B,), after `apply_filters`; without `temperature` the likeliest."""
    candidates = apply_filters(logits_BV, seen_BV, settings)
    if "temperature" not in settings:
        return candidates.tokens(likeliest(candidates.logits_BC))
    return draw(candidates, jax.vmap(jax.random.fold_in)(keys_B, positions_B))


def is_stop(tokens: jax.Array, stop_ids_E: jax.Array) -> jax.Array:
    """Whether each token ends what is written."""
    return (tokens[..., None] == stop_ids_E.reshape((1,) * tokens.ndim + (-1,))).any(axis=-1)


def log_probability(logits_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """(B,) log-softmax of float32 logits at one token a row."""
    token_logits_B = jnp.where(one_hot(tokens_B, logits_BV), logits_BV, 0.0).sum(axis=-1)
    return token_logits_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _sampling_layout(logits_BTV: jax.Array) -> jax.Array:
    """Float32 logits (B, V) of the only token, whole along the vocabulary, as filters need them."""
    return sharding.reshard(logits_BTV, "batch", "sequence", "features")[:, 0].astype(jnp.float32)
