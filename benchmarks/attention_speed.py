"""How long attention takes forward and backward, and the memory it plans, by kernel and length.

    python benchmarks/attention_speed.py                                  # 512 to 16,384 tokens, every kernel that runs
    python benchmarks/attention_speed.py --lengths 1024 --batch-size 16 --num-heads 12 --head-dim 64 --json a.json
    python benchmarks/attention_speed.py --lengths 8192 --kernels blockwise --blocks 256 256 512 1024

Arms of one length take turns, and the table has the median. Every arm is compared with float32 first, its output and
its gradients: a kernel that is off, or gives NaN, ends the benchmark. What cannot run says why on standard error.

Where gptjax is not installed, start it with PYTHONPATH=. in front.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np

from gptjax.errors import UserError
from gptjax.model import kernels
from gptjax.model.attention import attention
from gptjax.model.blockwise import blockwise_attention
from gptjax.parallel import platform
from gptjax.resolve import default_compute_dtype

COLUMNS = {"tokens": ",d", "kernel": "", "ms": ",.2f", "min_ms": ",.2f", "max_ms": ",.2f", "temp_mb": ",.1f"}
COLUMNS |= {"compile_seconds": ".1f", "error": ".1e"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of output and gradients, each by norm: bfloat16 rounds by 2e-3, and a window that is off by one is off by 0.1."""


class Arm:
    """A compiled kernel with its inputs: output and gradients of a sum."""

    def __init__(self, name: str, run: Callable[..., jax.Array], arrays: Sequence[jax.Array]):
        def both(q, k, v, d_out):
            out, vjp = jax.vjp(run, q, k, v)
            return out, *vjp(d_out)

        self.name, self.arrays = name, arrays
        start = time.perf_counter()
        self.program = jax.jit(both).lower(*arrays).compile()
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


def inputs(options: argparse.Namespace, T: int) -> tuple[list[jax.Array], dict[str, Any]]:
    """q, k, v and a direction in the type asked for; and what `attention` gets besides."""
    draw, B, N, H = np.random.default_rng(0), options.batch_size, options.num_heads, options.head_dim
    shapes = [(B, T, N, H), *[(B, T, options.num_kv_heads or N, H)] * 2, (B, T, N, H)]
    arrays = [jnp.asarray(draw.standard_normal(shape, np.float32), options.dtype) for shape in shapes]
    index = np.arange(T)
    segments = index * options.documents // T
    positions = index - np.searchsorted(segments, segments)
    positions, segments = (jnp.asarray(np.tile(x, (B, 1)), jnp.int32) for x in (positions, segments))
    settings = {"q_positions": positions, "kv_positions": positions, "window": options.window}
    settings |= {"softcap": options.softcap, "in_order": True}
    return arrays, settings | ({"segment_ids": segments} if options.documents > 1 else {})


def arms(options: argparse.Namespace, T: int) -> list[Arm]:
    arrays, settings = inputs(options, T)
    call = kernels.Call(
        *(T, T, options.head_dim, options.head_dim, options.dtype, options.window, options.softcap, True),
        documents=options.documents > 1,
    )
    found = []
    for name in options.kernels:
        reason = kernels.WHY_NOT[name](call, kernels.this_machine())
        if reason is not None:
            print(f"{T} tokens: {name} {reason}", file=sys.stderr)
        elif name == "blockwise" and options.blocks:
            for query_block, key_block in itertools.product(options.blocks, repeat=2):
                run = functools.partial(_in_blocks, settings, query_block, key_block)
                found.append(Arm(f"blockwise {query_block}×{key_block}", run, arrays))
        else:
            found.append(Arm(name, functools.partial(attention, **settings, kernel=name), arrays))
    return found


def _in_blocks(settings, query_block, key_block, q, k, v):
    segments = settings.get("segment_ids")
    return blockwise_attention(
        *(q, k, v, settings["q_positions"], settings["kv_positions"], segments, segments),
        window=settings["window"],
        cap=settings["softcap"],
        scale=q.shape[-1] ** -0.5,
        query_block=query_block,
        key_block=key_block,
    )


def error(got: Sequence[jax.Array], exact: Sequence[jax.Array]) -> float:
    """The worst of output and gradients, by norm."""
    pairs = [[np.asarray(x, np.float32) for x in pair] for pair in zip(got, exact, strict=True)]
    return float(np.max([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs]))  # NaN stays NaN


def measure_length(options: argparse.Namespace, T: int) -> list[dict[str, Any]]:
    rows, running = {}, []
    arrays, settings = inputs(options, T)
    name = "xla" if T <= 2048 else "blockwise"
    exactly = functools.partial(attention, **settings, kernel=name)
    exact = Arm(name, exactly, [x.astype(jnp.float32) for x in arrays]).run()
    for arm in arms(options, T):
        row = {"tokens": T, "kernel": arm.name, "temp_mb": arm.temp_bytes / 1e6, "compile_seconds": arm.compile_seconds}
        rows[arm.name] = row
        if not arm.fits():
            print(f"{T} tokens: {arm.name} plans {arm.temp_bytes / 1e9:.1f} GB, more than is free", file=sys.stderr)
            continue
        try:
            off = error(arm.run(), exact)
        except jax.errors.JaxRuntimeError as failure:
            if not measure.is_out_of_memory(failure):
                raise
            print(f"{T} tokens: {arm.name} runs out of memory", file=sys.stderr)
            continue
        if not off < TOLERANCE[options.dtype]:
            raise UserError(f"{arm.name} is off by {off:.2g} at {T} tokens, more than {TOLERANCE[options.dtype]:g}")
        row["error"] = off
        running.append(arm)
    del exact
    for arm in running:
        arm.seconds.clear()
    for _ in range(options.repeats):
        for arm in running:
            arm.run()
    for arm in running:
        spread = measure.spread([1000 * seconds for seconds in arm.seconds])
        rows[arm.name] |= {"ms": spread["median"], "min_ms": spread["min"], "max_ms": spread["max"]}
    return [*rows.values()]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--kernels", nargs="+", choices=[*kernels.RUN], default=[*kernels.RUN])
    parser.add_argument("--blocks", type=int, nargs="+", help="sizes of blockwise's blocks, to try all pairs of")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-kv-heads", type=int, help="default: --num-heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=[*TOLERANCE], help="default: what a model computes in on this device")
    parser.add_argument("--window", type=int, help="tokens that are seen; default: all")
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--documents", type=int, default=1, help="in each row, which do not see each other")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file for the results, or - for standard output")
    platform.configure()
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or default_compute_dtype(jax.default_backend())
    known = {name: getattr(options, name) for name in ("batch_size", "num_heads", "num_kv_heads", "head_dim", "dtype")}
    known |= {name: getattr(options, name) for name in ("window", "softcap", "documents")} | measure.machine()
    rows = [known | row for T in options.lengths for row in measure_length(options, T)]
    measure.show(rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
