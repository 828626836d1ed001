"""What processes tell each other on the host, in rounds in which all take part; the devices have no share in it.

It goes through the key-value store of JAX's distributed service, which process 0 keeps. JAX has no public face for it:
what is private stands here.
"""

import contextlib
import json
import time
from typing import Any

import jax
from jax._src import distributed as jax_distributed

from gptjax.errors import UserError

WAIT_SECONDS = 5.0
"""How long to wait before looking who has left; in between Python hears signals, too."""


ENDING_SECONDS = 1.0
"""How long a process may take from its last message to its end: JAX aborts one that outlives process 0."""


class PeerFailed(Exception):
    """Another process has ended, by no error of its user's."""


class Messages:
    """Rounds of messages: process 0 collects those of all, and gives them to all.

    A process that leaves says so in place of its next message, so that whoever waits for that one hears the reason.
    """

    def __init__(self):
        self._round = 0

    def gather(self, text: str, process: int, num_processes: int) -> list[str]:
        """The messages of all processes, in the order of their ids; it waits as long as it takes.

        Raises:
            UserError, PeerFailed: a process has left, for this reason.
        """
        now, self._round = self._round, self._round + 1
        found = {"texts": [text]}
        if process:
            _put(now, process, found)
            found = _take(now, 0)
        else:
            for other in range(1, num_processes):
                message = _take(now, other)
                if "left" in message:
                    found = message
                    break
                found["texts"] += message["texts"]
            else:
                _client().key_value_delete(_key(now - 1))  # all have come to this round, and so have read the last
            _put(now, 0, found)
        if "left" in found:
            raise (UserError if found["by_user"] else PeerFailed)(found["left"])
        return found["texts"]

    def leave(self, process: int, error: BaseException) -> None:
        """Tell those who wait for this process, or will, that it has left, and why."""
        by_user = isinstance(error, UserError)
        reason = str(error) if by_user else f"{type(error).__name__}: {' '.join(str(error).split())}"
        message = {"left": f"process {process}{'' if by_user else ' failed'}: {reason}", "by_user": by_user}
        for place in (self._round - 1, self._round):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # said already, or nobody is there to hear it
                _put(place, process, message)

    def part(self, process: int, num_processes: int, seconds: float) -> None:
        """Call this just before the end. Process 0, which keeps the messages, waits so long for the others."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if process:
                return _put("parted", process, {})
            deadline = time.monotonic() + seconds
            for other in range(1, num_processes):
                left = max(1, int(1000 * (deadline - time.monotonic())))
                _client().blocking_key_value_get(_key("parted", other), left)
            time.sleep(ENDING_SECONDS)


def _take(now: int, process: int) -> dict[str, Any]:
    """The message of a process; while there is none, that of any which has left."""
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(_key(now, process), int(1000 * WAIT_SECONDS)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise PeerFailed(f"process 0 cannot be reached: {str(error).splitlines()[0]}") from None
        if process:  # process 0 waits for all, the others for what it says
            for _, raw in _client().key_value_dir_get(_key(now)):
                if "left" in (message := json.loads(raw)):
                    return message


def _put(place: int | str, process: int, message: dict[str, Any]) -> None:
    _client().key_value_set(_key(place, process), json.dumps(message))


def _key(*place: int | str) -> str:
    return "/".join(["gptjax", *map(str, place)])


def _client() -> Any:
    return jax_distributed.global_state.client
