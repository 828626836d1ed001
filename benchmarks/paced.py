"""An arm of a comparison: a process that is warm, and runs one block of steps, or one generation, when it is told to.

Both sides use it, so that it needs no more than NumPy. On standard output an arm says `@ready`, then for each line that
it reads the seconds of a block, and when its input ends what else it knows, as JSON. Other lines are its libraries'.
"""

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

NUM_BATCHES = 4
"""Made batches, used in turn: few enough for any memory, and no step sees the tokens of the one before."""


def made_batches(
    vocab_size: int, steps_per_dispatch: int, batch_size: int, context_length: int, documents: int = 1
) -> list[np.ndarray]:
    """The tokens of all arms, (K, B, T + 1) int32 each: the same for the same shapes.

    Args:
        documents: in each row, of random lengths; the last word of the vocabulary stands before each but the first, and
            nowhere else. One: a row is any words.
    """
    draw = np.random.default_rng(0)
    shape = (steps_per_dispatch, batch_size, context_length + 1)
    batches = [draw.integers(0, vocab_size - (documents > 1), shape, np.int32) for _ in range(NUM_BATCHES)]
    for tokens in batches:
        for row in tokens.reshape(-1, context_length + 1):
            row[draw.choice(np.arange(1, context_length), documents - 1, replace=False)] = vocab_size - 1
    return batches


def made_prompts(vocab_size: int, batch_size: int, prompt_tokens: int) -> np.ndarray:
    """Prompts that all arms continue, (B, T) int32."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch_size, prompt_tokens), np.int32)


def serve(block: Callable[[], float], facts: Callable[[], dict[str, Any]]) -> None:
    """Run a block for each line of standard input, and say the seconds of each of its steps; then say the facts."""
    say("ready")
    for _ in sys.stdin:
        say(repr(block()))
    rss_unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * rss_unit
    say(json.dumps(facts() | {"peak_host_memory_bytes": peak}))


def say(text: str) -> None:
    print(f"@{text}", flush=True)
