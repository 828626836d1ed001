"""What stages that talk share: the layout of conversations, and an answer as the sample of a run."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.interop.places import template_of
from gptjax.model.gpt import Params
from gptjax.sampling.chat import chat
from gptjax.stages import callbacks
from gptjax.text.chat import ChatFormat, Message, chat_format, read_format
from gptjax.text.templates import TEMPLATE_FILE
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.state import TrainState


def layout(config: Config, tokenizer: Tokenizer) -> ChatFormat:
    """How conversations are laid out: by `data.chat_template`, else as the run does that this one starts from, or was.

    Raises:
        UserError: as `chat_format`.
    """
    today = config.data.chat_date and datetime.date.fromisoformat(config.data.chat_date)
    if config.data.chat_template:
        return read_format(tokenizer, Path(config.data.chat_template), today)
    for place in (config.run_dir, config.model.init_from):
        found = template_of(Path(place)) if place else None
        if found is not None:
            return chat_format(tokenizer, *found, today)
    return chat_format(tokenizer)


def layout_of_run(directory: Path, tokenizer: Tokenizer) -> ChatFormat:
    """That of a run that can be talked to.

    Raises:
        UserError: it has learned no conversations.
    """
    found = template_of(directory)
    if found is None:
        raise UserError(
            f"{directory} has no {TEMPLATE_FILE}: it has not learned to talk; tune it with python train.py "
            f"configs/sft.py --model.init-from {directory}, or give --prompt TEXT to have a text continued"
        )
    return chat_format(tokenizer, *found)


def check_prompt(config: Config, form: ChatFormat) -> list[Message]:
    """`training.sample_prompt` as the beginning of a conversation.

    Raises:
        UserError: it leaves no room in the context.
    """
    messages = [Message("user", config.training.sample_prompt)]
    length = len(form.prompt(messages))
    if length >= config.model.context_length:
        raise UserError(
            f"training.sample_prompt takes {length} tokens with its layout, which leaves none of model.context_length "
            f"{config.model.context_length} to write"
        )
    return messages


def answerer(
    config: Config, tokenizer: Tokenizer, form: ChatFormat, conversations: Sequence[Sequence[Message]]
) -> Callable[[Params], str]:
    """What a sample shows: each prompt with the answer."""
    sampling, model = callbacks.sample_settings(config), callbacks.as_used(config.model)

    def write(params: Params) -> str:
        answers = chat(model, params, tokenizer, form, conversations, sampling)
        return "\n\n".join(
            f"{messages[-1].role}: {messages[-1].content}\nassistant: {answer}"
            for messages, answer in zip(conversations, answers, strict=True)
        )

    return write


def sampler(
    config: Config,
    directory: Path,
    tokenizer: Tokenizer,
    form: ChatFormat,
    whole: Callable[[Params], Params],
    log: Callable[[str], None],
) -> Callable:
    """The answer to `training.sample_prompt`, to `samples.md` and the console."""
    write = answerer(config, tokenizer, form, [check_prompt(config, form)])

    def of_state(state: TrainState) -> str:
        return write(whole(state.params))

    return callbacks.sampler(directory, of_state, log)
