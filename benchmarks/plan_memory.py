"""Is the memory that `python -m gptjax plan` estimates what XLA plans? Ten training steps, compiled and not run.

    python benchmarks/plan_memory.py                     # all ten, a minute or two, on the CPU
    python benchmarks/plan_memory.py --json memory.json

The estimate is formulas (`model/accounting.py`); XLA's is `memory_analysis()` of the program that train.py runs:
arguments, results that do not take an argument's place, and temporaries, on one device. On a CPU the program computes
in float32. Exit status 1 if one is off by more than 10 %.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import measure

from gptjax.config import Config, ModelConfig, OptimizerConfig, TrainingConfig
from gptjax.model.devices import Device
from gptjax.model.kernels import choose, this_machine, training_calls
from gptjax.scaling.compiled import compile_step
from gptjax.scaling.plan import make_plan

TOLERANCE = 0.1
GPT2 = {
    "num_layers": 6,
    "scan_layers": True,
    "model_dim": 384,
    "num_heads": 6,
    "context_length": 512,
    "vocab_size": 8192,
}
LLAMA = GPT2 | {"norm": "rmsnorm", "positions": "rope", "feed_forward": "swiglu", "qk_norm": True, "bias": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": (GPT2, {"batch_size": 8}),
    "gpt2, T 2048": (GPT2 | {"context_length": 2048}, {"batch_size": 4}),
    "gpt2, save_dots": (GPT2 | {"remat": "save_dots"}, {"batch_size": 8}),
    "gpt2, full": (GPT2 | {"remat": "full"}, {"batch_size": 16}),
    "gpt2, accumulated": (GPT2, {"batch_size": 32, "micro_batch_size": 8}),
    "llama": (LLAMA, {"batch_size": 8}),
    "llama, 2 KV heads, untied": (LLAMA | {"num_kv_heads": 2, "tie_embeddings": False}, {"batch_size": 8}),
    "llama, save_attention": (LLAMA | {"remat": "save_attention", "num_layers": 12}, {"batch_size": 16}),
    "llama, full": (LLAMA | {"remat": "full", "num_layers": 12}, {"batch_size": 16}),
    "llama, V 50257, chunked": (LLAMA | {"vocab_size": 50257}, {"batch_size": 8, "loss_chunk_tokens": 512}),
}
COLUMNS = {"case": "", "parameters": ",d", "estimate_mb": ",.1f", "xla_mb": ",.1f", "error": "+.1%",
           "activations_mb": ",.1f", "logits_mb": ",.1f", "kernel": ""}  # fmt: skip


def check(name: str) -> dict[str, Any]:
    model, training = CASES[name]
    config = Config(model=ModelConfig(**model, compute_dtype="float32"), training=TrainingConfig(**training))
    calls = training_calls(config.model, documents=False, context=1)
    kernel = choose(next(iter(calls.values())), this_machine())
    plan = make_plan(config, Device("cpu", (), None, None, None), quadratic=kernel == "xla")
    compiled = compile_step(plan.model, OptimizerConfig(), config.training, plan.mesh).memory()
    total, found = plan.memory.total, compiled["total_bytes"]
    return {
        "case": name,
        "parameters": plan.parameters["total"],
        "kernel": kernel,
        "estimate_mb": total / 1e6,
        "xla_mb": found / 1e6,
        "error": total / found - 1,
        "activations_mb": plan.memory.activations / 1e6,
        "logits_mb": plan.memory.logits / 1e6,
        "arguments_mb": compiled["argument_bytes"] / 1e6,
        "temporary_mb": compiled["temporary_bytes"] / 1e6,
        "fields": {name: value for name, value in dataclasses.asdict(config.model).items() if name in model},
        "training": training,
        **measure.machine(),
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, nargs="+", default=[*CASES])
    parser.add_argument("--json", help="file for the results, or - for standard output")
    options = parser.parse_args(arguments)
    rows = [check(name) for name in options.only]
    measure.show(rows, COLUMNS, options.json)
    return int(any(abs(row["error"]) > TOLERANCE for row in rows))


if __name__ == "__main__":
    measure.run(main)
