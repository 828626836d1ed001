"""Speculative decoding: a draft guesses several tokens, and one pass of the model says which of them stay.

What is drawn has exactly the model's distribution, whatever the draft is: a guess x from q is kept with probability
min(1, p(x)/q(x)), and where one is not, the token comes from what p has and q has not, max(p - q, 0) (Leviathan et al.
2023; Chen et al. 2023). p and q are what the filters leave of the models' distributions. Greedy texts are the same
token for token.

Shape suffixes: B batch, S slots, G guesses, N tokens of a round (the one that is drawn anyway, then the guesses),
R rounds, V padded vocabulary.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.cache import Cache
from gptjax.model.gpt import GPT, Params
from gptjax.parallel import sharding
from gptjax.sampling.decode import DecodeState, is_stop, log_probability
from gptjax.sampling.draw import draw
from gptjax.sampling.filters import Candidates, Setting, apply_filters, likeliest, one_hot

LONGEST_MATCH = 3
"""Last tokens of a text whose latest earlier occurrence is looked for, and then as few as one of them."""
DRAW, GUESS, ACCEPT = range(3)
"""What the random numbers of a position are for."""


class SpeculativeState(NamedTuple):
    """What a round hands to the next. All of it is donated."""

    decode: DecodeState
    """Its cache needs slots for `guesses` tokens more than a row's end, and `call_tokens` of `guesses` + 2."""
    ruled_out_BV: jax.Array
    """q of the guess that was not kept: what the next token is not drawn from; zeros where all were."""
    draft_cache: Cache | None
    """None: guesses are looked up in the text."""
    text_BS: jax.Array | None
    """The text so far, by position."""
    kept: jax.Array
    """Guesses that stayed, of all rows, and"""
    guessed: jax.Array
    """those that there were."""


class Rounds(NamedTuple):
    """What some rounds have drawn."""

    tokens_BRN: jax.Array
    counts_BR: jax.Array
    """Tokens of a round that count, from the left."""
    logprobs_BRN: jax.Array | None
    """Log-probability of each by the model alone, if asked for."""


def start_speculating(decode: DecodeState, draft_cache: Cache | None, text_BS: jax.Array | None) -> SpeculativeState:
    """The state after a prefill: of the draft, too, or with the prompts' tokens by position."""
    zero = jnp.zeros((), jnp.int32)
    return SpeculativeState(decode, jnp.zeros_like(decode.logits_BV), draft_cache, text_BS, zero, jnp.zeros_like(zero))


