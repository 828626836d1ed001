"""Train every configuration in configs/ for ten steps at one layer and its full width, and sample from it.

`python benchmarks/every_preset.py --data TEXT` prints a line for each: parameters as published, parameters trained,
first and last loss, and how a sample begins. Depth, context, batch and warm-up are reduced so that a machine without
an accelerator can do it; one whose single layer would need more than `--max-gigabytes` is narrowed as well, and says
so.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from gptjax.cli import open_output
from gptjax.config import Config
from gptjax.config_files import load_config
from gptjax.parallel import platform

ROOT = Path(__file__).parent.parent
BYTES_PER_PARAMETER = 20  # parameters, gradients, two moments, and the copy that a checkpoint takes
VOCAB_SIZE = 1024


def reduced(config: Config, max_bytes: float) -> Config:
    """One layer, a short context and a small vocabulary; at full width where that fits."""
    from gptjax.model.accounting import parameter_counts

    model = dataclasses.replace(config.model, num_layers=len(config.model.attention_pattern), context_length=64)
    while (
        parameter_counts(dataclasses.replace(model, vocab_size=VOCAB_SIZE))["total"] * BYTES_PER_PARAMETER > max_bytes
    ):
        heads = model.num_heads // 2  # 25 of them are no even number
        model = dataclasses.replace(model, model_dim=heads * model.resolved_head_dim, num_heads=heads)
    training = dataclasses.replace(
        config.training,
        steps=10,
        batch_size=8,
        micro_batch_size=4,
        batch_ramp_start=4 if config.training.batch_ramp_start else None,
        batch_ramp_tokens=1000 if config.training.batch_ramp_tokens else 0,
        log_every_steps=1,
        eval_every_steps=0,
        sample_every_steps=0,
        eval_sequences=8,
        sample_tokens=16,
    )
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=2, warmup_tokens=0)
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=VOCAB_SIZE)
    return dataclasses.replace(config, model=model, training=training, optimizer=optimizer, tokenizer=tokenizer)


NO_PRESETS = ("sft", "reward", "dpo", "ppo", "grpo", "recipe_tiny")
"""Files of stages that start from a run, or of several runs."""
PRESETS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem not in NO_PRESETS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="stdlib://")
    parser.add_argument("--max-gigabytes", type=float, default=8)
    parser.add_argument("--configs", type=Path, nargs="*", default=PRESETS)
    parser.add_argument("--json", help="file for the lines as JSON, one object each, or - for standard output")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr if arguments.json == "-" else sys.stdout):
        rows = train_all(arguments)
    if arguments.json:
        with open_output(arguments.json) as file:
            print(json.dumps(rows, ensure_ascii=False), file=file)
    return 0


def train_all(arguments: argparse.Namespace) -> list[dict[str, str | int | float]]:
    """A row for each configuration, printed as it is trained."""
    platform.configure()

    from gptjax.model.accounting import parameter_counts
    from gptjax.sampling.config import SamplingConfig
    from gptjax.sampling.generate import generate
    from gptjax.stages.train import train
    from gptjax.training.load import load_run
    from gptjax.training.metrics import Console, read_metrics

    rows = []
    print(f"{'configuration':22} {'published':>15} {'trained':>13} {'width':>6}  {'loss':>14}  a sample begins")
    for path in arguments.configs:
        with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w", encoding="utf-8") as log:
            whole = load_config(path)
            config = reduced(whole, arguments.max_gigabytes * 1e9)
            place = {"path": (arguments.data,), "prepared_dir": f"{folder}/data"}
            data = dataclasses.replace(config.data, **place, validation_fraction=0.05)
            config = dataclasses.replace(config, data=data, run_dir=f"{folder}/run")
            summary = train(config, console=Console(log))
            losses = [r["loss"] for r in read_metrics(f"{folder}/run/metrics.jsonl") if "loss" in r]
            run = load_run(f"{folder}/run")
            sampling = SamplingConfig(max_tokens=12)
            (completion,) = generate(run.config.model, run.params, run.tokenizer, ["The "], sampling)
            vocab_size = run.tokenizer.vocab_size if whole.tokenizer.kind == "char" else whole.tokenizer.vocab_size
            published = parameter_counts(dataclasses.replace(whole.model, vocab_size=vocab_size))["total"]
            width, full = config.model.model_dim, whole.model.model_dim
            rows.append(
                {
                    "configuration": path.stem,
                    "published_parameters": published,
                    "parameters": summary["parameters"],
                    "model_dim": width,
                    "published_model_dim": full,
                    "first_loss": losses[0],
                    "final_loss": losses[-1],
                    "sample": completion.text,
                }
            )
            narrowed = "" if width == full else f" (of {full})"
            print(
                f"{path.stem:22} {published:15,} {summary['parameters']:13,} {width:6}{narrowed}  "
                f"{losses[0]:6.3f} → {losses[-1]:5.3f}  {completion.text[:30]!r}",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())
