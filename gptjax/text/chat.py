"""Conversations as token ids, with what of them is learned.

A row that is trained on is what sampling sees: the ids of the prompt, and after them what the model is to write. The
whole is tokenized as the template's own rendering is. What a user types never becomes a control token.
"""

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from gptjax.errors import UserError
from gptjax.text.templates import Render, compile_template, read_template
from gptjax.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The default, as a template that other programs read."""
END_OF_THOUGHT = "</think>"
"""Ends what a model writes before its answer: templates leave that out of earlier turns."""


class Message(NamedTuple):
    """What one side says."""

    role: Role
    content: str
    learned: bool = True
    """Of an assistant's message in training: whether it is learned, or only read."""


class Encoded(NamedTuple):
    """A conversation as it is trained on."""

    token_ids: list[int]
    learned: list[bool]
    """Of each token whether the assistant writes it: all from the prompt's end to the token that ends the answer."""


def check(messages: Sequence[Message], *, answered: bool) -> None:
    """That a conversation goes system (or not), user, assistant, user, assistant, ...

    Args:
        answered: whether the assistant has the last word, or the user.

    Raises:
        UserError: it does not, or an answer is empty.
    """
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise UserError("the conversation has no turns; it needs a user's first")
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise UserError(
                f"message {number + 1 + len(messages) - len(turns)} of the conversation is {message.role}'s, but "
                f"{expected}'s turn: roles alternate, after at most one system message"
            )
        if message.role == "assistant" and not message.content.strip():
            raise UserError(f"answer {number // 2 + 1} of the conversation is empty")
    last = turns[-1].role
    if answered and last != "assistant":
        raise UserError(f"the conversation ends with {last}'s message; it must end with an answer to be learned from")
    if not answered and last != "user":
        raise UserError(f"the conversation ends with {last}'s message; an answer is to a user's")


