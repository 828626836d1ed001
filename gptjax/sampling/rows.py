"""Rows of token ids, continued together: the host's side of decoding.

Shape suffixes: B batch, T prompt tokens, S slots, V padded vocabulary.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.accounting import cache_elements, parameter_counts
from gptjax.model.gpt import Params
from gptjax.parallel import sharding
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.sampling.decode import (
    DecodeState,
    Prefilled,
    decode_n_tokens,
    decoding_params,
    prefill,
    row_keys,
    start_decoding,
    with_slots,
)
from gptjax.sampling.detokenize import FinishReason
from gptjax.sampling.filters import filter_settings
from gptjax.sampling.memory import require_cache_fits
from gptjax.sampling.speculative import decode_n_rounds, start_speculating

SMALLEST_BUCKET = 16
"""Prompts and caches have a power of two of at least this many tokens, so that few lengths are compiled."""
SMALLEST_GROWING = 128
"""Fewest slots of a cache that grows."""
CHUNK_TOKENS = 32
"""Tokens drawn between two looks at whether all rows are finished."""
DEFAULT_DECODING = DecodingConfig()


class Draft(NamedTuple):
    """A model that guesses for another with the same tokens."""

    config: ModelConfig
    params: Params


class Guesses(NamedTuple):
    """How good a draft was so far."""

    kept: int
    """Guesses that became text, of all rows, of"""
    made: int
    """those that there were."""


class Chunk(NamedTuple):
    """Some further tokens of one row."""

    token_ids: list[int]
    finish_reason: FinishReason | None
    """Why the row has ended, or None where more may follow."""


def generate_tokens(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    chunk_tokens: int = CHUNK_TOKENS,
    first_BV: np.ndarray | None = None,
    decoding: DecodingConfig = DEFAULT_DECODING,
    draft: tuple[ModelConfig, Params] | None = None,
    on_guesses: Callable[[Guesses], object] | None = None,
) -> Iterator[list[Chunk]]:
    """Continue prompts of token ids, yielding each time a `Chunk` for every row, until all rows are finished.

    Any of `stop_ids` ends a row. Where a prompt and `max_tokens` together exceed the context, the row ends with the
    context (`length`). Stop strings are for the caller to see, who may leave the iterator at any time. The chunk's size
    does not change what is drawn.

    `first_BV` says which tokens a row may begin with; None: any. With `decoding.draft_tokens`, `draft` guesses, or if
    there is none the text so far, in which the latest repetition of its end is continued; `on_guesses` hears with each
    chunk how many of them were kept.

    Under a mesh the rows are filled up to a number that its batch axes divide.

    Raises:
        UserError: at the call: a prompt is empty or leaves no room for a token in the context, top_k exceeds the
            vocabulary, the cache does not fit, or the draft has other tokens, too short a context, or nothing to guess.
    """
    if sampling.top_k > config.vocab_size:
        raise UserError(f"top_k is {sampling.top_k}, but the vocabulary has {config.vocab_size} tokens; 0 is off")
    prompts = [list(prompt) for prompt in prompts]
    for prompt in prompts:
        if not prompt:
            raise UserError("a prompt has no tokens, and something must stand before the first that is written")
        if len(prompt) >= config.context_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the context {config.context_length}, of which one "
                f"must be left to write; the longest prompt that works has {config.context_length - 1}"
            )
    limits = [min(sampling.max_tokens, config.context_length - len(prompt)) for prompt in prompts]
    if not prompts:
        return iter(())
    longest_end = _longest(prompts, limits)
    if draft is not None:
        draft = Draft(*draft)
        _require_draft_fits(config, decoding, draft.config, longest_end)
    slots = _bucket(longest_end + decoding.draft_tokens)
    require_cache_fits(config, decoding, len(prompts), slots, draft and draft.config)
    task = _Task(config, prompts, limits, sampling, decoding, stop_ids, first_BV)
    params = decoding_params(config, params, decoding.weights == "int8")
    chunk_tokens = min(chunk_tokens, 1 << (max(limits) - 1).bit_length())
    if decoding.draft_tokens:
        return _chunks(task, _speculate(task, params, draft, chunk_tokens, on_guesses))
    return _chunks(task, _decode(task, params, chunk_tokens))


def _require_draft_fits(config: ModelConfig, decoding: DecodingConfig, draft: ModelConfig, longest_end: int) -> None:
    """
    Raises:
        UserError: the draft has other tokens, too few positions for the longest text, or nothing to guess.
    """
    if not decoding.draft_tokens:
        raise UserError("a draft was given, but draft_tokens is 0, so that it guesses nothing; 4 is usual")
    for name in ("vocab_size", "padded_vocab_size"):
        ours, theirs = getattr(config, name), getattr(draft, name)
        if theirs != ours:
            raise UserError(
                f"the draft's model.{name} is {theirs}, and the model's {ours}; take a draft that was trained with the "
                "same tokenizer"
            )
    if draft.context_length < longest_end:
        raise UserError(
            f"the draft's model.context_length is {draft.context_length}, but the longest text may have {longest_end} "
            f"tokens; ask for {longest_end - draft.context_length} fewer, or take a draft with a longer context"
        )


def _chunks(task: "_Task", steps: Iterator[list[list[int]]]) -> Iterator[list[Chunk]]:
    """What the steps give each row, cut at its end."""
    chunks, left = [Chunk([], None)] * len(task.prompts), list(task.limits)
    for rows in steps:
        chunks = [
            Chunk([], last.finish_reason) if last.finish_reason else _cut(row, task.stop_ids, limit)
            for row, last, limit in zip(rows, chunks, left, strict=False)  # the rows that fill a mesh come last
        ]
        left = [limit - len(chunk.token_ids) for limit, chunk in zip(left, chunks, strict=True)]
        yield chunks
        if all(chunk.finish_reason for chunk in chunks):
            return


class _Task:
    """What is to be generated: each prompt once, however often it is repeated, and rows that fill a mesh's axes."""

    def __init__(
        self,
        config: ModelConfig,
        prompts: list[list[int]],
        limits: list[int],
        sampling: SamplingConfig,
        decoding: DecodingConfig,
        stop_ids: Sequence[int],
        first_BV: np.ndarray | None,
    ):
        self.config, self.sampling, self.decoding = config, sampling, decoding
        self.prompts, self.limits, self.stop_ids = prompts, limits, frozenset(stop_ids)
        self.stop_ids_E = stop_array(stop_ids)
        self.settings = filter_settings(sampling)
        self.longest, self.longest_end = max(map(len, prompts)), _longest(prompts, limits)
        number = {prompt: index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}

        def filled(rows: list) -> list:
            return rows + rows[-1:] * (-len(rows) % sharding.num_shards("batch"))

        self.distinct = filled(list(number))
        self.filled = filled(prompts)
        self.rows_B = np.asarray(filled([number[tuple(prompt)] for prompt in prompts]))
        self.ends_B = np.asarray(filled([len(p) + n for p, n in zip(prompts, limits, strict=True)]), np.int32)
        self.first_BV = None if first_BV is None else np.stack(filled(list(first_BV)))

    def prefill(self, model: Draft, num_slots: int) -> Prefilled:
        """Run the distinct prompts into a cache of `num_slots` tokens a row."""
        T = min(_bucket(self.longest), model.config.context_length)
        tokens_BT = np.zeros((len(self.distinct), T), np.int32)
        for row, prompt in enumerate(self.distinct):
            tokens_BT[row, : len(prompt)] = prompt
        lengths_B = jnp.asarray([len(prompt) for prompt in self.distinct], jnp.int32)
        return prefill(
            *model,
            jnp.asarray(tokens_BT),
            lengths_B,
            num_slots,
            chunk_tokens=self.decoding.prefill_chunk,
            call_tokens=self.decoding.call_tokens,
            in_int8=self.decoding.kv_cache == "int8",
        )

    def start(self, prefilled: Prefilled) -> DecodeState:
        """The state of all rows, each of which begins with a token that it may begin with."""
        seen_BV = np.zeros((len(self.filled), self.config.padded_vocab_size), bool)
        for row, prompt in enumerate(self.filled):
            seen_BV[row, prompt] = True
        arrays = map(jnp.asarray, (self.rows_B, self.ends_B, seen_BV))
        state = start_decoding(prefilled, *arrays, row_keys(self.sampling.seed, len(self.filled)))
        if self.first_BV is None:
            return state
        allowed_BV = sharding.reshard(jnp.asarray(self.first_BV), "batch", "features")
        return state._replace(logits_BV=jnp.where(allowed_BV, state.logits_BV, -jnp.inf))


