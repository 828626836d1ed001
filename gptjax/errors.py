"""The one exception that entry points turn into a line on stderr and exit status 2."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something that the user gave does not fit, and the user can mend it.

    The message is one line: what, the values, and the nearest thing that works. It is no ValueError,
    so that no library that catches those (tyro does) can dress it up.
    """


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Put a place before the message of a `UserError` raised in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
