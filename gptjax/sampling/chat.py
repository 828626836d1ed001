"""Answers to conversations, at once or as a stream."""

from collections.abc import Iterator, Sequence

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.gpt import Params
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.sampling.detokenize import TextStream
from gptjax.sampling.generate import DEFAULT_SAMPLING, STREAM_CHUNK_TOKENS, pieces, whole_texts
from gptjax.sampling.rows import CHUNK_TOKENS, DEFAULT_DECODING, generate_tokens
from gptjax.text.chat import ChatFormat, Message
from gptjax.text.tokenizer import Tokenizer


def chat(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    layout: ChatFormat,
    conversations: Sequence[Sequence[Message]],
    sampling: SamplingConfig = DEFAULT_SAMPLING,
    decoding: DecodingConfig = DEFAULT_DECODING,
) -> list[str]:
    """The assistant's next words in each conversation, all in one batch.

    Raises:
        UserError: a conversation does not end with a user's message, or leaves no room in the context.
    """
    prompts = [layout.prompt(messages) for messages in conversations]
    rows = [TextStream(tokenizer.token_bytes(), sampling.stop) for _ in prompts]
    chunks = generate_tokens(config, params, prompts, sampling, layout.stop_ids, CHUNK_TOKENS, decoding=decoding)
    return whole_texts(chunks, rows)


def stream_chat(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    layout: ChatFormat,
    messages: Sequence[Message],
    sampling: SamplingConfig = DEFAULT_SAMPLING,
    decoding: DecodingConfig = DEFAULT_DECODING,
) -> Iterator[str]:
    """The assistant's next words, in pieces of whole characters.

    Raises:
        UserError: as `chat`, and at the call.
    """
    row = TextStream(tokenizer.token_bytes(), sampling.stop)
    prompt = layout.prompt(messages)
    chunks = generate_tokens(
        config, params, [prompt], sampling, layout.stop_ids, STREAM_CHUNK_TOKENS, decoding=decoding
    )
    return pieces(chunks, row)


def fit_to_context(
    layout: ChatFormat, messages: Sequence[Message], context_length: int, room: int
) -> tuple[list[Message], int]:
    """The conversation without its oldest turns, if it leaves less than `room` tokens for an answer.

    A system message stays, and so does the user's last one.

    Returns:
        The conversation, and the messages that were left out.

    Raises:
        UserError: what stays is too long.
    """
    room = min(room, context_length // 2)
    system = [m for m in messages[:1] if m.role == "system"]
    turns = list(messages[len(system) :])
    for dropped in range(0, len(turns), 2):  # an answer goes with its question
        kept = [*system, *turns[dropped:]]
        if len(layout.prompt(kept)) + room <= context_length or dropped == len(turns) - 1:
            break
    length = len(layout.prompt(kept))
    if length >= context_length:
        raise UserError(f"the last message takes {length} tokens of a context of {context_length}; write a shorter one")
    return kept, dropped