def _decode(task: _Task, params: Params, chunk_tokens: int) -> Iterator[list[list[int]]]:
    """Chunks of each row's tokens, without end; the cache grows as they need it, if that is worth it."""
    config, most_slots = task.config, _bucket(task.longest_end)
    # What is read for each token should not be mostly room for later ones. But where weights are most of what is read,
    # it is not worth the compilation of another size.
    grows = 2 * cache_elements(config, len(task.filled), most_slots) > parameter_counts(config)["total"]
    needed = task.longest + chunk_tokens
    slots = min(most_slots, max(SMALLEST_GROWING, _bucket(needed))) if grows else most_slots
    state = task.start(task.prefill(Draft(config, params), slots))
    while True:
        if slots < min(needed, most_slots):
            slots = min(_bucket(needed), most_slots)
            state = with_slots(config, state, slots)
        drawn, state = decode_n_tokens(config, params, state, task.settings, task.stop_ids_E, chunk_tokens)
        yield np.asarray(drawn.tokens_BN).tolist()
        needed += chunk_tokens


def _speculate(
    task: _Task,
    params: Params,
    draft: Draft | None,
    chunk_tokens: int,
    on_guesses: Callable[[Guesses], object] | None,
) -> Iterator[list[list[int]]]:
    """The same with guesses, in a cache that is whole from the start."""
    guesses = task.decoding.draft_tokens
    slots = _bucket(task.longest_end + guesses)
    decode = task.start(task.prefill(Draft(task.config, params), slots))
    cache, text_BS, model = None, None, {}
    if draft is None:
        text_BS = np.zeros((len(task.filled), slots), np.int32)
        for row, prompt in enumerate(task.filled):
            text_BS[row, : len(prompt)] = prompt
        text_BS = sharding.reshard(jnp.asarray(text_BS), "batch", "keys")
    else:
        draft = Draft(draft.config, decoding_params(*draft, task.decoding.weights == "int8"))
        cache = task.start(task.prefill(draft, slots)).cache
        model = {"draft_config": draft.config, "draft_params": draft.params}
    state, rounds = start_speculating(decode, cache, text_BS), math.ceil(chunk_tokens / (guesses + 1))
    while True:
        found, state = decode_n_rounds(
            task.config, params, state, task.settings, task.stop_ids_E, rounds, guesses, **model
        )
        tokens_BRN, counts_BR = np.asarray(found.tokens_BRN), np.asarray(found.counts_BR)
        if on_guesses is not None:
            on_guesses(Guesses(int(state.kept), int(state.guessed)))
        yield [
            [token for tokens, count in zip(row, counts, strict=True) for token in tokens[:count].tolist()]
            for row, counts in zip(tokens_BRN, counts_BR, strict=True)
        ]


def _longest(prompts: list[list[int]], limits: list[int]) -> int:
    """Tokens of the longest row when it is done."""
    return max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))


def stop_array(stop_ids: Sequence[int]) -> np.ndarray:
    """The ids as a decoding loop takes them: at least one, if need be one that no token has."""
    return np.array([*stop_ids] or [-1], np.int32)


def _cut(token_ids: list[int], stop_ids: Collection[int], limit: int) -> Chunk:
    """A row's tokens up to its end, which is a token that stops it or the number of them that were left."""
    kept = token_ids[:limit]
    end = next((place for place, token in enumerate(kept) if token in stop_ids), None)
    if end is not None:
        return Chunk(kept[:end], "stop")
    return Chunk(kept, "length" if limit <= len(token_ids) else None)


def _bucket(length: int) -> int:
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
