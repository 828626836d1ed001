"""What dividing a step over eight devices costs, beyond the work that they share.

`python benchmarks/mesh_cost.py` times one optimizer step of a model in which matrix products dominate, on one fake CPU
device and on meshes of eight in turn, all in one process on the same cores. The same work in eight pieces should take
as long as in one: the ratio of the medians is what partitioning and collectives cost here. It also says what each mesh
sends, read off the compiled step. Exit status 1 if a ratio is above 1.25.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np

from gptjax.config import MeshConfig, ModelConfig, OptimizerConfig
from gptjax.model.gpt import GPT
from gptjax.parallel import sharding
from gptjax.parallel.collectives import bytes_by_kind
from gptjax.parallel.mesh import make_mesh
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import init_state
from gptjax.training.step import make_train_step

TARGET = 1.25
MESHES = {
    "one device": None,
    "data 8": {"data": 8},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "tensor 8": {"data": 1, "tensor": 8},
    "context 8": {"data": 1, "context": 8},
    "data 2 × fsdp 2 × tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}


class Arm:
    """A compiled step under its mesh, with its state."""

    def __init__(self, config: ModelConfig, axes: dict[str, int] | None, batch_size: int):
        devices = jax.devices() if axes else jax.devices()[:1]
        self.mesh = make_mesh(MeshConfig(**axes or {"data": 1}), devices)
        with jax.set_mesh(self.mesh):
            model, optimizer = GPT(config), make_optimizer(OptimizerConfig())
            step = make_train_step(language_model_loss(model), optimizer, dropout_seed=None, accumulates=False)
            self.state = init_state(model, optimizer, 0)
            draw = np.random.default_rng(0)
            tokens = draw.integers(0, config.vocab_size, (1, 1, batch_size, config.context_length + 1), np.int32)
            self.rest = ({"tokens": sharding.put_batch(tokens)}, np.ones(1, np.int32), np.full(1, 1e-4, np.float32), 1)
            self.program = step.lower(self.state, *self.rest).compile()
        self.seconds: list[float] = []

    def run(self, timed: bool = True) -> None:
        start = time.perf_counter()
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.program(self.state, *self.rest)
            jax.block_until_ready((self.state, metrics))
        if timed:
            self.seconds.append(time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", help="file for the figures, or - for standard output")
    options = parser.parse_args()
    config = ModelConfig(
        num_layers=options.num_layers,
        model_dim=options.model_dim,
        num_heads=8,
        context_length=options.context_length,
        vocab_size=4096,
        compute_dtype="float32",
    )
    arms = {name: Arm(config, axes, options.batch_size) for name, axes in MESHES.items()}
    for arm in arms.values():
        arm.run(timed=False)
    for _ in range(options.repeats):
        for arm in arms.values():
            arm.run()
    alone = statistics.median(arms["one device"].seconds)
    rows: list[dict[str, Any]] = []
    for name, arm in arms.items():
        median = statistics.median(arm.seconds)
        sent = sum(bytes_by_kind(arm.program.as_text()).values())
        rows.append({"mesh": name, "step_ms": 1000 * median, "ratio": median / alone, "collective_bytes": sent})
        if options.json != "-":
            spread = f"{1000 * min(arm.seconds):,.0f} – {1000 * max(arm.seconds):,.0f}"
            print(
                f"{name:28} {1000 * median:8,.0f} ms ({spread})  ratio {median / alone:.2f}  sends {sent / 1e6:7.1f} MB"
            )
    text = json.dumps(rows)
    if options.json == "-":
        print(text)
    elif options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return int(any(row["ratio"] > TARGET for row in rows))


if __name__ == "__main__":
    sys.exit(main())
