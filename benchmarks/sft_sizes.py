"""Supervised fine-tuning at three sizes: held-out loss of answers over the steps, and answers before and after.

    python benchmarks/sft_sizes.py TEXT CONVERSATIONS [CONVERSATIONS ...] --out sft_sizes.json

Each size is pretrained on TEXT first. Conversations longer than the context are left out.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import itertools

import jax

from gptjax.config import Config, ModelConfig
from gptjax.config_files import load_config
from gptjax.parallel.mesh import one_device_mesh
from gptjax.sampling.chat import chat
from gptjax.sampling.config import SamplingConfig
from gptjax.stages.chats import layout_of_run
from gptjax.stages.train import train
from gptjax.text.chat import Message
from gptjax.training.load import load_run
from gptjax.training.metrics import Console, read_metrics

ROOT = Path(__file__).parent.parent
WIDTHS = (64, 128, 192)
QUESTIONS = (
    "What is the capital of France?",
    "Convert 45 kilometers to meters.",
    "Rewrite in the past tense: He runs.",
)


def pretraining(width: int, text: str, steps: int, run: Path) -> Config:
    config = load_config(ROOT / "configs" / "quickstart.py")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, model_dim=width, num_heads=width // 64, context_length=256),
        data=dataclasses.replace(config.data, path=(text,)),
        training=dataclasses.replace(config.training, steps=steps, sample_every_steps=0, eval_sequences=64),
        run_dir=str(run),
    )


def tuning(start: Path, data: list[str], epochs: float, run: Path) -> Config:
    config = load_config(ROOT / "configs" / "sft.py")
    return dataclasses.replace(
        config,
        model=ModelConfig(init_from=str(start), residual_dropout=0.1),
        data=dataclasses.replace(config.data, path=tuple(data), on_long="skip", on_error="skip"),
        training=dataclasses.replace(
            config.training, epochs=epochs, batch_size=16, eval_every_steps=25, eval_sequences=0
        ),
        run_dir=str(run),
    )


def answers(run: Path, layout_from: Path) -> list[str]:
    """What a run answers, laid out as another does: its own start has no layout yet."""
    with jax.set_mesh(one_device_mesh()):
        loaded = load_run(run)
        form = layout_of_run(layout_from, loaded.tokenizer)
        asked = [[Message("user", question)] for question in QUESTIONS]
        model = (loaded.config.model, loaded.params, loaded.tokenizer, form)
        return chat(*model, asked, SamplingConfig(max_tokens=40, temperature=0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("conversations", nargs="+")
    parser.add_argument("--out", help="JSON file; - is standard output")
    parser.add_argument("--steps", type=int, default=800, help="of pretraining")
    parser.add_argument("--epochs", type=float, default=3.0, help="of tuning")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for width in WIDTHS:
            base, tuned = Path(folder, f"base{width}"), Path(folder, f"sft{width}")
            with Console(sys.stderr) as console:
                train(pretraining(width, options.text, options.steps, base), console=console)
                summary = train(tuning(base, options.conversations, options.epochs, tuned), console=console)
            losses = [r["val_loss"] for r in read_metrics(tuned / "metrics.jsonl") if "val_loss" in r]
            rows.append(
                {
                    "width": width,
                    "parameters": summary["parameters"],
                    "losses": losses,
                    "monotonic": all(after < before for before, after in itertools.pairwise(losses)),
                    "before": answers(base, tuned),
                    "after": answers(tuned, tuned),
                }
            )
            if options.out not in (None, "-"):
                Path(options.out).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        losses = " ".join(f"{loss:.3f}" for loss in row["losses"])
        print(
            f"width {row['width']}, {row['parameters']:,} parameters, every 25 steps: {losses}"
            f"{'' if row['monotonic'] else '  (NOT monotonic)'}"
        )
        for question, before, after in zip(QUESTIONS, row["before"], row["after"], strict=True):
            print(f"  {question}\n    before: {before!r}\n    after:  {after!r}")
    if options.out == "-":
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
