"""The memory of a host while a model of several is initialized, saved and restored: no host ever holds it whole.

`python benchmarks/host_memory.py` starts two processes that are one program over Gloo, with one CPU device each and
the mesh `fsdp 2`, so that each is to hold half of a state (float32 parameters and two moments). They initialize it and
save it; two fresh ones restore it. Each reads its own anonymous memory (RssAnon) every few milliseconds. What is above
a baseline, taken when a tiny state of the same structure has been through the same phases, is a share of the whole
state. It has two parts: the shard itself, which on a CPU lies in the host's memory and on an accelerator does not; and
what the host needs besides: compiling, random bits, and a few of the largest arrays on their way from the file. Exit
status 1 if a share is 0.6 or more.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGET = 0.6
NUM_PROCESSES = 2
PHASES = {"write": ("initialize", "save"), "read": ("restore",)}
SAMPLE_SECONDS = 0.005
SETTLE_SECONDS = 0.3
"""In which threads of the phase before end."""
ALLOCATOR = {
    # The allocator keeps what is freed, by default in an arena for every thread and in blocks of up to 32 MB. What
    # was needed before is then measured, and not what is needed: give all that is large back to the system at once.
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 17),
}


def anonymous_bytes() -> int:
    """This process's memory that no file stands behind."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """A context that keeps the most anonymous memory of its block in `bytes`."""

    def __init__(self):
        super().__init__(daemon=True)
        self._over = threading.Event()

    def __enter__(self) -> "Peak":
        self.bytes = anonymous_bytes()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, anonymous_bytes())


def work(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What one process does: `write` initializes and saves, `read` restores. A row for each phase."""
    import jax
    import jax.numpy as jnp

    from gptjax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig
    from gptjax.model.gpt import GPT
    from gptjax.parallel import distributed
    from gptjax.parallel.launch import DistributedConfig
    from gptjax.parallel.mesh import make_mesh
    from gptjax.training import checkpoint
    from gptjax.training.optimizer import make_optimizer
    from gptjax.training.state import TrainState, abstract_state, init_state

    launch = DistributedConfig(f"localhost:{options.port}", NUM_PROCESSES, options.process_id, timeout_seconds=60)
    distributed.connect(launch, {}, say=lambda _: None)
    optimizer = make_optimizer(OptimizerConfig())

    def model(model_dim: int, vocab_size: int) -> GPT:
        sizes = {"num_layers": options.num_layers, "num_heads": 4, "context_length": 512}
        # All matrices alike: what is on its way at the same time is a few arrays, which should be a small share.
        kind = {"feed_forward": "swiglu", "ffn_dim": model_dim}
        return GPT(ModelConfig(model_dim=model_dim, vocab_size=vocab_size, **sizes, **kind))

    def initialize(model: GPT) -> TrainState:
        return jax.block_until_ready(init_state(model, optimizer, seed=0))

    def save(state: TrainState, folder: Path) -> None:
        with checkpoint.open_checkpoints(folder, CheckpointConfig()) as manager:
            checkpoint.save(manager, 1, state, {})

    def restore(model: GPT, folder: Path) -> TrainState:
        return jax.block_until_ready(checkpoint.restore(folder, 1, abstract_state(model, optimizer))[0])

    @jax.jit
    def noise(leaf: jax.Array) -> jax.Array:
        """As training leaves it: the zeros of fresh moments would compress to nothing."""
        layout = jax.typeof(leaf).sharding
        counts = [jax.lax.broadcasted_iota(jnp.float32, leaf.shape, d, out_sharding=layout) for d in range(leaf.ndim)]
        return jnp.sin(sum((1.37 + d) * count for d, count in enumerate(counts)) ** 2) if counts else leaf

    baseline, rows = 0, []

    def measure(phase: str, do: Callable, *arguments: Any) -> Any:
        start = time.perf_counter()
        with Peak() as peak:
            result = do(*arguments)
        rows.append(
            {
                "process": options.process_id,
                "phase": phase,
                "seconds": time.perf_counter() - start,
                "baseline_bytes": baseline,
                "peak_bytes": peak.bytes,
            }
        )
        time.sleep(SETTLE_SECONDS)
        return result

    tiny, large = model(32, 128), model(options.model_dim, options.vocab_size)
    tiny_folder, large_folder = Path(options.folder, "tiny"), Path(options.folder, "large")
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=NUM_PROCESSES))):
        if options.part == "write":
            save(initialize(tiny), tiny_folder)
        restore(tiny, tiny_folder)
        time.sleep(SETTLE_SECONDS)
        baseline = anonymous_bytes()
        if options.part == "write":
            state = measure("initialize", initialize, large)
            leaves, tree = jax.tree.flatten(state)
            del state
            for number, leaf in enumerate(
                leaves
            ):  # one after the other: fresh and noisy ones need not be there at once
                leaves[number] = jax.block_until_ready(noise(leaf))
            del leaf
            state = jax.tree.unflatten(tree, leaves)
            measure("save", save, state, large_folder)
        else:
            state = measure("restore", restore, large, large_folder)
    leaves = jax.tree.leaves(state)
    whole = sum(leaf.nbytes for leaf in leaves)
    shard = sum(piece.data.nbytes for leaf in leaves for piece in leaf.addressable_shards)
    return [row | shares(row["baseline_bytes"], row["peak_bytes"], whole, shard) for row in rows]


def shares(baseline: int, peak: int, whole: int, shard: int) -> dict[str, float]:
    """What a peak is of the whole state, in its two parts."""
    share, device_share = (peak - baseline) / whole, shard / whole
    return {"state_bytes": whole, "share": share, "device_share": device_share, "host_extra": share - device_share}


def run_part(part: str, folder: str, arguments: list[str]) -> list[dict[str, Any]]:
    """The rows of both processes of a part."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TF_CPP_MIN_LOG_LEVEL": "3"} | ALLOCATOR
    command = [sys.executable, __file__, *arguments, "--part", part, "--folder", folder, "--port", str(port)]
    processes = [
        # Gloo's greetings go to standard output, which is for the figures.
        subprocess.Popen([*command, "--process-id", str(number)], env=environment, stdout=subprocess.DEVNULL)
        for number in range(NUM_PROCESSES)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"error: processes of part {part} ended with {codes}")
    found = [json.loads(Path(folder, f"{part}-{number}.json").read_text()) for number in range(NUM_PROCESSES)]
    return sorted((row for rows in found for row in rows), key=lambda row: PHASES[part].index(row["phase"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # So large that compiling, tens of megabytes whatever the model, is a small share of the state.
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--model-dim", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--json", help="file for the figures, or - for standard output")
    for name in ("--part", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--port", "--process-id"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        rows = work(options)
        Path(options.folder, f"{options.part}-{options.process_id}.json").write_text(json.dumps(rows))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for part in PHASES for row in run_part(part, folder, sys.argv[1:])]
    if options.json != "-":
        print(f"whole state {rows[0]['state_bytes'] / 1e6:,.0f} MB")
        print("process  phase       baseline MB  peak MB  share = device + host extra")
        for row in rows:
            megabytes = f"{row['baseline_bytes'] / 1e6:11,.0f}  {row['peak_bytes'] / 1e6:7,.0f}"
            parts = f"{row['share']:5.3f} =  {row['device_share']:.3f} + {row['host_extra']:10.3f}"
            print(f"{row['process']:7}  {row['phase']:10}  {megabytes}  {parts}")
    text = json.dumps(rows)
    if options.json == "-":
        print(text)
    elif options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return int(any(row["share"] >= TARGET for row in rows))


if __name__ == "__main__":
    sys.exit(main())
