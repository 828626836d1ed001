"""Text out of tokens as they come: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence
from typing import Literal

FinishReason = Literal["stop", "length"]
"""stop: the end-of-text token or a stop string; length: max_tokens or the end of the context."""


class TextStream:
    """The text of one row, token by token.

    A token is any piece of UTF-8, so bytes wait until their character is whole (invalid ones become U+FFFD),
    and characters wait while they may be the beginning of a stop string.

    Attributes:
        token_ids: tokens taken so far; the last one is that which completed a stop string, if one did.
        finish_reason: why the text has ended, or None while it has not.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = (), given: bytes = b""):
        """Start a row's text.

        Args:
            token_bytes: what each token stands for.
            stop: strings that end the text.
            given: bytes that the first token repeats from the prompt, and which are no new text.
        """
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._token_bytes = token_bytes
        self._stop = stop
        self._given = given
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> str:
        """Take further tokens and return the text that has become certain.

        Args:
            token_ids: the next tokens of the row; a finished one takes no more.
            finish_reason: why these are its last, if they are.
        """
        pieces = []
        for token_id in token_ids:
            if self.finish_reason is not None:
                break
            self.token_ids.append(token_id)
            raw = self._token_bytes[token_id].removeprefix(self._given)
            self._given = b""
            pieces.append(self._take(self._decoder.decode(raw)))
        if self.finish_reason is None and finish_reason is not None:
            pieces.append(self._take(self._decoder.decode(b"", final=True)))
            pieces.append(self._held)
            self._held = ""
            self.finish_reason = self.finish_reason or finish_reason
        return "".join(pieces)

    def _take(self, text: str) -> str:
        self._held += text
        found = [index for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if found:
            certain, self._held, self.finish_reason = self._held[: min(found)], "", "stop"
        else:
            keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - keep
            certain, self._held = self._held[:cut], self._held[cut:]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
