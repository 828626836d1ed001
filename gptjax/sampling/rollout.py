"""Answers to learn from: drawn in batches of one shape, with the log-probability of every token.

The model samples on its own mesh with its own parameters, by the loop that `sample.py` uses. What it says of a token is
what the training forward pass says of it, so that the first ratio of a policy-gradient step is one.

Shape suffixes: B answers, P prompts, T prompt tokens, N new tokens, V padded vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.gpt import Params
from gptjax.parallel import sharding
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.decode import decode_n_tokens, decoding_params, prefill, start_decoding
from gptjax.sampling.filters import filter_settings
from gptjax.sampling.rows import stop_array

CHUNK_TOKENS = 32
"""Tokens drawn between two looks at whether all answers have ended."""


class Rollout(NamedTuple):
    """Answers, in the order of their prompts, those to one prompt together."""

    tokens_BN: np.ndarray
    """int32; after an answer's end whatever came."""
    lengths_B: np.ndarray
    """Tokens of each answer, that which ends it included."""
    logprobs_BN: np.ndarray
    """Of each token at the temperature at which it was drawn; 0 after the end."""
    ended_B: np.ndarray
    """Whether the model has ended an answer, or `max_tokens` did."""


def longest_prompt(context_length: int, answer_tokens: int) -> int:
    """Tokens of the longest prompt that leaves room for an answer."""
    return context_length - answer_tokens


def rollout(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    answers_per_prompt: int,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    key: jax.Array,
    *,
    prompt_tokens: int,
    in_int8: bool = False,
) -> Rollout:
    """Draw answers to prompts; compiles once for one number of prompts and one `prompt_tokens`.

    Args:
        sampling: `max_tokens` and `temperature` count, 0 being the likeliest token; no other filter may be on, for what
            they leave is not what the model would be trained to write.
        stop_ids: the tokens that end an answer, the usual one first.
        key: each answer's randomness is this folded with its number.
        prompt_tokens: T, to which prompts are padded.
        in_int8: whether weights are rounded; then the log-probabilities are those of another model.

    Raises:
        UserError: prompt and answer do not fit the context, or a filter is on.
    """
    settings = filter_settings(sampling)
    if set(settings) - {"temperature"}:
        raise UserError(f"rollouts are drawn by temperature alone, not by {', '.join(set(settings) - {'temperature'})}")
    N = sampling.max_tokens
    longest = max(map(len, prompts))
    if longest > prompt_tokens or prompt_tokens > longest_prompt(config.context_length, N):
        raise UserError(
            f"prompts of {max(longest, prompt_tokens)} tokens and answers of {N} do not fit the context of "
            f"{config.context_length}"
        )
    shards = sharding.num_shards("batch")
    filled = [*prompts, *[prompts[-1]] * (-len(prompts) % shards)]
    rows_B = np.repeat(np.arange(len(filled)), answers_per_prompt)
    tokens_PT = np.zeros((len(filled), prompt_tokens), np.int32)
    for row, prompt in enumerate(filled):
        tokens_PT[row, : len(prompt)] = prompt
    lengths_P = np.array([len(prompt) for prompt in filled], np.int32)
    params = decoding_params(config, params, in_int8)
    chunk = min(CHUNK_TOKENS, N)
    num_slots = prompt_tokens + -(-N // chunk) * chunk
    prefilled = prefill(config, params, jnp.asarray(tokens_PT), jnp.asarray(lengths_P), num_slots)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(rows_B)))
    state = start_decoding(
        prefilled,
        jnp.asarray(rows_B),
        jnp.asarray(lengths_P[rows_B] + N),
        jnp.zeros((len(rows_B), config.padded_vocab_size), bool),
        keys_B,
    )
    tokens, logprobs = [], []
    for _ in range(0, N, chunk):
        drawn, state = decode_n_tokens(
            *(config, params, state, settings, stop_array(stop_ids), chunk),
            with_logprobs=True,
            tempered="temperature" in settings,
        )
        tokens.append(np.asarray(drawn.tokens_BN))
        logprobs.append(np.asarray(drawn.logprobs_BN))
        if np.isin(tokens[-1], stop_ids).any(axis=1).all():
            break
    count = len(prompts) * answers_per_prompt
    tokens_BN = _to_width(np.concatenate(tokens, axis=1)[:count], N, stop_ids[0])
    logprobs_BN = _to_width(np.concatenate(logprobs, axis=1)[:count], N, 0.0)
    is_end_BN = np.isin(tokens_BN, stop_ids)
    ended_B = is_end_BN.any(axis=1)
    lengths_B = np.where(ended_B, is_end_BN.argmax(axis=1) + 1, N)
    logprobs_BN = np.where(np.arange(N) < lengths_B[:, None], logprobs_BN, 0.0).astype(np.float32)
    return Rollout(tokens_BN, lengths_B, logprobs_BN, ended_B)


def _to_width(values_BN: np.ndarray, width: int, filling: float) -> np.ndarray:
    """Cut, or filled up, to so many columns."""
    missing = max(0, width - values_BN.shape[1])
    return np.pad(values_BN, [(0, 0), (0, missing)], constant_values=filling)[:, :width]
