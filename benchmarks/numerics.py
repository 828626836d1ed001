"""Whether the device computes what it should: before a benchmark, for wrong numbers are not worth timing.

    python benchmarks/numerics.py            # exit status 1 if a figure is no number, or further off than its type is

Attention's kernels, forward and gradients, matrix products and the gradient of an embedding against float64 in NumPy,
each as ‖x - reference‖ / ‖reference‖ on random inputs; and the time of the embedding's gradient, which some versions of
XLA write as a loop that is hundreds of times too slow.

Shape suffixes: B batch, T tokens, S keys, N heads, H head dimension.
"""

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np

from gptjax.model.attention import attention
from gptjax.parallel import platform

LIMITS = {"float32": 3e-3, "bfloat16": 2e-2}
"""Largest error: products of float32 may run in TF32, which has ten bits."""


def reference(q_BTNH: Any, k_BSNH: Any, v_BSNH: Any, g_BTNH: Any) -> dict[str, np.ndarray]:
    """Causal attention and its gradients for an output gradient g, written out in float64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSNH, v_BSNH, g_BTNH))
    scale, T = q.shape[-1] ** -0.5, q.shape[1]
    logits = np.einsum("btnh,bsnh->bnts", q, k) * scale
    logits = np.where(np.tril(np.ones((T, T), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    gradient = np.einsum("btnh,bsnh->bnts", g, v)
    gradient = weights * (gradient - (gradient * weights).sum(-1, keepdims=True)) * scale
    return {
        "output": np.einsum("bnts,bsnh->btnh", weights, v),
        "gradient of q": np.einsum("bnts,bsnh->btnh", gradient, k),
        "gradient of k": np.einsum("bnts,btnh->bsnh", gradient, q),
        "gradient of v": np.einsum("bnts,btnh->bsnh", weights, g),
    }


def error(x: Any, expected: np.ndarray) -> float:
    x = np.asarray(x, np.float64)
    return float(np.linalg.norm(x - expected) / np.linalg.norm(expected))


def attention_rows(T: int, head_dim: int) -> list[dict[str, Any]]:
    """Each kernel that this device has, in bfloat16."""
    keys = jax.random.split(jax.random.key(head_dim), 4)
    q, k, v, g = (jax.random.normal(key, (2, T, 4, head_dim), jnp.bfloat16) for key in keys)
    expected, places = reference(q, k, v, g), jnp.broadcast_to(jnp.arange(T), (2, T))
    kernels = {
        "gptjax": lambda q, k, v: attention(q, k, v, q_positions=places, kv_positions=places),
        "xla": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla"),
    }
    if jax.devices()[0].platform == "gpu":
        kernels["cudnn"] = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    rows = []
    for name, kernel in kernels.items():
        output, pull_back = jax.vjp(jax.jit(kernel), q, k, v)
        found = dict(zip(expected, (output, *pull_back(g)), strict=True))
        for what, value in expected.items():
            rows.append(_row(f"attention {name}, head {head_dim}, {what}", error(found[what], value), "bfloat16"))
    return rows


def product_rows(n: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in ("bfloat16", "float32"):
        a, b = (jax.random.normal(jax.random.key(seed), (n, n), dtype) for seed in (1, 2))
        expected = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        rows.append(_row(f"{n}³ product, {dtype}", error(a @ b, expected), dtype))
    return rows


def embedding_rows(num_tokens: int, vocab_size: int, width: int) -> list[dict[str, Any]]:
    """The sum of rows by token, with a frequent one, as text has."""
    draw = np.random.default_rng(0)
    tokens = draw.zipf(1.2, num_tokens).clip(max=vocab_size) - 1
    rows = draw.standard_normal((num_tokens, width), np.float32)
    expected = np.zeros((vocab_size, width))
    np.add.at(expected, tokens, rows)
    gather = jax.jit(lambda tokens, rows: jnp.zeros((vocab_size, width)).at[tokens].add(rows))
    arguments = jax.device_put((tokens, rows))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        found = jax.block_until_ready(gather(*arguments))
        seconds.append(time.perf_counter() - start)
    least = 1000 * min(seconds)
    time_row = {"arm": f"gradient of an embedding, {num_tokens} tokens", "figure": least, "unit": "ms"}
    return [_row("gradient of an embedding", error(found, expected), "float32"), time_row]


def _row(what: str, figure: float, dtype: str) -> dict[str, Any]:
    row = {"arm": what, "figure": figure, "unit": "error", "limit": LIMITS[dtype]}
    # Not `figure > limit`: no comparison with NaN is true.
    return row if figure <= LIMITS[dtype] else row | {"error": f"more than {LIMITS[dtype]}"}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="attention alone, at one head size")
    parser.add_argument("--tiny", action="store_true", help="small arrays, to see that it runs")
    parser.add_argument("--json", help="file for the figures, or - for standard output")
    options = parser.parse_args(arguments)
    platform.configure()
    T = 64 if options.tiny else 1024
    rows = attention_rows(T, 64)
    if not options.smoke:
        rows += attention_rows(T, 128) + product_rows(256 if options.tiny else 2048)
        rows += embedding_rows(*((512, 128, 32) if options.tiny else (2**15, 50304, 768)))
    rows = [measure.machine() | row for row in rows]
    measure.show(rows, {"arm": "s", "figure": ".3g", "unit": "s"}, options.json)
    wrong = [row for row in rows if "error" in row]
    for row in wrong:
        print(f"error: {row['arm']} is off by {row['figure']:.3g}, {row['error']}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    measure.run(main)
