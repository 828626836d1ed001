"""Conversations as token ids, with what of them is learned.

What a user types never becomes a control token: contents are encoded as text, and only the format's own words, which
stand between them, may be control tokens.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from gptjax.errors import UserError
from gptjax.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
TEMPLATE_FILE = "chat_template.jinja"
"""Where a run, as a Hugging Face model, keeps its template: a run that has one can be talked to."""
START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The default, as a template that other programs read."""


class Message(NamedTuple):
    """What one side says."""

    role: Role
    content: str


class Encoded(NamedTuple):
    """A conversation as it is trained on."""

    token_ids: list[int]
    learned: list[bool]
    """Of each token whether the assistant writes it: its words, and the token that ends them."""


class ChatFormat(Protocol):
    """How conversations are laid out."""

    template: str
    """In Jinja, for `chat_template.jinja`."""
    end_id: int
    """The token with which the assistant ends what it says."""

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """A whole conversation.

        Raises:
            UserError: as `check`, or the tokenizer cannot encode a text.
        """
        ...

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation up to where the assistant's next words begin.

        Raises:
            UserError: as `encode`.
        """
        ...


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


class ChatML:
    """`<|im_start|>ROLE\\nCONTENT<|im_end|>\\n` for each message (OpenAI's ChatML)."""

    template = CHATML

    def __init__(self, tokenizer: Tokenizer):
        """
        Raises:
            UserError: the tokenizer has no such tokens.
        """
        missing = [name for name in (START, END) if name not in tokenizer.special_token_ids]
        if missing:
            raise UserError(
                f"the tokenizer has no special token {missing[0]}, which ChatML needs; give --data.chat-template FILE, "
                f"that of the model's own family; its special tokens are {', '.join(tokenizer.special_token_ids)}"
            )
        self._tokenizer = tokenizer
        self._start_id, self.end_id = (tokenizer.special_token_ids[name] for name in (START, END))
        self._break = tokenizer.encode("\n")

    def encode(self, messages: Sequence[Message]) -> Encoded:
        check(messages, answered=True)
        return self._laid_out(messages)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        check(messages, answered=False)
        return [*self._laid_out(messages).token_ids, *self._opening("assistant")]

    def _opening(self, role: str) -> list[int]:
        return [self._start_id, *self._tokenizer.encode(f"{role}\n")]

    def _laid_out(self, messages: Sequence[Message]) -> Encoded:
        ids: list[int] = []
        learned: list[bool] = []
        for role, content in messages:
            opening, text = self._opening(role), [*_encode(self._tokenizer, content), self.end_id]
            ids += [*opening, *text, *self._break]
            learned += [False] * len(opening) + [role == "assistant"] * len(text) + [False] * len(self._break)
        return Encoded(ids, learned)


class Template:
    """A Hugging Face chat template: Jinja, run in its immutable sandbox.

    It is rendered with marks in place of what people say, so that its own words are known from theirs, and once more
    with the words: where the two do not fit together, the template does more with them than to place them, and is
    refused.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, source: str = "the chat template"):
        """
        Raises:
            UserError: jinja2 is missing, the template is broken, or ends answers with no control token.
        """
        self.template, self._tokenizer, self._source = template, tokenizer, source
        self._render = _compiled(template, source, _named_tokens(tokenizer))
        names = sorted(tokenizer.special_token_ids, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        ask, answer = Message("user", "a"), Message("assistant", "b")
        after = self._pieces([ask, answer], False)[-1][0]
        ends = [i for i in self._words(after) if i in tokenizer.special_token_ids.values()]
        if not ends:
            raise UserError(f"{source} ends answers with no special token of the tokenizer, so that none would end")
        self.end_id = ends[0]

    def encode(self, messages: Sequence[Message]) -> Encoded:
        check(messages, answered=True)
        ids: list[int] = []
        learned: list[bool] = []
        answering = False
        for words, message, text in self._pieces(messages, False):
            own = self._words(words)
            # The token that ends an answer is learned with it; what the template writes after that is not.
            ended = own.index(self.end_id) + 1 if answering and self.end_id in own else 0
            content = [] if message is None else _encode(self._tokenizer, text)
            answering = message is not None and message.role == "assistant"
            ids += [*own, *content]
            learned += [True] * ended + [False] * (len(own) - ended) + [answering] * len(content)
        return Encoded(ids, learned)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        check(messages, answered=False)
        pieces = self._pieces(messages, True)
        contents = [[] if message is None else _encode(self._tokenizer, text) for _, message, text in pieces]
        return [i for (words, *_), text in zip(pieces, contents, strict=True) for i in (*self._words(words), *text)]

    def _pieces(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[tuple[str, Message | None, str]]:
        """The template's words before each message, the message, and what stands of it; last the words at the end."""
        rendered = self._rendered([m.content for m in messages], messages, add_generation_prompt)
        marks = [_mark(number, rendered) for number in range(len(messages))]
        skeleton = self._rendered(marks, messages, add_generation_prompt)
        places = [skeleton.find(mark) for mark in marks]
        whole = re.split("|".join(map(re.escape, marks)), skeleton)
        if -1 in places or places != sorted(places) or len(whole) != len(messages) + 1:
            raise UserError(f"{self._source} does not write every message once and in order")
        for contents in ([m.content for m in messages], [m.content.strip() for m in messages]):
            if rendered == "".join(w + c for w, c in zip(whole, [*contents, ""], strict=True)):
                return list(zip(whole, [*messages, None], [*contents, ""], strict=True))
        raise UserError(f"{self._source} changes what is said, beyond stripping it; only templates that place it work")

    def _rendered(self, contents: Sequence[str], messages: Sequence[Message], add_generation_prompt: bool) -> str:
        filled = [{"role": m.role, "content": c} for m, c in zip(messages, contents, strict=True)]
        return self._render(filled, add_generation_prompt)

    def _words(self, words: str) -> list[int]:
        """The template's own words, of which those that spell control tokens are such."""
        parts = [words] if self._control is None else self._control.split(words)
        known = self._tokenizer.special_token_ids
        return [i for part in parts if part for i in ([known[part]] if part in known else self._tokenizer.encode(part))]


def chat_format(tokenizer: Tokenizer, template: str = "", source: str = "the chat template") -> ChatFormat:
    """The format of a template's text; without one ChatML.

    Raises:
        UserError: as the two formats.
    """
    return Template(tokenizer, template, source) if template.strip() not in ("", CHATML.strip()) else ChatML(tokenizer)


def template_file(folder: Path) -> Path | None:
    """The file of a run, or of a Hugging Face directory, that has its template; None: it has not learned to talk."""
    if (folder / TEMPLATE_FILE).is_file():
        return folder / TEMPLATE_FILE
    path = folder / "tokenizer_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return path if isinstance(values, dict) and isinstance(values.get("chat_template"), str) else None


def read_template(path: Path) -> str:
    """A template's text, from a Jinja file or from the `chat_template` of a `tokenizer_config.json`.

    Raises:
        UserError: the file is missing, or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if path.suffix != ".json":
        return text
    try:
        template = json.loads(text)["chat_template"]
        return template if isinstance(template, str) else {t["name"]: t["template"] for t in template}["default"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"data.chat_template {path} has no text under chat_template") from None


def _encode(tokenizer: Tokenizer, content: str) -> list[int]:
    ids = tokenizer.encode(content)
    tokenizer.require_lossless(content, ids)
    return ids


def _mark(number: int, text: str) -> str:
    """A word that is not in the text."""
    return next(mark for n in range(len(text) + 1) if (mark := f"\ue000{n}.{number}\ue001") not in text)


BEGINNINGS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<｜begin▁of▁sentence｜>")
"""What tokenizers call the token before a text, where they have one."""


def _named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that templates call by their part."""
    known = tokenizer.special_token_ids
    end = next(name for name, i in known.items() if i == tokenizer.end_of_text_id)
    return {"bos_token": next((name for name in BEGINNINGS if name in known), ""), "eos_token": end}


def _compiled(template: str, source: str, tokens: Mapping[str, str]) -> Callable[[list[Mapping[str, str]], bool], str]:
    try:
        import jinja2
        import jinja2.sandbox
    except ModuleNotFoundError:
        raise UserError('chat templates need jinja2: pip install "gptjax[chat]"') from None

    def refuse(reason: str) -> None:
        raise UserError(f"{source}: {reason}")

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= tokens | {"raise_exception": refuse, "strftime_now": lambda _: ""}
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)

    def render(messages: list[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        try:
            compiled = environment.from_string(template)
            return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise UserError(f"{source} cannot be rendered: {error}") from None

    return render
