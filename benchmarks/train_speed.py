"""How fast a configuration trains: tokens per second, MFU, compile seconds and peak memory, on made tokens.

    python benchmarks/train_speed.py configs/gpt2_124m.py --batch-sizes 16 32 64 --json train_speed.json
    python benchmarks/train_speed.py configs/quickstart.py --model.num-layers 2
    python benchmarks/train_speed.py configs/shakespeare_char_cpu.py --batch-sizes 12 --cores 0,1 \
        --against nanogpt=CHECKOUT --against-python PYTHON_WITH_TORCH --dtypes float32 bfloat16
    python benchmarks/train_speed.py configs/gpt2_124m.py --batch-sizes 32 --against gptjax=OTHER_CHECKOUT \
        --variant 'unfused: XLA_FLAGS=--xla_gpu_enable_triton_gemm=false' --variant 'xla: --model.attention-kernel xla'

    python benchmarks/train_speed.py configs/gpt2_124m.py --documents 4 \
        --variant 'packed: --data.separate-documents True'

The compiled step is the one that train.py runs, with its optimizer and the copy of each batch to the device. After
a warm-up, several blocks of steps are timed; the table has the median block. MFU counts attention in full, as
nanoGPT and PaLM do; the JSON also has it with the causal half alone. Where the device does not count its memory, as
on a CPU, peak memory is what the compiled step was planned with.

With --against or --variant, arms of one shape take turns, each in a process of its own (compare.py), without dropout
and on the same tokens: another checkout of gptjax, this one with other fields or variables of the environment, or
nanoGPT's own model and step (nanogpt_arm.py says the --modes). `ratio` is ours over that arm in tokens per second, the
median over pairs of neighbouring blocks. The loss of all after the same number of steps is there to be compared.

Where gptjax is not installed, start it with PYTHONPATH=. in front.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import compare
import jax
import measure
import numpy as np
from paced import made_batches, serve

from gptjax.config import Config
from gptjax.model.accounting import parameter_counts
from gptjax.model.gpt import GPT
from gptjax.parallel import platform, sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.parametrization import multipliers
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.profile import kernels, perfetto_file, report, shares, trace
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


class Warm(NamedTuple):
    """A compiled training step, ready to be timed."""

    block: Callable[[], float]
    """Runs a block of dispatches, and gives the seconds of one of their steps."""
    facts: Callable[[], dict[str, Any]]
    """What is known beside the speed."""
    program: jax.stages.Compiled


def warm_up(config: Config, steps: int, documents: int = 1) -> Warm:
    """Compile the step of a configuration under the current mesh and run a block of `steps` dispatches.

    Args:
        documents: in each row, as `made_batches` takes it; whether they see each other is the configuration's.
    """
    model_config, training = config.model, config.training
    model, optimizer = GPT(model_config), make_optimizer(config.optimizer, multipliers(model_config))
    drops = model_config.embedding_dropout or model_config.attention_dropout or model_config.residual_dropout
    K, B, T = training.steps_per_dispatch, training.resolved_micro_batch_size, config.sequence_length
    A = training.batch_size // B
    separator = model_config.vocab_size - 1 if config.data.separate_documents else None
    train_step = make_train_step(
        language_model_loss(model, training.z_loss, separator, training.loss_chunk_tokens),
        optimizer,
        dropout_seed=training.seed if drops else None,
        accumulates=A > 1,
        steps_per_dispatch=K,
    )
    state = init_state(model, optimizer, training.seed)
    made = made_batches(model_config.vocab_size, K, training.batch_size, T, documents)
    batches = [tokens.reshape(K, A, B, T + 1) for tokens in made]
    counts_K, rates_K = np.full((K,), A, np.int32), np.full((K,), config.optimizer.peak_learning_rate, np.float32)
    done, losses = 0, []

    def batch() -> dict[str, jax.Array]:
        return {"tokens": sharding.put_batch(batches[done % len(batches)])}

    start = time.perf_counter()
    program = train_step.lower(state, batch(), counts_K, rates_K, K).compile()
    compile_seconds = time.perf_counter() - start

    def dispatch() -> dict[str, jax.Array]:
        nonlocal state, done
        state, metrics = program(state, batch(), counts_K, rates_K, K)
        done += 1
        return metrics

    def block() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            metrics = dispatch()
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - start
        losses.append(float(metrics["loss"][-1]))
        return seconds / (steps * K)

    first_loss = float(dispatch()["loss"][0])
    for _ in range(steps - 1):
        dispatch()

    def facts() -> dict[str, Any]:
        return {
            "micro_batch_size": B,
            "context_length": T,
            "steps_per_dispatch": K,
            "parameters": parameter_counts(model_config)["total"],
            "compile_seconds": compile_seconds,
            "peak_memory_bytes": measure.peak_memory_bytes(program),
            "steps": done * K,
            "first_loss": first_loss,
            "loss": losses[-1] if losses else None,
        }

    return Warm(block, facts, program)


def train_speed(config: Config, options: Any) -> dict[str, Any]:
    """Measure one configuration under the current mesh, alone."""
    warm = warm_up(config, options.steps, options.documents)
    seconds = [warm.block() for _ in range(options.blocks)]
    profile = {}
    if options.profile:
        with trace(options.profile):
            warm.block()
        found = kernels(options.profile, warm.program.as_text())
        profile = {"kernel_shares": shares(found), "largest_kernels": [kernel._asdict() for kernel in found[:10]]}
        if options.json != "-":
            print(report(found, options.steps * config.training.steps_per_dispatch))
            print(f"trace: {perfetto_file(options.profile)} (open it at https://ui.perfetto.dev)")
    device, size = jax.devices()[0], config.training.batch_size
    shape = size, config.sequence_length
    figures = measure.speed(config.model, shape, seconds, device.device_kind, jax.device_count())
    return {"batch_size": size, **figures, **warm.facts(), **profile}


def sized(config: Config, batch_size: int) -> Config:
    """The configuration with batches of this size, computed at once."""
    training = dataclasses.replace(
        config.training, batch_size=batch_size, micro_batch_size=None, batch_ramp_start=None, batch_ramp_tokens=0
    )
    return dataclasses.replace(config, training=training)


def alone(options: Any, config: Config) -> int:
    """A row for each batch size; or, paced, one arm of a comparison."""
    rows = []
    with jax.set_mesh(make_mesh(config.mesh)):
        for size in options.batch_sizes or [config.training.resolved_micro_batch_size]:
            if options.paced:
                warm = warm_up(sized(config, size), options.steps, options.documents)
                serve(warm.block, lambda facts=warm.facts: measure.machine() | facts())
                return 0
            known = {"config": str(options.config), **measure.machine()}
            try:
                rows.append(known | train_speed(sized(config, size), options))
            except jax.errors.JaxRuntimeError as error:
                if not measure.is_out_of_memory(error):
                    raise
                rows.append(known | {"batch_size": size, "tokens_per_second": None, "mfu": None, "error": "no memory"})
            measure.write(rows, options.json)
    measure.show(rows, COLUMNS, options.json)
    return 0


def side_by_side(options: Any, config: Config, words: Sequence[str]) -> int:
    """All arms at each batch size."""
    size = measure.made_vocab_size(config, options.vocab_size)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    rows = []
    for size in options.batch_sizes or [config.training.resolved_micro_batch_size]:
        rows += compare.compare(config, options, words, size, rows)
    measure.show(rows, compare.COLUMNS, options.json)
    if options.json != "-":
        print("\n".join(compare.verdict(rows)))
    return int(any(row.get("error") not in (None, "no memory") for row in rows))


def main(arguments: Sequence[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="sequences, one row each; default: the micro-batch")
    parser.add_argument("--blocks", type=int, help="blocks timed, or of each turn of an arm; default: 5, or 1")
    parser.add_argument("--steps", type=int, default=10, help="dispatches of a block")
    parser.add_argument("--documents", type=int, default=1, help="in each row, of random lengths; 1: any tokens")
    parser.add_argument("--cores", help="numbers of the processor's cores to use, with commas; default: all")
    side = parser.add_argument_group("side by side")
    side.add_argument("--against", action="append", help="nanogpt=CHECKOUT or gptjax=CHECKOUT; may be repeated")
    side.add_argument("--against-python", help="interpreter that has torch, for nanoGPT; default: this one")
    side.add_argument("--variant", action="append", help="'NAME: VARIABLE=value --section.field value'; repeatable")
    side.add_argument("--modes", nargs="+", default=["eager", "compiled"], help="of nanoGPT: eager fused compiled best")
    side.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: the configuration's")
    side.add_argument("--rounds", type=int, default=7, help="turns of each arm")
    side.add_argument("--fresh", action="store_true", help="a new process for each turn: memory is never shared")
    side.add_argument("--paced", action="store_true", help="be an arm: wait for a line before each block")
    options, config, words = measure.parse(parser, arguments)
    if options.cores:
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    compares = bool(options.against or options.variant)
    options.blocks = options.blocks or (1 if compares else 5)
    if compares:  # arms set their own flags: another checkout of gptjax may have others
        return side_by_side(options, config, words)
    platform.configure(profiled=options.profile is not None)
    return alone(options, measure.resolved(config, options.vocab_size))


if __name__ == "__main__":
    measure.run(main)
