"""Reinforcement on a task that can be verified: answer with the digits sorted.

A small model learns the task a little from demonstrations (it starts below 30 %), and the rest by GRPO and by PPO from
nothing but whether its answers are right. With the rewards of other answers nothing is to be learned.

    python benchmarks/sorted_digits.py --out sorted_digits.json --seeds 0 1 2
"""

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GrpoConfig,
    GuardConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    RlConfig,
    TokenizerConfig,
    TrainingConfig,
)
from gptjax.stages.train import train
from gptjax.text.tokenizer_training import train_tokenizer
from gptjax.training.metrics import Console, read_metrics

DIGITS = 5
MODEL = ModelConfig(
    num_layers=2, model_dim=96, num_heads=4, context_length=48, positions="rope", norm="rmsnorm", bias=False
)


def write_data(folder: Path) -> tuple[Path, Path]:
    """Demonstrations, and a tokenizer of their characters."""
    draw = random.Random(0)
    numbers = {"".join(draw.choices("0123456789", k=DIGITS)) for _ in range(3000)}
    data, tokenizer = folder / "digits.jsonl", folder / "tokenizer.json"
    lines = [json.dumps({"prompt": n, "completion": "".join(sorted(n))}) for n in sorted(numbers)]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    train_tokenizer(["0123456789\nuser assistant"], TokenizerConfig(kind="char")).save(tokenizer)
    return data, tokenizer


def sft(data: Path, tokenizer: Path, seed: int, steps: int, run: Path) -> Config:
    return Config(
        stage="sft",
        model=MODEL,
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        data=DataConfig(path=str(data)),
        optimizer=OptimizerConfig(peak_learning_rate=2e-3, warmup_steps=20),
        training=TrainingConfig(
            steps=steps, batch_size=32, eval_every_steps=0, sample_every_steps=0, sample_prompt="31415", seed=seed
        ),
        checkpoint=CheckpointConfig(every_steps=0),
        run_dir=str(run),
    )


def reinforced(stage: str, data: Path, start: Path, seed: int, steps: int, shuffled: bool, run: Path) -> Config:
    return Config(
        stage=stage,
        model=ModelConfig(init_from=str(start)),
        data=DataConfig(path=str(data)),
        rl=RlConfig(reward="exact", answers=512, answer_tokens=DIGITS + 2, shuffle_rewards=shuffled),
        grpo=GrpoConfig(
            # Where few answers are right, those few should count: the deviation divides.
            group_size=8,
            aggregate="token",
            clip_high=0.28,
            dynamic_sampling=True,
        ),
        ppo=PpoConfig(kl_coefficient=0.005, value_learning_rate=1e-3, ema_decay=0.9),
        optimizer=OptimizerConfig(peak_learning_rate=3e-4, schedule="linear", warmup_steps=10, weight_decay=0.0),
        training=TrainingConfig(
            steps=steps,
            batch_size=256,
            log_every_steps=2,
            eval_every_steps=20,
            eval_sequences=0,
            sample_every_steps=0,
            seed=seed,
        ),
        guard=GuardConfig(spike_sigmas=0.0),
        checkpoint=CheckpointConfig(every_steps=0),
        run_dir=str(run),
    )


def learned(config: Config) -> tuple[list[float], float, float | None]:
    """Held-out rewards over the run, its seconds, and those until 90 %."""
    begun = time.perf_counter()
    with Console(sys.stderr) as console:
        train(config, console=console)
    seconds, records = time.perf_counter() - begun, read_metrics(Path(config.run_dir) / "metrics.jsonl")
    found = [record["val_reward"] for record in records if "val_reward" in record]
    enough = next((r["step"] for r in records if r.get("val_reward", 0) >= 0.9), None)
    until = next((r["seconds"] for r in records if enough and r["step"] >= enough and "seconds" in r), None)
    return found, seconds, until


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=None, help="JSON file; - is standard output")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", default=["grpo", "ppo"], choices=["grpo", "ppo"])
    parser.add_argument("--sft-steps", type=int, default=45)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--control-steps", type=int, default=200, help="of the runs with shuffled rewards")
    parser.add_argument("--no-control", action="store_true", help="leave the shuffled rewards out")
    parser.add_argument("--folder", default=None, help="where runs are kept; default: nowhere")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data, tokenizer = write_data(folder)
        for seed in options.seeds:
            start = folder / f"sft{seed}"
            with Console(sys.stderr) as console:
                train(sft(data, tokenizer, seed, options.sft_steps, start), console=console)
            for stage in options.stages:
                for shuffled in (False,) if options.no_control else (False, True):
                    run = folder / f"{stage}{seed}{'-shuffled' * shuffled}"
                    steps = options.control_steps if shuffled else options.steps
                    config = reinforced(stage, data, start, seed, steps, shuffled, run)
                    before = dataclasses.replace(
                        config,
                        training=dataclasses.replace(config.training, steps=2),
                        run_dir=f"{run}-start",
                        optimizer=dataclasses.replace(config.optimizer, peak_learning_rate=1e-12),
                    )
                    began = learned(before)[0][-1]
                    found, seconds, until = learned(config)
                    rows.append(
                        {
                            "stage": stage,
                            "seed": seed,
                            "shuffled": shuffled,
                            "start": began,
                            "end": found[-1],
                            "best": max(found),
                            "seconds": seconds,
                            "seconds_to_90_percent": until,
                        }
                    )
                    print(rows[-1], file=sys.stderr, flush=True)
                    if options.out not in (None, "-"):  # a killed call loses nothing
                        Path(options.out).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(f"{'stage':6} {'seed':>4} {'rewards':>9} {'start':>7} {'end':>7} {'seconds to 90 %':>16} {'seconds':>8}")
    for row in rows:
        until = "never" if row["seconds_to_90_percent"] is None else f"{row['seconds_to_90_percent']:.0f}"
        kind = "shuffled" if row["shuffled"] else "own"
        print(
            f"{row['stage']:6} {row['seed']:4} {kind:>9} {row['start']:7.1%} {row['end']:7.1%} {until:>16} "
            f"{row['seconds']:8.0f}"
        )
    if options.out == "-":
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
