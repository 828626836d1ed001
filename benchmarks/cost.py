"""How the time and memory of a training step grow with context, width, depth and batch, beside what the formulas say.

    python benchmarks/cost.py configs/gpt2_124m.py --json cost.json
    python benchmarks/cost.py configs/shakespeare_char_cpu.py --only context batch --values 512 2048 8192 16384

Each axis starts from the configuration and changes one thing; along `context` the tokens of a step stay the same, so
that the batch shrinks. `flops` are those of `training_flops_per_token`, attention in full; `causal` the same with the
keys that are seen alone. `time/flops` is the step's time over its FLOPs relative to the axis's first row: 1 means that
the cost grows as the formula says, less that larger work runs better. Memory is what XLA planned: `state` is what
the step is given (parameters and moments), `working` the rest (gradients, activations), here for each token.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import measure
import train_speed

from gptjax.config import Config
from gptjax.model.accounting import parameter_counts, training_flops_per_token
from gptjax.parallel import platform
from gptjax.parallel.mesh import make_mesh

AXES = {
    "context": (512, 1024, 2048, 4096, 8192, 16384),
    "width": (0.5, 1, 2, 3),
    "depth": (0.5, 1, 2, 3),
    "batch": (1, 2, 4, 8, 16, 32),
}
"""Tokens of a sequence; multiples of the configuration's heads, at its head size, and of its layers; sequences."""

COLUMNS = {
    "axis": "s",
    "value": ".5g",
    "batch_size": "d",
    "parameters": ",d",
    "step_ms": ",.1f",
    "tokens_per_second": ",.0f",
    "flops_per_token": ".3g",
    "time/flops": ".2f",
    "time/causal": ".2f",
    "state_bytes": ",d",
    "working_bytes_per_token": ",.0f",
}


def along(axis: str, value: float, base: Config, tokens: int) -> Config:
    """The configuration with one thing changed."""
    model, size = base.model, base.training.resolved_micro_batch_size
    if axis == "context":
        changed = dataclasses.replace(model, context_length=int(value))
        base = dataclasses.replace(base, training=dataclasses.replace(base.training, sequence_length=int(value)))
        size = max(1, tokens // int(value))
    elif axis == "width":
        heads, per_kv_head = max(1, round(value * model.num_heads)), model.num_heads // model.resolved_num_kv_heads
        width = heads * model.resolved_head_dim
        kv_heads = heads // per_kv_head if heads % per_kv_head == 0 else heads
        ffn = model.resolved_ffn_dim * width // model.model_dim
        changed = dataclasses.replace(
            model,
            num_heads=heads,
            num_kv_heads=kv_heads,
            model_dim=width,
            ffn_dim=ffn,
            head_dim=model.resolved_head_dim,
        )
    elif axis == "depth":
        changed = dataclasses.replace(model, num_layers=max(1, round(value * model.num_layers)))
    else:
        changed, size = model, int(value)
    return train_speed.sized(dataclasses.replace(base, model=changed), size)


def rows_along(axis: str, values: Sequence[float], base: Config, options: Any) -> Iterator[dict[str, Any]]:
    """A row for each value, until one does not fit into memory."""
    first: dict[str, float] = {}
    for value in values:
        config = along(axis, value, base, options.tokens)
        known = {"axis": axis, "value": value, "batch_size": config.training.batch_size, **measure.machine()}
        try:
            warm = train_speed.warm_up(config, options.steps)
            seconds = statistics.median(warm.block() for _ in range(options.blocks))
        except jax.errors.JaxRuntimeError as error:
            if not measure.is_out_of_memory(error):
                raise
            yield known | {"error": "no memory"}
            return
        flops, plan = training_flops_per_token(config.model, config.sequence_length), warm.program.memory_analysis()
        tokens = config.training.batch_size * config.sequence_length
        per_flop = {"time/flops": seconds / tokens / flops.total, "time/causal": seconds / tokens / flops.total_causal}
        first = first or per_flop
        yield known | {
            "context_length": config.sequence_length,
            "num_layers": config.model.num_layers,
            "model_dim": config.model.model_dim,
            "parameters": parameter_counts(config.model)["total"],
            "step_ms": 1000 * seconds,
            "tokens_per_second": tokens / seconds,
            "flops_per_token": flops.total,
            "causal_flops_per_token": flops.total_causal,
            **{name: figure / first[name] for name, figure in per_flop.items()},
            "state_bytes": int(plan.argument_size_in_bytes),
            "working_bytes_per_token": plan.temp_size_in_bytes / tokens,
        }


def main(arguments: Sequence[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--only", choices=AXES, nargs="+", default=[*AXES])
    parser.add_argument("--values", type=float, nargs="+", help="of the axis that --only names, in place of its own")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step along context")
    parser.add_argument("--steps", type=int, default=3, help="of a block")
    parser.add_argument("--blocks", type=int, default=3)
    platform.configure()
    options, config = measure.read(parser, arguments)
    rows = []
    with jax.set_mesh(make_mesh(config.mesh)):
        for axis in options.only:
            for row in rows_along(axis, options.values or AXES[axis], config, options):
                rows.append(row)
                measure.write(rows, options.json)
    measure.show(rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
