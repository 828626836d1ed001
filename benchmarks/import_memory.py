"""The memory and time that reading a Hugging Face directory takes: made weights of some gigabytes, in shards.

    python benchmarks/import_memory.py --gigabytes 2 --dtype float32
    python benchmarks/import_memory.py --gigabytes 2 --dtype bfloat16 --devices 4

A Llama is written, and read in a process of its own, whose anonymous memory (RssAnon) is looked at every 10 ms; pages
of files that are only mapped are not in it. `bound` is 1.3 times the largest tensor plus what the devices hold, which
on a CPU is all in one memory. Reading the same files with `cat` says what the disk, or its cache, gives.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import measure
import ml_dtypes
import numpy as np

from gptjax.config import ModelConfig
from gptjax.interop.configs import to_theirs
from gptjax.interop.huggingface import TYPES, tensor_shapes
from gptjax.interop.tensor_files import write_tensors
from gptjax.model.gpt import GPT
from gptjax.training.state import abstract_params

CHILD = """
import json, os, sys, threading, time
from pathlib import Path
from gptjax.parallel import platform
platform.configure()
import jax
from gptjax.config import MeshConfig
from gptjax.interop import huggingface
from gptjax.parallel.mesh import make_mesh

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

folder, devices = Path(sys.argv[1]), int(sys.argv[2])
config = huggingface.read_config(folder)
jax.block_until_ready(jax.numpy.zeros(3))
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.01)

thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=devices))):
    params = jax.block_until_ready(huggingface.read_params(folder, config))
seconds = time.perf_counter() - start
done = True
thread.join()
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(json.dumps({"seconds": seconds, "peak_bytes": peak - before, "held_bytes": held}))
"""


def write(folder: Path, gigabytes: float, dtype: str) -> dict[str, int]:
    """A Llama of about that size, tensor by tensor; the bytes of all and of the largest."""
    width = np.dtype(TYPES[dtype]).itemsize
    layer = 4 * 2048**2 + 3 * 2048 * 5632
    config = ModelConfig(
        num_layers=max(1, round((gigabytes * 1e9 / width - 2 * 32000 * 2048) / layer)),
        model_dim=2048,
        num_heads=32,
        ffn_dim=5632,
        context_length=2048,
        vocab_size=32000,
        norm="rmsnorm",
        positions="rope",
        feed_forward="swiglu",
        bias=False,
        tie_embeddings=False,
    )
    family, theirs = to_theirs(config)
    (folder / "config.json").write_text(json.dumps(theirs), encoding="utf-8")
    named = tensor_shapes(family, config, abstract_params(GPT(config)))
    sizes = {name: width * int(np.prod(shape)) for name, shape in named.items()}
    draw = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        return draw.standard_normal(named[name], np.float32).astype(TYPES[dtype])

    write_tensors(folder, [*named], read, sizes, shard_bytes=10**9)
    return {"bytes": sum(sizes.values()), "largest_float32_bytes": 4 * max(sizes.values()) // width}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", choices=[*TYPES], default="float32")
    parser.add_argument("--devices", type=int, default=1, help="of the CPU, among which fsdp splits the weights")
    parser.add_argument("--json", help="file for the figures, or - for standard output")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = write(folder, options.gigabytes, options.dtype)
        start = time.perf_counter()
        subprocess.run(["cat", *map(str, folder.glob("*.safetensors"))], stdout=subprocess.DEVNULL, check=True)
        disk = time.perf_counter() - start
        flags = f"--xla_force_host_platform_device_count={options.devices}"
        environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(measure.ROOT)}
        command = [sys.executable, "-c", CHILD, str(folder), str(options.devices)]
        found = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    bound = 1.3 * sizes["largest_float32_bytes"] + found["held_bytes"]
    row = {
        "dtype": options.dtype,
        "devices": options.devices,
        "jax": jax.__version__,
        "ml_dtypes": ml_dtypes.__version__,
        **sizes,
        **found,
        "bound_bytes": bound,
        "peak_over_bound": found["peak_bytes"] / bound,
        "gigabytes_per_second": sizes["bytes"] / 1e9 / found["seconds"],
        "disk_gigabytes_per_second": sizes["bytes"] / 1e9 / disk,
    }
    columns = {
        "dtype": "s",
        "devices": "d",
        "bytes": ",d",
        "peak_bytes": ",d",
        "bound_bytes": ",.0f",
        "peak_over_bound": ".3f",
        "seconds": ".1f",
        "gigabytes_per_second": ".2f",
        "disk_gigabytes_per_second": ".2f",
    }
    measure.show([row], columns, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
