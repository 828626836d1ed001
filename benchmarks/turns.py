"""Compiled functions that take turns in one process: their median time, the memory they plan, how far they are off."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import measure
import numpy as np

from gptjax.errors import UserError

COLUMNS = {"ms": ",.2f", "min_ms": ",.2f", "max_ms": ",.2f", "temp_mb": ",.1f", "compile_seconds": ".1f"}
COLUMNS |= {"error": ".1e"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of each result, by norm: bfloat16 rounds by 2e-3, and attention with a window that is off by one is off by 0.1."""


class Arm:
    """A compiled function with its inputs; its results are a tuple of arrays."""

    def __init__(self, name: str, function: Callable[..., tuple[jax.Array, ...]], arrays: Sequence[jax.Array]):
        self.name, self.arrays = name, arrays
        start = time.perf_counter()
        self.program = jax.jit(function).lower(*arrays).compile()
        self.compile_seconds = time.perf_counter() - start
        self.temp_bytes = self.program.memory_analysis().temp_size_in_bytes
        self.seconds: list[float] = []

    def fits(self) -> bool:
        """A CPU's program that needs more than there is would be killed, and this process with it."""
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return jax.default_backend() != "cpu" or self.temp_bytes < 0.8 * free

    def run(self) -> tuple[jax.Array, ...]:
        start = time.perf_counter()
        results = jax.block_until_ready(self.program(*self.arrays))
        self.seconds.append(time.perf_counter() - start)
        return results


def error(got: Sequence[jax.Array], exact: Sequence[jax.Array]) -> float:
    """The worst of all results, by norm."""
    pairs = [[np.asarray(x, np.float32) for x in pair] for pair in zip(got, exact, strict=True)]
    return float(np.max([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs]))  # NaN stays NaN


def take_turns(
    arms: Sequence[Arm], exact: Sequence[jax.Array], tolerance: float, repeats: int, what: str
) -> list[dict[str, Any]]:
    """A row for each arm, with `COLUMNS`; without times where its program needs more memory than there is.

    Args:
        exact: the results that all should have.
        tolerance: of `error`.
        what: is measured, for messages.

    Raises:
        UserError: an arm is off by more, or gives NaN.
    """
    rows, running = [], []
    for arm in arms:
        row = {"temp_mb": arm.temp_bytes / 1e6, "compile_seconds": arm.compile_seconds}
        rows.append(row)
        if not arm.fits():
            print(f"{what}: {arm.name} plans {arm.temp_bytes / 1e9:.1f} GB, more than is free", file=sys.stderr)
            continue
        try:
            off = error(arm.run(), exact)
        except jax.errors.JaxRuntimeError as failure:
            if not measure.is_out_of_memory(failure):
                raise
            print(f"{what}: {arm.name} runs out of memory", file=sys.stderr)
            continue
        if not off < tolerance:
            raise UserError(f"{arm.name} is off by {off:.2g} at {what}, more than {tolerance:g}")
        row["error"] = off
        running.append((arm, row))
        arm.seconds.clear()
    for _ in range(repeats):
        for arm, _ in running:
            arm.run()
    for arm, row in running:
        spread = measure.spread([1000 * seconds for seconds in arm.seconds])
        row |= {"ms": spread["median"], "min_ms": spread["min"], "max_ms": spread["max"]}
    return rows
