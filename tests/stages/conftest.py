"""A small model that has learned a little to answer with sorted digits, and the data that it learned from."""

import dataclasses
import functools
import json
import random

import pytest

from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from gptjax.stages.train import train
from gptjax.text.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def lessons(once):
    """A folder with `talk.jsonl` (prompts and completions), `ranked.jsonl`, `text.txt` and a `tokenizer.json`."""
    return once("lessons", _write_lessons)


def _write_lessons(folder):
    draw = random.Random(0)
    numbers = sorted({"".join(draw.choices("0123456789", k=3)) for _ in range(160)})
    talk = [{"prompt": n, "completion": "".join(sorted(n))} for n in numbers]
    ranked = [{"prompt": n, "answers": ["".join(sorted(n)), "".join(sorted(n))[:2], n[::-1] + "0"]} for n in numbers]
    for name, lines in (("talk", talk), ("ranked", ranked)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "text.txt").write_text("user 0123456789\nassistant 9876543210\n" * 400)
    train_tokenizer(["0123456789\nuser assistant system"], TokenizerConfig(kind="char")).save(folder / "tokenizer.json")


def _config(folder, stage, run, file="talk.jsonl", **sections):
    config = Config(
        stage=stage,
        data=DataConfig(path=str(folder / file), prepared_dir=str(folder / "data")),
        optimizer=OptimizerConfig(peak_learning_rate=2e-3, schedule="constant", weight_decay=0.0),
        training=TrainingConfig(
            steps=4,
            batch_size=16,
            log_every_steps=1,
            eval_every_steps=2,
            sample_every_steps=0,
            sample_prompt="31",
            sample_tokens=6,
        ),
        guard=GuardConfig(spike_sigmas=0.0),
        checkpoint=CheckpointConfig(every_steps=2),
        run_dir=str(run),
    )
    for name, fields in sections.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **fields)})
    return config


@pytest.fixture(scope="session")
def stage_config(lessons):
    """Makes a short run of a stage, on one of the files of lessons; sections are merged field by field."""
    return functools.partial(_config, lessons)


@pytest.fixture(scope="session")
def talker(once, lessons, stage_config):
    """The folder of a run of `sft`, from drawn parameters."""
    model = ModelConfig(
        num_layers=2, model_dim=32, num_heads=4, context_length=48, norm="rmsnorm", positions="rope", bias=False
    )

    def fill(folder):
        config = stage_config(
            "sft",
            folder,
            training={"steps": None, "epochs": 8, "eval_every_steps": 4},
            tokenizer={"path": str(lessons / "tokenizer.json")},
        )
        train(dataclasses.replace(config, model=model))

    return once("talker", fill)


@pytest.fixture(scope="session")
def judge(once, talker, stage_config):
    """The folder of a reward model."""
    sections = {"model": {"init_from": str(talker)}, "training": {"steps": 12}}
    return once("judge", lambda folder: train(stage_config("reward", folder, "ranked.jsonl", **sections)))
