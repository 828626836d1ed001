"""The one exception that entry points turn into a line on stderr and exit status 2."""


class UserError(Exception):
    """Something that the user gave does not fit, and the user can mend it.

    The message is one line: what, the values, and the nearest thing that works. It is no ValueError,
    so that no library that catches those (tyro does) can dress it up.
    """
