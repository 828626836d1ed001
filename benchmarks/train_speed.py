"""How fast a configuration trains: tokens per second, MFU, compile seconds and peak memory, on made tokens.

    python benchmarks/train_speed.py configs/gpt2_124m.py --batch-sizes 16 32 64 --json train_speed.json
    python benchmarks/train_speed.py configs/quickstart.py --model.num-layers 2

The compiled step is the one that train.py runs, with its optimizer and the copy of each batch to the device. After
a warm-up, several blocks of steps are timed; the table has the median block. MFU counts attention in full, as
nanoGPT and PaLM do; the JSON also has it with the causal half alone. Where the device does not count its memory, as
on a CPU, peak memory is what the compiled step was planned with.

Where gptjax is not installed, start it with PYTHONPATH=. in front.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import measure
import numpy as np

from gptjax.config import Config
from gptjax.model.accounting import mfu, parameter_counts, peak_flops, training_flops_per_token
from gptjax.model.gpt import GPT
from gptjax.parallel import platform, sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import init_state
from gptjax.training.step import make_train_step

COLUMNS = {
    "batch_size": "d",
    "tokens_per_second": ",.0f",
    "mfu": ".3f",
    "step_ms": ".2f",
    "compile_seconds": ".1f",
    "peak_memory_bytes": ",d",
}


def train_speed(config: Config, blocks: int, steps: int, profile: str | None) -> dict[str, Any]:
    """Measure one configuration under the current mesh."""
    model_config, training = config.model, config.training
    model, optimizer = GPT(model_config), make_optimizer(config.optimizer)
    drops = model_config.embedding_dropout or model_config.attention_dropout or model_config.residual_dropout
    K, B, T = training.steps_per_dispatch, training.resolved_micro_batch_size, model_config.context_length
    A = training.batch_size // B
    train_step = make_train_step(
        language_model_loss(model, training.z_loss, chunk_tokens=training.loss_chunk_tokens),
        optimizer,
        dropout_seed=training.seed if drops else None,
        accumulates=A > 1,
        steps_per_dispatch=K,
    )
    state = init_state(model, optimizer, training.seed)
    draw = np.random.default_rng(0)
    batches = [draw.integers(0, model_config.vocab_size, (K, A, B, T + 1), np.int32) for _ in range(4)]
    counts_K, rates_K = np.full((K,), A, np.int32), np.full((K,), config.optimizer.peak_learning_rate, np.float32)

    def batch(number: int) -> dict[str, jax.Array]:
        return {"tokens": sharding.put_batch(batches[number % len(batches)])}

    start = time.perf_counter()
    program = train_step.lower(state, batch(0), counts_K, rates_K, K).compile()
    compile_seconds = time.perf_counter() - start
    metrics: dict[str, jax.Array] = {}

    def block(number_of_steps: int) -> float:
        nonlocal state, metrics
        start = time.perf_counter()
        for number in range(number_of_steps):
            state, metrics = program(state, batch(number), counts_K, rates_K, K)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    block(2)
    seconds = [block(steps) / (steps * K) for _ in range(blocks)]
    if profile:
        with jax.profiler.trace(profile):
            block(3)
    tokens = training.batch_size * T
    step = measure.spread(seconds)
    flops = training_flops_per_token(model_config)
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind, model_config.compute_dtype)
    rate, num_devices = tokens / step["median"], jax.device_count()
    return {
        "batch_size": training.batch_size,
        "micro_batch_size": B,
        "context_length": T,
        "parameters": parameter_counts(model_config)["total"],
        "tokens_per_second": rate,
        "tokens_per_second_min": tokens / step["max"],
        "tokens_per_second_max": tokens / step["min"],
        "mfu": mfu(rate, flops.total, num_devices, peak),
        "mfu_causal": mfu(rate, flops.total_causal, num_devices, peak),
        "step_ms": 1000 * step["median"],
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": measure.peak_memory_bytes(program),
        "loss": float(metrics["loss"][-1]),
    }


def main(arguments: Sequence[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="sequences, one row each; default: the micro-batch")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="dispatches of a block")
    platform.configure()
    options, config = measure.read(parser, arguments)
    rows = []
    with jax.set_mesh(make_mesh(config.mesh)):
        for size in options.batch_sizes or [config.training.resolved_micro_batch_size]:
            training = dataclasses.replace(
                config.training, batch_size=size, micro_batch_size=None, batch_ramp_start=None, batch_ramp_tokens=0
            )
            sized = dataclasses.replace(config, training=training)
            known = {"config": str(options.config), **measure.machine()}
            try:
                rows.append(known | train_speed(sized, options.blocks, options.steps, options.profile))
            except jax.errors.JaxRuntimeError as error:
                if not measure.is_out_of_memory(error):
                    raise
                rows.append(known | {"batch_size": size, "tokens_per_second": None, "mfu": None, "error": "no memory"})
    measure.show(rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
