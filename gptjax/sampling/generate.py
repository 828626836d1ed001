"""Text from a prompt, at once or as a stream.

Shape suffixes: B batch, V padded vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.gpt import Params
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.sampling.detokenize import FinishReason, TextStream
from gptjax.sampling.rows import CHUNK_TOKENS, DEFAULT_DECODING, Chunk, Guesses, generate_tokens

STREAM_CHUNK_TOKENS = 8
"""Tokens drawn between two looks, where someone is reading along."""
DEFAULT_SAMPLING = SamplingConfig()


class Tokenizer(Protocol):
    """What generation asks of a tokenizer."""

    vocab_size: int
    stop_ids: tuple[int, ...]
    opening: tuple[int, ...]
    end_of_text_id: int | None

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
    """New tokens only, without the one that ends the text; those of a stop string are among them. The first one begins
    with the prompt's last space, if it ends in one."""
    finish_reason: FinishReason
    """stop: a token that ends texts, or a stop string; length: max_tokens or the end of the context."""


def generate(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig = DEFAULT_SAMPLING,
    decoding: DecodingConfig = DEFAULT_DECODING,
    draft: tuple[ModelConfig, Params] | None = None,
    on_guesses: Callable[[Guesses], object] | None = None,
) -> list[Completion]:
    """Continue all prompts in one batch. Repeat a prompt to get several samples of it.

    Before each stands what the tokenizer puts there (`opening`); an empty one that has nothing starts from the token
    between documents.

    Args:
        draft: as `generate_tokens` takes it, and `on_guesses`.

    Raises:
        UserError: a prompt leaves no room in the context, the tokenizer loses some of it, or model, tokenizer and
            sampling do not fit.
    """
    chunks, rows = _start_texts(config, params, tokenizer, prompts, sampling, decoding, draft, CHUNK_TOKENS, on_guesses)
    texts = whole_texts(chunks, rows)
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
    draft: tuple[ModelConfig, Params] | None = None,
) -> Iterator[str]:
    """Continue one prompt in pieces of whole characters, which joined are the text that `generate` returns.

    Raises:
        UserError: as `generate` does, and at the call, not at the first piece.
    """
    chunks, (row,) = _start_texts(config, params, tokenizer, [prompt], sampling, decoding, draft, STREAM_CHUNK_TOKENS)
    return pieces(chunks, row)


def whole_texts(chunks: Iterator[list[Chunk]], rows: Sequence[TextStream]) -> list[str]:
    """The text of each row, when all have ended."""
    texts = [""] * len(rows)
    for chunk in chunks:
        texts = [text + row.push(*tokens) for text, row, tokens in zip(texts, rows, chunk, strict=True)]
        if all(row.finish_reason for row in rows):
            break
    return texts


def pieces(chunks: Iterator[list[Chunk]], row: TextStream) -> Iterator[str]:
    """The text of the only row, as it becomes certain."""
    for (tokens,) in chunks:
        if piece := row.push(*tokens):
            yield piece
        if row.finish_reason:
            return


def _start_texts(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    decoding: DecodingConfig,
    draft: tuple[ModelConfig, Params] | None,
    chunk_tokens: int,
    on_guesses: Callable[[Guesses], object] | None = None,
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
    between = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    started = [[*tokenizer.opening, *ids] or between for ids in encoded]
    chunks = generate_tokens(
        *(config, params, started, sampling, tokenizer.stop_ids, chunk_tokens),
        *(first_BV, decoding, draft, on_guesses),
    )
    return chunks, [TextStream(token_bytes, sampling.stop, space) for space in given]
