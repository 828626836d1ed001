"""What the device reaches at most, in JAX or in torch: a large bfloat16 product, and reading plus writing memory.

    python benchmarks/ceilings.py jax
    python benchmarks/ceilings.py torch --json ceilings.json

Inputs are random: a product of zeros runs faster. Each figure is the median of blocks of ten calls.
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


def in_jax(n: int, elements: int) -> tuple[str, str, float, float]:
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in keys[:2])
    x = jax.random.normal(keys[2], (elements,), jnp.bfloat16)
    product, scale = jax.jit(jnp.matmul), jax.jit(lambda x: x * 2)
    times = (seconds_per_call(call, jax.block_until_ready) for call in (lambda: product(a, b), lambda: scale(x)))
    return jax.__version__, jax.devices()[0].device_kind, *times


def in_torch(n: int, elements: int) -> tuple[str, str, float, float]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    x = torch.randn(elements, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = (seconds_per_call(call, wait) for call in (lambda: a @ b, lambda: y.copy_(x)))
    return torch.__version__, torch.cuda.get_device_name() if device == "cuda" else "cpu", *times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=("jax", "torch"))
    parser.add_argument("--tiny", action="store_true", help="small arrays, to see that it runs")
    parser.add_argument("--json", help="file for the figures, or - for standard output")
    options = parser.parse_args()
    n, elements = (128, 2**12) if options.tiny else (8192, 2**30)
    version, device, product, copy = (in_jax if options.framework == "jax" else in_torch)(n, elements)
    known = {"framework": f"{options.framework} {version}", "device": device}
    rows = [
        known | {"arm": f"{n}³ bfloat16", "figure": 2 * n**3 / product / 1e12, "unit": "TFLOP/s"},
        known | {"arm": "read and write", "figure": 4 * elements / copy / 1e12, "unit": "TB/s"},
    ]
    if options.json != "-":
        for row in rows:
            print(f"{row['framework']:16} {row['arm']:16} {row['figure']:10.4g} {row['unit']}")
    text = json.dumps(rows)
    if options.json == "-":
        print(text)
    elif options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
