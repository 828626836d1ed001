"""Checks of a configuration's values, each a `UserError` that names the field as the user writes it."""

import difflib
import functools
import math
import types
import typing
from typing import Any

from gptjax.errors import UserError

MAX_INT = 2**31 - 1
"""Seeds and counts that a device sees are 32-bit integers."""


def require(condition: bool, message: str) -> None:
    """
    Raises:
        UserError: with this message, where the condition does not hold.
    """
    if not condition:
        raise UserError(message)


def require_range(prefix: str, values: Any, low: float, high: float, *names: str) -> None:
    """Check that these attributes of `values` lie between the bounds, or are None. NaN does not.

    Raises:
        UserError: one does not; the message names it with the prefix, as the user writes it.
    """
    for name in names:
        value = getattr(values, name)
        if value is not None and not low <= value <= high:
            bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"{prefix}{name} is {value}, but must be {bound}")


def require_types(prefix: str, values: Any) -> None:
    """Check every field of a dataclass against its annotation: a configuration file is Python, which does not.

    Raises:
        UserError: a value is of another type, or none of those a `Literal` lists.
    """
    for name, kind in _type_hints(type(values)).items():
        value = getattr(values, name)
        if not _fits(value, kind):
            choices = [choice for choice in _literals(kind) if isinstance(choice, str)]
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            expected = f"one of {', '.join(choices)}" if choices else f"of type {getattr(kind, '__name__', kind)}"
            raise UserError(f"{prefix}{name} is {value!r}, but must be {expected}{hint}")


_type_hints = functools.cache(typing.get_type_hints)


def _fits(value: Any, kind: Any) -> bool:
    match typing.get_origin(kind):
        case typing.Literal:
            return value in typing.get_args(kind)
        case types.UnionType | typing.Union:
            return any(_fits(value, option) for option in typing.get_args(kind))
        case origin if origin is tuple:
            return isinstance(value, tuple) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _literals(kind: Any) -> list[Any]:
    """The values that a `Literal` anywhere inside an annotation lists."""
    inner = [option for part in typing.get_args(kind) for option in _literals(part)]
    return list(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else inner
