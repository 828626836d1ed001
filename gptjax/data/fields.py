"""The fields of a record: which of them hold something, which were read, and the texts and messages in them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptjax.data.formats import SURROGATE
from gptjax.errors import UserError, at
from gptjax.text.chat import Message

_ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
_ROLE_OF |= {"system": "system", "developer": "system"}


class Fields(Mapping[str, Any]):
    """The fields of a record that hold something, and which of them were read."""

    def __init__(self, values: Mapping[str, Any], within: str = "", used: set[str] | None = None):
        """
        Args:
            within: what stands before the names of the fields: where they lie in the record.
            used: the names that were read in the record so far.
        """
        self._values = {name: value for name, value in values.items() if value is not None}
        self._within, self._used = within, set() if used is None else used
        self._inner: list[Fields] = []

    def __getitem__(self, name: str) -> Any:
        self._used.add(f"{self._within}{name}")
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def inner(self, values: Mapping[str, Any], where: str) -> "Fields":
        """An object within the record."""
        self._inner.append(Fields(values, f"{self._within}{where}.", self._used))
        return self._inner[-1]

    def unused(self) -> set[str]:
        """The names of those that nobody has read."""
        names = {f"{self._within}{name}" for name in self._values}
        return (names - self._used).union(*(fields.unused() for fields in self._inner))


def first(names: Sequence[str], values: Fields) -> str | None:
    """The first of these names that a record has."""
    return next((name for name in names if name in values), None)


def messages_of(values: Fields, name: str) -> tuple[Message, ...]:
    """The messages of a field; an object is one message.

    Raises:
        UserError: they are none, or are by somebody unknown, or hold something else than text.
    """
    listed = [values[name]] if isinstance(values[name], Mapping) else values[name]
    if not isinstance(listed, list) or not listed:
        raise UserError(f"field {name} is {type(listed).__name__}, not a list of messages, or has none")
    messages = []
    for number, value in enumerate(listed, start=1):
        if not isinstance(value, Mapping):
            raise UserError(f"message {number} of {name} is {type(value).__name__}, not an object")
        with at(f"message {number} of {name}"):
            messages.append(_message(values.inner(value, name)))
    return tuple(messages)


def _message(value: Fields) -> Message:
    by = first(("role", "from"), value)
    said_by = value[by] if by else None
    if not isinstance(said_by, str) or said_by not in _ROLE_OF:
        raise UserError(f"it is by {said_by!r}; known are {', '.join(_ROLE_OF)}")
    role, learned = _ROLE_OF[said_by], True
    if role == "assistant" and (flag := first(("weight", "train"), value)):
        if value[flag] not in (0, 1):
            raise UserError(f"its {flag} is {value[flag]!r}, but what is said is learned or not: 0 or 1")
        learned = bool(value[flag])
    return Message(role, text_of(value, "content" if "content" in value else "value"), learned)


def text_of(values: Fields, name: Any) -> str:
    """A field's text; of parts, as interfaces of servers have them, all the text.

    Raises:
        UserError: it has none, or half a character.
    """
    value = values.get(name)
    if isinstance(value, list) and value:
        others = [part for part in value if not (isinstance(part, Mapping) and isinstance(part.get("text"), str))]
        if others:
            kind = others[0].get("type") if isinstance(others[0], Mapping) else type(others[0]).__name__
            raise UserError(f"field {name} has a part of type {kind}, not a text")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise UserError(f"field {name} is {'missing' if value is None else type(value).__name__}, not a text")
    if SURROGATE.search(value):
        raise UserError(f"field {name} holds half a surrogate pair, which is no text")
    return value
