"""Large models compiled for hundreds of devices that are not there: does the step fit their memory?

    python benchmarks/compile_at_size.py            # all three; some minutes and no accelerator
    python benchmarks/compile_at_size.py --only 6.7B --json compiled.json

Each program is the one that train.py runs, with abstract parameters, for fake CPU devices in a process of its own. XLA
plans its memory: per device the arguments (parameters, optimizer state, batch), which are updated in place, and the
temporary rest (gradients, activations, gathered parameters). XLA's CPU backend computes bfloat16 in float32, so that
temporaries are larger than a GPU's, up to twofold. Exit status 1 if a device would need 80 GB or more.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LIMIT_BYTES = 80 * 10**9
CASES: dict[str, dict[str, Any]] = {
    "175B": {"size": "175B", "mesh": {"fsdp": 64, "tensor": 8}, "batch": 1536, "micro": 64},
    "6.7B": {"size": "6.7B", "mesh": {"fsdp": 8}, "batch": 1024, "micro": 8},
    "6.7B, context 131072": {
        "size": "6.7B",
        "mesh": {"fsdp": 1, "context": 16},
        "batch": 1,
        "micro": 1,
        "context_length": 131072,
    },
}


def num_devices(case: dict[str, Any]) -> int:
    product = 1
    for size in case["mesh"].values():
        product *= size
    return product


def compile_case(name: str) -> dict[str, Any]:
    """Compile one case in this process, which must have its fake devices."""
    import jax

    from gptjax.config import MeshConfig, TrainingConfig
    from gptjax.model.accounting import parameter_counts
    from gptjax.parallel.collectives import bytes_by_kind
    from gptjax.presets import gpt3
    from gptjax.scaling.compiled import compile_step

    case = CASES[name]
    preset = gpt3(case["size"])
    model = dataclasses.replace(
        preset.model,
        vocab_size=50257,
        context_length=case.get("context_length", preset.model.context_length),
        compute_dtype="bfloat16",
        scan_layers=True,
        remat="full",
        **({"positions": "rope"} if "context_length" in case else {}),
    )
    training = TrainingConfig(batch_size=case["batch"], micro_batch_size=case["micro"])
    compiled = compile_step(model, preset.optimizer, training, MeshConfig(data=1, **case["mesh"]))
    return {
        "case": name,
        "devices": num_devices(case),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in case["mesh"].items()),
        "batch_size": case["batch"],
        "micro_batch_size": training.resolved_micro_batch_size,
        "context_length": model.context_length,
        "parameters": parameter_counts(model)["total"],
        **compiled.memory(),
        "collective_bytes": dict(bytes_by_kind(compiled.program.as_text())),
        "compile_seconds": compiled.seconds,
        "jax": jax.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, nargs="+", default=[*CASES])
    parser.add_argument("--json", help="file for the figures, or - for standard output")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(compile_case(options.child)))
        return 0
    rows = []
    for name in options.only:
        flags = f"--xla_force_host_platform_device_count={num_devices(CASES[name])} --xla_backend_optimization_level=0"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, __file__, "--child", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        if options.json != "-":
            row = rows[-1]
            print(
                f"{name:22} {row['devices']:4} devices, {row['mesh']:22} "
                f"arguments {row['argument_bytes'] / 1e9:6.2f} GB  temporary {row['temporary_bytes'] / 1e9:6.2f} GB  "
                f"together {row['total_bytes'] / 1e9:6.2f} GB  compiled in {row['compile_seconds']:.0f} s",
                flush=True,
            )
    text = json.dumps(rows)
    if options.json == "-":
        print(text)
    elif options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return int(any(row["total_bytes"] >= LIMIT_BYTES for row in rows))


if __name__ == "__main__":
    sys.exit(main())
