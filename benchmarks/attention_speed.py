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
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import turns
from turns import TOLERANCE, Arm, take_turns

from gptjax.model import kernels
from gptjax.model.attention import attention
from gptjax.model.blockwise import blockwise_attention
from gptjax.parallel import platform
from gptjax.resolve import default_compute_dtype

COLUMNS = {"tokens": ",d", "kernel": "", **turns.COLUMNS}


def forward_and_backward(run: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """Output and gradients of q, k and v, from these and the output's gradient."""

    def both(q, k, v, d_out):
        out, vjp = jax.vjp(run, q, k, v)
        return out, *vjp(d_out)

    return both


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
                found.append(Arm(f"blockwise {query_block}×{key_block}", forward_and_backward(run), arrays))
        else:
            run = functools.partial(attention, **settings, kernel=name)
            found.append(Arm(name, forward_and_backward(run), arrays))
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


def measure_length(options: argparse.Namespace, T: int) -> list[dict[str, Any]]:
    arrays, settings = inputs(options, T)
    exactly = functools.partial(attention, **settings, kernel="xla" if T <= 2048 else "blockwise")
    exact = Arm("exact", forward_and_backward(exactly), [x.astype(jnp.float32) for x in arrays]).run()
    found = arms(options, T)
    rows = take_turns(found, exact, TOLERANCE[options.dtype], options.repeats, f"{T} tokens")
    return [{"tokens": T, "kernel": arm.name, **row} for arm, row in zip(found, rows, strict=True)]


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
