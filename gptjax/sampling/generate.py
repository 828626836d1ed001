"""Text from a prompt, at once or as a stream: the host's side of decoding.

Shape suffixes: B batch, T prompt tokens, V padded vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

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
    decode_n_tokens,
    decoding_params,
    prefill,
    row_keys,
    start_decoding,
    with_slots,
)
from gptjax.sampling.detokenize import FinishReason, TextStream
from gptjax.sampling.filters import filter_settings
from gptjax.sampling.memory import require_cache_fits

SMALLEST_BUCKET = 16
"""Prompts and caches have a power of two of at least this many tokens, so that few lengths are compiled."""
SMALLEST_GROWING = 128
"""Fewest slots of a cache that grows."""
CHUNK_TOKENS = 32
"""Tokens drawn between two looks at whether all rows are finished."""
STREAM_CHUNK_TOKENS = 8
"""The same where someone is reading along."""
DEFAULT_SAMPLING, DEFAULT_DECODING = SamplingConfig(), DecodingConfig()


class Tokenizer(Protocol):
    """What generation asks of a tokenizer."""

    vocab_size: int
    end_of_text_id: int

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self) -> list[bytes]: ...

    def require_lossless(self, text: str, ids: Sequence[int]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued with."""

    prompt: str
    text: str
    """New text only, without the stop string."""
    token_ids: list[int]
    """New tokens only, without the end-of-text token; those of a stop string are among them. The first one begins
    with the prompt's last space, if it ends in one."""
    finish_reason: FinishReason
    """stop: the end-of-text token or a stop string; length: max_tokens or the end of the context."""


class Chunk(NamedTuple):
    """Some further tokens of one row."""

    token_ids: list[int]
    finish_reason: FinishReason | None
    """Why the row has ended, or None where more may follow."""


def generate(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig = DEFAULT_SAMPLING,
    decoding: DecodingConfig = DEFAULT_DECODING,
) -> list[Completion]:
    """Continue all prompts in one batch. Repeat a prompt to get several samples of it.

    Raises:
        UserError: a prompt leaves no room in the context, the tokenizer loses some of it, or model, tokenizer and
            sampling do not fit.
    """
    chunks, rows = _start_texts(config, params, tokenizer, prompts, sampling, decoding, CHUNK_TOKENS)
    texts = [""] * len(rows)
    for chunk in chunks:
        texts = [text + row.push(*tokens) for text, row, tokens in zip(texts, rows, chunk, strict=True)]
        if all(row.finish_reason for row in rows):
            break
    return [
        Completion(prompt, text, row.token_ids, row.finish_reason)
        for prompt, text, row in zip(prompts, texts, rows, strict=True)
    ]


def stream(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: SamplingConfig = DEFAULT_SAMPLING,
    decoding: DecodingConfig = DEFAULT_DECODING,
) -> Iterator[str]:
    """Continue one prompt in pieces of whole characters, which joined are the text that `generate` returns.

    Raises:
        UserError: as `generate` does, and at the call, not at the first piece.
    """
    chunks, (row,) = _start_texts(config, params, tokenizer, [prompt], sampling, decoding, STREAM_CHUNK_TOKENS)

    def pieces() -> Iterator[str]:
        for (tokens,) in chunks:
            if piece := row.push(*tokens):
                yield piece
            if row.finish_reason:
                return

    return pieces()


def _start_texts(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    decoding: DecodingConfig,
    chunk_tokens: int,
) -> tuple[Iterator[list[Chunk]], list[TextStream]]:
    """The chunks to come, and for each prompt the text to put them into."""
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size is {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    token_bytes = tokenizer.token_bytes()
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        tokenizer.require_lossless(prompt, ids)
    # Byte-level BPE hangs a space on the word after it, so that the model has hardly seen a word after a lone
    # space. A prompt that ends in one is continued, from before it, by a token that begins with it.
    begins_V = np.zeros(config.padded_vocab_size, bool)
    begins_V[: len(token_bytes)] = [raw.startswith(b" ") for raw in token_bytes]
    given = [b" " if ids and token_bytes[ids[-1]] == b" " and begins_V.sum() > 1 else b"" for ids in encoded]
    encoded = [ids[: len(ids) - len(space)] for ids, space in zip(encoded, given, strict=True)]
    first_BV = np.stack([begins_V if space else np.ones_like(begins_V) for space in given]) if any(given) else None
    chunks = generate_tokens(
        config, params, encoded, sampling, tokenizer.end_of_text_id, chunk_tokens, first_BV, decoding
    )
    return chunks, [TextStream(token_bytes, sampling.stop, space) for space in given]


def generate_tokens(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    end_of_text_id: int,
    chunk_tokens: int = CHUNK_TOKENS,
    first_BV: np.ndarray | None = None,
    decoding: DecodingConfig = DEFAULT_DECODING,
) -> Iterator[list[Chunk]]:
    """Continue prompts of token ids, yielding each time a `Chunk` for every row, until all rows are finished.

    An empty prompt starts from the end-of-text token, which stands between documents. Where a prompt and
    `max_tokens` together exceed the context, the row ends with the context (`length`). Stop strings are for
    the caller to see, who may leave the iterator at any time. The chunk's size does not change what is drawn.

    `first_BV` says which tokens a row may begin with; None: any.

    Under a mesh the rows are filled up to a number that its batch axes divide.

    Raises:
        UserError: at the call: a prompt leaves no room for a token in the context, top_k exceeds the vocabulary, or
            the cache does not fit.
    """
    if sampling.top_k > config.vocab_size:
        raise UserError(f"top_k is {sampling.top_k}, but the vocabulary has {config.vocab_size} tokens; 0 is off")
    prompts = [list(prompt) or [end_of_text_id] for prompt in prompts]
    for prompt in prompts:
        if len(prompt) >= config.context_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the context {config.context_length}, of which one "
                f"must be left to write; the longest prompt that works has {config.context_length - 1}"
            )
    limits = [min(sampling.max_tokens, config.context_length - len(prompt)) for prompt in prompts]
    if not prompts:
        return iter(())
    require_cache_fits(config, decoding, len(prompts), _bucket(_longest(prompts, limits)))
    return _generate(config, params, prompts, limits, sampling, end_of_text_id, chunk_tokens, first_BV, decoding)