@functools.partial(
    jax.jit,
    static_argnames=("config", "draft_config", "num_rounds", "guesses", "with_logprobs"),
    donate_argnames=("state",),
)
@sharding.whole_sequences()
def decode_n_rounds(
    config: ModelConfig,
    params: Params,
    state: SpeculativeState,
    settings: Mapping[str, Setting],
    stop_ids_E: jax.Array,
    num_rounds: int,
    guesses: int,
    *,
    draft_config: ModelConfig | None = None,
    draft_params: Params | None = None,
    with_logprobs: bool = False,
) -> tuple[Rounds, SpeculativeState]:
    """Draw one token and then up to `guesses` more, `num_rounds` times, for every row that is not done.

    Args:
        params: best `decoding_params`, as `draft_params`.
        settings: as `decode_n_tokens` takes them.
        guesses: G, of each round.
        draft_config: of a model with the same vocabulary; None: the continuation of the latest earlier occurrence of
            the text's last tokens is guessed.
    """

    def one_round(state: SpeculativeState, _: None) -> tuple[SpeculativeState, tuple]:
        d = state.decode
        starts_B = d.cache.lengths_B

        def keys(offset: jax.Array | int, purpose: int) -> jax.Array:
            def fold(key: jax.Array, position: jax.Array) -> jax.Array:
                return jax.random.fold_in(jax.random.fold_in(key, position), purpose)

            return jax.vmap(fold)(d.keys_B, starts_B + offset)

        first_B = _draw(_remainder(_distribution(d.logits_BV, d.seen_BV, settings), state), keys(0, DRAW), settings)
        first_B = jnp.where(d.done_B, stop_ids_E[0], first_B)
        seen_BV = d.seen_BV | one_hot(first_B, d.seen_BV)
        draft_cache, text_BS = state.draft_cache, state.text_BS
        if draft_config is None:
            text_BS = _put(text_BS, first_B[:, None], starts_B)
            guesses_BG = sharding.per_device(
                lambda text_BS, ends_B: _look_up(text_BS, ends_B, guesses), text_BS, starts_B + 1
            )
            guesses_GB, q_GBV = guesses_BG.T, None
        else:

            def guess(carry: tuple, offset: jax.Array) -> tuple[tuple, tuple]:
                cache, token_B, seen_BV = carry
                logits_BTV, cache = GPT(draft_config).apply({"params": draft_params}, token_B[:, None], cache=cache)
                q_BV = _distribution(_whole(logits_BTV)[:, 0], seen_BV, settings)
                token_B = _draw(q_BV, keys(offset, GUESS), settings)
                return (cache, token_B, seen_BV | one_hot(token_B, seen_BV)), (token_B, q_BV)

            # Once more than there are guesses, so that the draft has read its last one, should it stay.
            carry, (guesses_GB, q_GBV) = jax.lax.scan(
                guess, (draft_cache, first_B, seen_BV), jnp.arange(1, guesses + 2)
            )
            draft_cache, guesses_GB, q_GBV = carry[0], guesses_GB[:guesses], q_GBV[:guesses]

        tokens_NB = jnp.concatenate([first_B[None], guesses_GB])
        tokens_BN = sharding.reshard(tokens_NB.T, "batch", "sequence")
        logits_BNV, cache = GPT(config).apply({"params": params}, tokens_BN, cache=d.cache)
        logits_NBV = jnp.moveaxis(_whole(logits_BNV), 1, 0)

        # A guess counts only where those before it stay, so that each is judged as if they did, and all at once.
        is_guess_GBV = jax.vmap(one_hot, in_axes=(0, None))(guesses_GB, seen_BV)
        before_GBV = seen_BV[None] | (jnp.cumsum(is_guess_GBV, axis=0) > is_guess_GBV)
        p_GBV = jax.vmap(_distribution, in_axes=(0, 0, None))(logits_NBV[:-1], before_GBV, settings)
        q_GBV = is_guess_GBV.astype(jnp.float32) if q_GBV is None else q_GBV
        p_GB, q_GB = (jnp.where(is_guess_GBV, x_GBV, 0.0).sum(axis=-1) for x_GBV in (p_GBV, q_GBV))
        uniform_GB = jax.vmap(lambda offset: jax.vmap(jax.random.uniform)(keys(offset, ACCEPT)))(
            jnp.arange(1, guesses + 1)
        )
        kept_B = jnp.cumprod(accepts(p_GB, q_GB, uniform_GB), axis=0).sum(axis=0)
        places_GB = jnp.broadcast_to(jnp.arange(guesses)[:, None], guesses_GB.shape)
        seen_BV = seen_BV | (is_guess_GBV & (places_GB < kept_B[None])[..., None]).any(axis=0)
        next_BV = jnp.take_along_axis(logits_NBV, kept_B[None, :, None], axis=0)[0]
        ruled_out_BV = jnp.where((places_GB == kept_B[None])[..., None], q_GBV, 0.0).sum(axis=0)

        is_end_NB = is_stop(tokens_NB, stop_ids_E)
        before_end_B = jnp.where(is_end_NB, jnp.arange(guesses + 1)[:, None], guesses + 1).min(axis=0)
        counts_B = jnp.minimum(jnp.minimum(1 + kept_B, before_end_B + 1), d.ends_B - starts_B)
        counts_B = jnp.where(d.done_B, 0, counts_B)
        lengths_B = starts_B + counts_B
        logprobs_NB = None
        if with_logprobs:
            given = [d.logits_BV, *logits_NBV[:-1]]
            logprobs_NB = jnp.stack([log_probability(x_BV, t_B) for x_BV, t_B in zip(given, tokens_NB, strict=True)])
        state = SpeculativeState(
            DecodeState(
                cache=cache._replace(lengths_B=lengths_B),
                logits_BV=jnp.where(d.done_B[:, None], d.logits_BV, next_BV),
                ends_B=d.ends_B,
                done_B=d.done_B | (before_end_B < counts_B) | (lengths_B >= d.ends_B),
                seen_BV=seen_BV,
                keys_B=d.keys_B,
            ),
            ruled_out_BV,
            None if draft_cache is None else draft_cache._replace(lengths_B=lengths_B),
            None if text_BS is None else _put(text_BS, tokens_BN, starts_B),
            state.kept + jnp.maximum(counts_B - 1, 0).sum(),
            state.guessed + jnp.where(d.done_B, 0, guesses).sum(),
        )
        return state, (tokens_NB, counts_B, logprobs_NB)

    state, (tokens_RNB, counts_RB, logprobs_RNB) = jax.lax.scan(one_round, state, length=num_rounds)
    # Whole on every device, so that every process can read them.
    found = (
        tokens_RNB.transpose(2, 0, 1),
        counts_RB.T,
        None if logprobs_RNB is None else logprobs_RNB.transpose(2, 0, 1),
    )
    return Rounds(*jax.tree.map(lambda x: sharding.reshard(x, *["stack"] * x.ndim), found)), state


