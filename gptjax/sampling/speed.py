"""How fast a model generates: to its first token, for each further one, and beside the memory's bandwidth."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from gptjax.config import ModelConfig
from gptjax.model.accounting import decode_bytes, peak_bandwidth
from gptjax.parallel.precision import compute_dtype
from gptjax.sampling.config import DecodingConfig, SamplingConfig

Generate = Callable[[SamplingConfig], Sequence[Sequence[int]]]
"""The new tokens of each row."""


class Speed(NamedTuple):
    """Of one generation, after one that compiled."""

    first_token_seconds: float
    seconds_per_token: float | None
    """Of a step for all rows after the first; None: there was only one."""
    tokens_per_second: float
    """Of all rows, the first token's time included."""
    bandwidth_share: float | None
    """Of the memory's peak that reading weights and cache once a step takes; None: unknown."""

    def line(self) -> str:
        each = "" if self.seconds_per_token is None else f", then {1000 * self.seconds_per_token:.2f} ms a token"
        share = "unknown" if self.bandwidth_share is None else f"{self.bandwidth_share:.0%}"
        first = f"first token after {1000 * self.first_token_seconds:.1f} ms"
        return f"{first}{each}; {self.tokens_per_second:,.0f} tokens/s; share of the memory's bandwidth {share}"


def measure(
    config: ModelConfig, decoding: DecodingConfig, prompt_tokens: int, sampling: SamplingConfig, generate: Generate
) -> Speed:
    """Time a generation of one token and a whole one, each after another that compiles.

    Args:
        prompt_tokens: of the longest prompt.
        generate: generates with these settings.
    """

    def timed(sampling: SamplingConfig) -> tuple[float, Sequence[Sequence[int]]]:
        generate(sampling)
        start = time.perf_counter()
        rows = generate(sampling)
        return time.perf_counter() - start, rows

    first, _ = timed(dataclasses.replace(sampling, max_tokens=1))
    whole, rows = timed(sampling)
    steps = max(map(len, rows))
    each = (whole - first) / (steps - 1) if steps > 1 and whole > first else None
    bandwidth, share = peak_bandwidth(jax.devices()[0].device_kind), None
    if bandwidth is not None and each is not None and not decoding.draft_tokens:
        width = compute_dtype(config).itemsize
        widths = (1 if kind == "int8" else width for kind in (decoding.weights, decoding.kv_cache))
        share = decode_bytes(config, len(rows), prompt_tokens + steps / 2, *widths) / bandwidth / each
    return Speed(first, each, sum(map(len, rows)) / whole, share)
