"""How text is sampled. Only the standard library is imported, so that a command line is parsed without JAX."""

import math
from dataclasses import dataclass
from typing import Literal

from gptjax.checks import MAX_INT, require_range, require_types
from gptjax.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    """What is drawn from the model's distribution, and when to stop."""

    max_tokens: int = 200
    """New tokens at most; the end of the model's context may come first."""
    temperature: float = 0.8
    """Divides the logits: below 1 safer, above 1 wilder. 0: always the likeliest token (greedy)."""
    top_k: int = 0
    """Only the k likeliest tokens are drawn. 0: off."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens whose probability reaches p are drawn (nucleus sampling). 1: off."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest are drawn. 0: off."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and of the text so far less likely when above 1. 1: off."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    seed: int = 0
    """The same seed draws the same text."""

    def __post_init__(self):
        if isinstance(self.stop, str):  # one stop string is the common case
            object.__setattr__(self, "stop", (self.stop,))
        require_types("", self)
        require_range("", self, 1, MAX_INT, "max_tokens")
        require_range("", self, 0, MAX_INT, "top_k", "seed")
        require_range("", self, 0, math.inf, "temperature")
        require_range("", self, 0, 1, "top_p", "min_p")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}, but must be above 0; "
                "1 is off, and 1.1 to 1.3 are usual"
            )
        if "" in self.stop:
            raise UserError("a stop string is empty, and would end every text at once; leave it out")


@dataclass(frozen=True)
class DecodingConfig:
    """How the model is run while it samples: what that costs, not, but for rounding, what is drawn."""

    weights: Literal["full", "int8"] = "full"
    """int8: matrices are kept in eight bits with a scale for each output, half or a quarter of the memory."""
    kv_cache: Literal["full", "int8"] = "full"
    """int8: the same for keys and values, with a scale for each token and head."""
    prefill_chunk: int = 512
    """Most tokens of a prompt that go through the model at once, which bounds the memory of long ones."""

    draft_tokens: int = 0
    """Tokens guessed at a time, which one pass of the model checks: speculative decoding. 0: off."""

    def __post_init__(self):
        require_types("", self)
        require_range("", self, 1, MAX_INT, "prefill_chunk")
        require_range("", self, 0, 15, "draft_tokens")

    @property
    def call_tokens(self) -> int:
        """What `empty_cache` has to know: that of guesses a cache is written ahead of its text, and then set back."""
        return self.draft_tokens + 2 if self.draft_tokens else 1
