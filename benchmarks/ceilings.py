"""What the device reaches at most, in JAX or in torch: products, reading plus writing memory, and reading it.

    python benchmarks/ceilings.py jax
    python benchmarks/ceilings.py torch --json ceilings.json
    python benchmarks/ceilings.py jax --dtype float32 --products 2048x2048x2048 768x128x512 --megabytes 42 150

Products are M x K x N; the default is 8192 cubed. Reading is a vector times a matrix, as in decoding. Inputs are
random: a product of zeros runs faster. Each figure is the median of blocks of ten calls.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds_per_call(call: Callable[[], Any], wait: Callable[[Any], Any], calls: int = 10, blocks: int = 7) -> float:
    """After a block of warm-up."""
    found = []
    for _ in range(blocks + 1):
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        wait(last)
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found[1:])


Timed = list[tuple[str, float, str]]
"""What was done, a figure, and its unit."""


def figures(options: argparse.Namespace, arm: Callable[..., float]) -> Timed:
    """All figures, where `arm(what, *sizes)` gives the seconds of a call."""
    width = 4 if options.dtype == "float32" else 2
    found = []
    for M, K, N in options.products:
        label = f"{M}³" if M == K == N else f"{M} x {K} x {N}"
        found.append((f"{label} {options.dtype}", 2 * M * K * N / arm("product", M, K, N) / 1e12, "TFLOP/s"))
    for megabytes in options.megabytes:
        elements = max(1, megabytes * 10**6 // width // READ_ROWS) * READ_ROWS
        done = {"read and write": 2, "read": 1}
        for what, times in done.items():
            rate = times * width * elements / arm(what, elements) / 1e12
            found.append((f"{what} {megabytes:,} MB", rate, "TB/s"))
    return found


READ_ROWS = 1024
"""Inputs of the matrix that is read: the vector it meets has so many elements."""


def in_jax(options: argparse.Namespace) -> tuple[str, str, Timed]:
    import jax
    import jax.numpy as jnp

    dtype = jnp.dtype(options.dtype)
    # Float32 means it on a GPU, too.
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest" if dtype == jnp.float32 else None))
    scale = jax.jit(lambda x: x * 2)

    def arm(what: str, *sizes: int) -> float:
        def draw(*shape: int) -> jax.Array:
            return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)

        if what == "product":
            M, K, N = sizes
            a, b = draw(M, K), draw(K, N)
        elif what == "read":
            a, b = draw(1, READ_ROWS), draw(READ_ROWS, sizes[0] // READ_ROWS)
        else:
            x = draw(*sizes)
            return seconds_per_call(lambda: scale(x), jax.block_until_ready)
        return seconds_per_call(lambda: product(a, b), jax.block_until_ready)

    return jax.__version__, jax.devices()[0].device_kind, figures(options, arm)


def in_torch(options: argparse.Namespace) -> tuple[str, str, Timed]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device=device).to(dtype)

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def arm(what: str, *sizes: int) -> float:
        if what == "product":
            M, K, N = sizes
            a, b = draw(M, K), draw(K, N)
        elif what == "read":
            a, b = draw(1, READ_ROWS), draw(READ_ROWS, sizes[0] // READ_ROWS)
        else:
            x = draw(*sizes)
            y = torch.empty_like(x)
            return seconds_per_call(lambda: y.copy_(x), wait)
        return seconds_per_call(lambda: a @ b, wait)

    return torch.__version__, torch.cuda.get_device_name() if device == "cuda" else "cpu", figures(options, arm)


def sizes(text: str) -> tuple[int, int, int]:
    M, K, N = map(int, text.split("x"))
    return M, K, N


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=("jax", "torch"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--products", nargs="+", type=sizes, default=[(8192, 8192, 8192)], metavar="MxKxN")
    parser.add_argument("--megabytes", nargs="+", type=int, default=[2147], help="of the arrays that are read")
    parser.add_argument("--tiny", action="store_true", help="small arrays, to see that it runs")
    parser.add_argument("--json", help="file for the figures, or - for standard output")
    options = parser.parse_args()
    if options.tiny:
        options.products, options.megabytes = [(128, 128, 128)], [1]
    version, device, found = (in_jax if options.framework == "jax" else in_torch)(options)
    known = {"framework": f"{options.framework} {version}", "device": device}
    rows = [known | {"arm": label, "figure": figure, "unit": unit} for label, figure, unit in found]
    if options.json != "-":
        for row in rows:
            print(f"{row['framework']:16} {row['arm']:28} {row['figure']:10.4g} {row['unit']}")
    text = json.dumps(rows)
    if options.json == "-":
        print(text)
    elif options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