def _generate(
    config: ModelConfig,
    params: Params,
    prompts: list[list[int]],
    limits: list[int],
    sampling: SamplingConfig,
    end_of_text_id: int,
    chunk_tokens: int,
    first_BV: np.ndarray | None,
    decoding: DecodingConfig,
) -> Iterator[list[Chunk]]:
    params = decoding_params(config, params)
    settings = filter_settings(sampling)
    chunk_tokens = min(chunk_tokens, 1 << (max(limits) - 1).bit_length())
    longest = max(map(len, prompts))
    num_chunks = math.ceil(max(limits) / chunk_tokens)
    most_slots = _bucket(_longest(prompts, limits))
    # What is read for each token should not be mostly room for later ones. But where weights are most of what is read,
    # it is not worth the compilation of another size.
    grows = 2 * cache_elements(config, len(prompts), most_slots) > parameter_counts(config)["total"]
    slots = min(most_slots, max(SMALLEST_GROWING, _bucket(longest + chunk_tokens))) if grows else most_slots
    state = _start(config, params, prompts, limits, slots, sampling.seed, first_BV, decoding)
    chunks = [Chunk([], None)] * len(prompts)
    for index in range(num_chunks):
        needed = longest + (index + 1) * chunk_tokens
        if slots < min(needed, most_slots):
            slots = min(_bucket(needed), most_slots)
            state = with_slots(config, state, slots)
        drawn, state = decode_n_tokens(config, params, state, settings, end_of_text_id, chunk_tokens)
        rows = np.asarray(drawn.tokens_BN)[: len(prompts)].tolist()
        chunks = [
            Chunk([], last.finish_reason)
            if last.finish_reason
            else _cut(row, end_of_text_id, limit - index * chunk_tokens)
            for row, last, limit in zip(rows, chunks, limits, strict=True)
        ]
        yield chunks
        if all(chunk.finish_reason for chunk in chunks):
            return


def _start(
    config: ModelConfig,
    params: Params,
    prompts: list[list[int]],
    limits: list[int],
    num_slots: int,
    seed: int,
    first_BV: np.ndarray | None,
    decoding: DecodingConfig,
) -> DecodeState:
    """Prefill the prompts, each once however often it is repeated, into a cache of `num_slots` tokens a row."""
    shards = sharding.num_shards("batch")
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    rows = [distinct.index(tuple(prompt)) for prompt in prompts]
    prompts, limits, rows, distinct = (x + x[-1:] * (-len(x) % shards) for x in (prompts, limits, rows, distinct))
    T = min(_bucket(max(map(len, distinct))), config.context_length)
    tokens_BT = np.zeros((len(distinct), T), np.int32)
    for row, prompt in enumerate(distinct):
        tokens_BT[row, : len(prompt)] = prompt
    lengths_B = np.asarray([len(prompt) for prompt in distinct], np.int32)
    prefilled = prefill(
        config,
        params,
        jnp.asarray(tokens_BT),
        jnp.asarray(lengths_B),
        num_slots,
        chunk_tokens=decoding.prefill_chunk,
        in_int8=decoding.kv_cache == "int8",
    )
    ends_B = np.asarray([len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)], np.int32)
    seen_BV = np.zeros((len(prompts), config.padded_vocab_size), bool)
    for row, prompt in enumerate(prompts):
        seen_BV[row, prompt] = True
    state = start_decoding(
        prefilled, jnp.asarray(rows), jnp.asarray(ends_B), jnp.asarray(seen_BV), row_keys(seed, len(prompts))
    )
    if first_BV is None:
        return state
    filled = np.concatenate([first_BV, np.repeat(first_BV[-1:], len(prompts) - len(first_BV), axis=0)])
    allowed_BV = sharding.reshard(jnp.asarray(filled), "batch", "features")
    return state._replace(logits_BV=jnp.where(allowed_BV, state.logits_BV, -jnp.inf))


def _longest(prompts: list[list[int]], limits: list[int]) -> int:
    """Tokens of the longest row when it is done."""
    return max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))


def _cut(token_ids: list[int], end_of_text_id: int, limit: int) -> Chunk:
    """A row's tokens up to its end, which is the end-of-text token or a number of tokens."""
    kept = token_ids[:limit]
    if end_of_text_id in kept:
        return Chunk(kept[: kept.index(end_of_text_id)], "stop")
    return Chunk(kept, "length" if limit <= len(token_ids) else None)


def _bucket(length: int) -> int:
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