def accepts(p_B: jax.Array, q_B: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """(B,) whether guesses stay, of which the model has probability p and the draft had q."""
    return uniform_B * q_B < p_B


def _remainder(p_BV: jax.Array, state: SpeculativeState) -> jax.Array:
    """What the next token is drawn from, up to a factor: what the draft that was wrong has not covered."""
    left_BV = jnp.maximum(p_BV - state.ruled_out_BV, 0.0)
    return jnp.where(left_BV.sum(axis=-1, keepdims=True) > 0, left_BV, p_BV)  # nothing is left by rounding alone


def _distribution(logits_BV: jax.Array, seen_BV: jax.Array, settings: Mapping[str, Setting]) -> jax.Array:
    """(B, V) probabilities that the filters leave; without `temperature` all on the likeliest."""
    found = apply_filters(logits_BV, seen_BV, settings)
    if "temperature" not in settings:
        return one_hot(found.tokens(likeliest(found.logits_BC)), logits_BV).astype(jnp.float32)
    return found.spread(jax.nn.softmax(found.logits_BC, axis=-1), logits_BV)


def _draw(p_BV: jax.Array, keys_B: jax.Array, settings: Mapping[str, Setting]) -> jax.Array:
    if "temperature" not in settings:
        return likeliest(p_BV)
    return draw(Candidates(jnp.log(p_BV), None), keys_B)


def _look_up(text_BS: jax.Array, ends_B: jax.Array, guesses: int) -> jax.Array:
    """(B, G) tokens after the latest earlier occurrence of each text's last ones, the longer the match the better.

    Where the continuation reaches the end of the text it goes on from its beginning, as a repetition would.
    """
    B, S = text_BS.shape
    places_BS = jnp.broadcast_to(jnp.arange(S)[None], (B, S))
    last_B1 = ends_B[:, None] - 1
    length_BS, matches_BS = jnp.zeros((B, S), jnp.int32), places_BS < last_B1
    for back in range(LONGEST_MATCH):
        token_B1 = jnp.take_along_axis(text_BS, jnp.maximum(last_B1 - back, 0), axis=1)
        shifted_BS = jnp.pad(text_BS, [(0, 0), (back, 0)], constant_values=-1)[:, :S]
        matches_BS &= (shifted_BS == token_B1) & (last_B1 >= back)
        length_BS += matches_BS
    best_B = (length_BS * S + jnp.where(length_BS > 0, places_BS, 0)).argmax(axis=-1)
    period_B1 = last_B1 - best_B[:, None]
    ahead_BG = jnp.broadcast_to(jnp.arange(guesses)[None], (B, guesses))
    return jnp.take_along_axis(text_BS, best_B[:, None] + 1 + ahead_BG % jnp.maximum(period_B1, 1), axis=1)


def _put(text_BS: jax.Array, tokens_BN: jax.Array, starts_B: jax.Array) -> jax.Array:
    """The text with tokens from `starts_B` on."""

    def local(text_BS: jax.Array, tokens_BN: jax.Array, starts_B: jax.Array) -> jax.Array:
        places_BN = starts_B[:, None] + jnp.arange(tokens_BN.shape[1])[None]
        return text_BS.at[jnp.arange(len(text_BS))[:, None], places_BN].set(tokens_BN, mode="drop")

    return sharding.per_device(local, text_BS, tokens_BN, starts_B)


def _whole(logits_BTV: jax.Array) -> jax.Array:
    """Float32 logits, whole along the vocabulary, as filters need them."""
    return sharding.reshard(logits_BTV, "batch", "sequence", "features").astype(jnp.float32)