class ChatFormat:
    """How conversations are laid out: a template, and the tokenizer that reads what it writes."""

    def __init__(self, tokenizer: Tokenizer, template: str, render: Render, source: str):
        """
        Args:
            template: in Jinja, for `chat_template.jinja`.
            render: what the template does.
            source: what errors call it.

        Raises:
            UserError: the template does not write all messages, or ends answers with no control token.
        """
        self.template, self._tokenizer, self._render, self._source = template, tokenizer, render, source
        names = sorted(tokenizer.special_token_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        asked, answer = "\ue0001\ue001", "\ue0002\ue001"
        written = render([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], False)
        if [written.count(mark) for mark in (asked, answer)] != [1, 1] or written.find(asked) > written.find(answer):
            raise UserError(f"{source} does not write every message once and in order")
        self._closing = written.partition(answer)[2]
        ending = self._control.search(self._closing)
        if ending is None:
            raise UserError(f"{source} ends answers with no special token of the tokenizer, so that none would end")
        self.end_id = tokenizer.special_token_ids[ending[0]]
        """The token with which the assistant ends what it says."""
        self.stop_ids = tuple(dict.fromkeys((self.end_id, *tokenizer.stop_ids)))
        """All that end an answer: the template's, and what the model's own files name."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the assistant's next words begin.

        Raises:
            UserError: as `check`; the tokenizer cannot encode a text; or the template refuses or changes one.
        """
        check(messages, answered=False)
        said, guards = self._guarded(messages)
        return self._ids(self._written(said, True), guards)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """A whole conversation, of which the last answer is learned, and each before it that stands there as it would
        if it were the last.

        Raises:
            UserError: as `prompt`.
        """
        return self.rows(messages)[0]

    def rows(self, messages: Sequence[Message]) -> list[Encoded]:
        """`encode`, and for each answer that is not learned there a row that ends with it: some templates write earlier
        turns otherwise, without what was thought.

        Raises:
            UserError: as `prompt`.
        """
        check(messages, answered=True)
        said, guards = self._guarded(messages)
        ends = [number for number, message in enumerate(said, start=1) if message.role == "assistant"]
        turns = [self._turn(said[:end], guards) for end in ends]
        token_ids, _, _ = turns[-1]
        learned, others = [False] * len(token_ids), []
        for end, (ids, start, stop) in zip(ends, turns, strict=True):
            if not messages[end - 1].learned:
                continue
            if token_ids[:stop] == ids[:stop]:
                learned[start:stop] = [True] * (stop - start)
            else:
                others.append(Encoded(ids, [start <= i < stop for i in range(len(ids))]))
        return [Encoded(token_ids, learned), *others]

    def _turn(self, said: Sequence[Message], guards: str) -> tuple[list[int], int, int]:
        """The ids of a conversation, and where in them its last answer begins and ends."""
        before = self._written(said[:-1], True)
        answer = self._answer(before, said)
        prompt, ids = self._ids(before, guards), self._ids(before + answer, guards)
        if ids[: len(prompt)] != prompt:  # a token reaches over the prompt's end, which sampling never sees
            ids = [*prompt, *self._ids(answer, guards)]
        return ids, len(prompt), ids.index(self.end_id, len(prompt)) + 1

    def _answer(self, before: str, said: Sequence[Message]) -> str:
        """What follows a prompt: all that the template writes there."""
        whole, content = self._written(said, False), said[-1].content.strip()
        if whole.startswith(before):
            if "".join(content.split()) not in "".join(whole.split()):  # a thought that is left out here is not learned
                raise self._changed(content)
            return whole[len(before) :]
        # The prompt opens what a given answer does not have, such as a thought: the answer goes on from there.
        same = next(i for i, (a, b) in enumerate(zip(before, f"{whole}\0", strict=False)) if a != b)
        opened = before[same:].strip()
        return (content[len(opened) :].lstrip("\n") if content.startswith(opened) else content) + self._closing

    def _written(self, said: Sequence[Message], add_generation_prompt: bool) -> str:
        """What the template writes, if all that is said is in it, but for the thoughts of answers."""
        text = self._render([{"role": role, "content": content} for role, content, _ in said], add_generation_prompt)
        place = 0
        for role, content, _ in said:
            content = content.strip()
            if role == "assistant" and text.find(content, place) < 0:
                content = content.rpartition(END_OF_THOUGHT)[2].strip()
            found = text.find(content, place)
            if found < 0:
                raise self._changed(content)
            place = found + len(content)
        return text

    def _changed(self, content: str) -> UserError:
        return UserError(f"{self._source} changes what is said, beyond stripping it: {content[:40]!r}")

    def _guarded(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """The messages, each name of a control token in them between two characters that no message has; and these."""
        for message in messages:
            self._tokenizer.require_lossless(message.content, self._tokenizer.encode(message.content))
        if not any(self._control.search(message.content) for message in messages):
            return list(messages), ""
        there = set().union(*(message.content for message in messages))
        opened, closed = itertools.islice((c for c in map(chr, range(0xE000, 0xF900)) if c not in there), 2)
        return [
            message._replace(content=self._control.sub(lambda name: f"{opened}{name[0]}{closed}", message.content))
            for message in messages
        ], opened + closed

    def _ids(self, text: str, guards: str) -> list[int]:
        """Ids of what the template has written, of whose control tokens those between guards are text."""
        if not guards:
            return self._tokenizer.encode_rendering(text)
        ids, plain, place = [], "", 0
        for match in re.finditer(f"{guards[0]}(.*?){guards[1]}|({self._control.pattern})", text, re.DOTALL):
            plain, place = plain + text[place : match.start()] + (match[1] or ""), match.end()
            if match[2]:
                ids += [*self._tokenizer.encode(plain), self._tokenizer.special_token_ids[match[2]]]
                plain = ""
        return [*ids, *self._tokenizer.encode(plain + text[place:])]


def chat_format(
    tokenizer: Tokenizer,
    template: str = "",
    source: str = "the chat template",
    today: datetime.date | None = None,
) -> ChatFormat:
    """The format of a template's text; without one ChatML (OpenAI's), `<|im_start|>ROLE\\nCONTENT<|im_end|>\\n`.

    Args:
        source: what errors call the template.
        today: the date that a template is told; None: the clock's.

    Raises:
        UserError: as `ChatFormat` and `compile_template`; or the tokenizer has not the tokens of ChatML.
    """
    if template.strip() not in ("", CHATML.strip()):
        render = compile_template(template, source, tokenizer.named_tokens, today)
        return ChatFormat(tokenizer, template, render, source)
    missing = [name for name in (START, END) if name not in tokenizer.special_token_ids]
    if missing:
        raise UserError(
            f"the tokenizer has no special token {missing[0]}, which ChatML needs; give --data.chat-template FILE, "
            f"that of the model's own family; its special tokens are {', '.join(tokenizer.special_token_ids)}"
        )
    return ChatFormat(tokenizer, CHATML, _chatml, "ChatML")


def read_format(tokenizer: Tokenizer, path: Path, today: datetime.date | None = None) -> ChatFormat:
    """The format of a template's file.

    Raises:
        UserError: as `chat_format` and `read_template`.
    """
    return chat_format(tokenizer, read_template(path), str(path), today)


def _chatml(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    """`CHATML`, for which no Jinja is needed."""
    turns = [f"{START}{message['role']}\n{message['content']}{END}\n" for message in messages]
    return "".join(turns) + f"{START}assistant\n" * add_generation_prompt
