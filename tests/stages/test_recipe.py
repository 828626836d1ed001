"""A recipe: whole, stopped and continued, and its table."""

import json
from pathlib import Path
from unittest import mock

import pytest

import train
from gptjax.__main__ import main
from gptjax.config import Config, ModelConfig
from gptjax.data.forms import conversation_of, ranked_answers_of
from gptjax.data.made import CONVERSATIONS, PREFERENCES, made
from gptjax.data.records import Record
from gptjax.errors import UserError
from gptjax.recipe import Recipe

RECIPE = """
from gptjax.config import *
from gptjax.recipe import Recipe

TRAINING = dict(steps=2, batch_size=8, log_every_steps=1, sample_every_steps=0, sample_prompt="a", sample_tokens=4)
NEVER = CheckpointConfig(every_steps=0)
pretrain = Config(
    model=ModelConfig(num_layers=1, model_dim=32, num_heads=2, context_length=128, positions="rope"),
    tokenizer=TokenizerConfig(kind="byte"),
    data=DataConfig(path="text.txt"),
    training=TrainingConfig(**TRAINING),
    checkpoint=NEVER,
)
def tuned(stage, data, **sections):
    return Config(
        stage=stage, model=ModelConfig(init_from=sections.pop("start", "sft")),
        data=DataConfig(path=data, on_long="skip"),
        training=TrainingConfig(**TRAINING, eval_sequences=8), checkpoint=NEVER, guard=GuardConfig(spike_sigmas=0.0),
        **sections,
    )
PREFERENCES = "made://preferences"
recipe = Recipe({
    "pretrain": pretrain,
    "sft": tuned("sft", "made://conversations", start="pretrain"),
    "reward": tuned("reward", PREFERENCES),
    "ppo": tuned("ppo", PREFERENCES, rl=RlConfig(reward="reward", answers=16, answer_tokens=8)),
})
"""


def test_a_recipe_goes_on_and_ends_with_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 400)
    monkeypatch.setattr("gptjax.data.made.NUM_CONVERSATIONS", 120)
    monkeypatch.setattr("gptjax.data.made.NUM_PREFERENCES", 120)
    monkeypatch.setattr("gptjax.stages.recipe.COMPARED", 8)
    from gptjax.stages.train import train

    begun = []

    def stopping(config, name):
        begun.append(name)
        return {"stopped": "preempted"} if begun.count("reward") == 1 and name == "reward" else train(config, name=name)

    with mock.patch("gptjax.stages.recipe.train", stopping):
        assert main(["recipe", "r.py"]) == 75
        assert "go on with: python -m gptjax recipe r.py --dir recipes/r" in capsys.readouterr().out
        assert main(["recipe", "r.py"]) == 0
    assert begun == ["pretrain", "sft", "reward", "pretrain", "sft", "reward", "ppo"]
    output = capsys.readouterr().out
    assert output.count("is finished") == 2, "what had ended was not trained again"
    rows = json.loads((tmp_path / "recipes" / "r" / "recipe.json").read_text())
    assert [row["run"] for row in rows] == ["pretrain", "sft", "ppo"]
    sft = rows[1]
    assert sft["win_rate"] == 0.5
    assert abs(sft["kl"]) < 1e-3, "it is the model that the others are compared with"
    assert rows[0]["reward"] is None
    assert all(row["kl"] is not None and 0 <= row["win_rate"] <= 1 for row in rows[1:])
    assert "| ppo | ppo |" in (tmp_path / "recipes" / "r" / "recipe.md").read_text()


def test_made_records_are_examples():
    """Every one is one; always the same; and no right answer is also a wrong one."""
    for name, of in ((CONVERSATIONS, conversation_of), (PREFERENCES, ranked_answers_of)):
        records = list(made(name))
        assert records == list(made(name))
        for number, values in enumerate(records):
            found = of(Record(values, f"{name}:{number}"))
            if name == PREFERENCES:
                assert len(set(found.answers)) == 3, values


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ({}, "the recipe has no runs"),
        ({"a b": Config()}, "names are words"),
        (
            {"sft": Config(model=ModelConfig(init_from="base"))},
            "starts from 'base', which is none of those before it",
        ),
    ],
)
def test_bad_recipes(runs, expected):
    with pytest.raises(UserError, match=expected):
        Recipe(runs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no recipe given"),
        ("", "does not assign"),
        ("1 / 0", "ZeroDivisionError"),
        ("missing", "no recipe missing.py"),
    ],
)
def test_bad_recipe_files(text, expected, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    if text not in (None, "missing"):
        (tmp_path / "r.py").write_text(text)
    arguments = [] if text is None else ["missing.py" if text == "missing" else "r.py"]
    assert expected in refusal(main, "recipe", *arguments)


def test_a_recipe_is_no_configuration(refusal):
    file = Path(__file__).parents[2] / "configs" / "recipe_tiny.py"
    assert f"python -m gptjax recipe {file}" in refusal(train.main, str(file))
