"""Rows that are shorter, or longer, than what the model can read: `training.sequence_length` in every stage."""

import dataclasses
import io
import json
import math

import jax
import numpy as np
import pytest

from gptjax.config import Config, DataConfig, ModelConfig, TokenizerConfig, TrainingConfig
from gptjax.config_files import to_dict
from gptjax.errors import UserError
from gptjax.interop.transfer import export_run, import_model
from gptjax.stages import callbacks, start
from gptjax.stages.dry_run import first_rows
from gptjax.stages.train import train
from gptjax.training import loop, run_dir
from gptjax.training.load import load_run
from gptjax.training.metrics import Console, read_metrics
from gptjax.training.state import draw_params

SHORT, CONTEXT = 32, 48
RL = {"reward": "exact", "answers": 16, "answer_tokens": 6}


def records(run, timed=("seconds", "tokens_per_second", "data_wait_fraction")):
    return [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(run / "metrics.jsonl")]


@pytest.fixture
def batches(monkeypatch):
    """The shapes of what the train step is given, by name, the last of each."""
    shapes, make = {}, loop.next_batch

    def seen(*arguments):
        made = make(*arguments)
        shapes.update({name: values.shape for name, values in made[0].items()})
        return made

    monkeypatch.setattr(loop, "next_batch", seen)
    return shapes


@pytest.mark.parametrize(
    ("stage", "file"),
    [("sft", "talk"), ("reward", "ranked"), ("dpo", "ranked"), ("grpo", "talk"), ("ppo", "talk")],
)
def test_every_stage_has_rows_of_that_length(stage_config, lessons, talker, tmp_path, batches, stage, file):
    """Nothing that is learned from or counted is longer, and the model can read as much as before."""
    text = {"pretraining_path": (str(lessons / "text.txt"),), "pretraining_rows": 1} if stage == "ppo" else {}
    config = stage_config(
        *(stage, tmp_path / "run", f"{file}.jsonl"),
        model={"init_from": str(talker)},
        rl=RL,
        ppo=text,
        data={"on_long": "skip"},
        training={"sequence_length": SHORT, "steps": 2},
    )
    train(config, console=Console(shown := io.StringIO()))
    saved, _ = run_dir.load_run_config(tmp_path / "run")
    assert (saved.training.sequence_length, saved.model.context_length) == (SHORT, CONTEXT)
    longest = batches["tokens"][-1]
    assert longest <= SHORT + 1 if stage in ("grpo", "ppo") else longest == SHORT + (stage != "reward")
    assert ("pretraining" in batches) == (stage == "ppo")
    assert batches.get("pretraining", (SHORT + 1,))[-1] == SHORT + 1
    last = [record for record in records(tmp_path / "run") if "loss" in record][-1]
    rows = [batches[name][3:] for name in ("tokens", "pretraining") if name in batches]  # of one sequence
    assert last["tokens"] == 2 * 16 * sum(math.prod(row[:-1]) * (row[-1] - (stage != "reward")) for row in rows)
    assert "rows: training.sequence_length 32 is shorter than the model's context of 48" in shown.getvalue()
    rows = first_rows(config, log=lambda line: None)
    assert rows.tokens_BT.shape[1] <= SHORT + 1


def test_it_comes_down_from_run_to_run(stage_config, talker, tmp_path):
    """A run has the rows of the one that it starts from, unless it is told otherwise."""

    def length_of(source, **training):
        said = []
        config = stage_config("sft", tmp_path / "none", model={"init_from": str(source)}, training=training)
        return start.inherit(config, log=said.append).training.sequence_length, said

    length, (line,) = length_of(talker)
    assert length == CONTEXT
    assert line.startswith(f"rows of 48 tokens: those of {talker}")
    short = {"model": {"init_from": str(talker)}, "training": {"sequence_length": SHORT, "steps": 1}}
    train(stage_config("sft", tmp_path / "short", **short, data={"on_long": "skip"}))
    assert length_of(tmp_path / "short")[0] == SHORT
    assert length_of(tmp_path / "short", sequence_length=CONTEXT) == (CONTEXT, [])


def test_a_foreign_model_has_rows_of_bounded_length(stage_config, from_text, tmp_path):
    """What it can read is no length for every row: 2,048 at most, in what was imported, too, before and now."""
    llama = {"norm": "rmsnorm", "positions": "rope", "feed_forward": "swiglu", "context_length": 16}
    train(from_text("ours", llama, steps=1))
    export_run(load_run(tmp_path / "ours"), tmp_path / "theirs")
    card = tmp_path / "theirs" / "config.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"max_position_embeddings": 131072}))
    import_model(tmp_path / "theirs", tmp_path / "imported", lambda line: None)
    assert load_run(tmp_path / "theirs").config.training.sequence_length == 2048
    old = tmp_path / "imported" / "config.json"
    for _ in range(2):
        for source in ("theirs", "imported"):
            said = []
            config = stage_config("sft", tmp_path / "none", model={"init_from": str(tmp_path / source)})
            config = start.inherit(config, log=said.append)
            assert (config.training.sequence_length, config.model.context_length) == (2048, 131072)
            assert [line.split(":")[0] for line in said] == ["rows of 2048 tokens"]
        values = json.loads(old.read_text())
        values["training"].pop("sequence_length", None)  # as it was saved before there was the field
        old.write_text(json.dumps(values))


def test_dropout_that_a_model_has_not_met_is_said(stage_config, from_text, tmp_path):
    """A pretrained model may answer with a loss of several nats more; what was trained here is left to its user."""
    llama = {"norm": "rmsnorm", "positions": "rope", "feed_forward": "swiglu", "context_length": 16}
    train(from_text("ours", llama, steps=1))
    export_run(load_run(tmp_path / "ours"), tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "imported", lambda line: None)
    for source, rate, named in (("theirs", 0.2, 1), ("imported", 0.2, 1), ("imported", 0.0, 0), ("ours", 0.2, 0)):
        said = []
        model = {"init_from": str(tmp_path / source), "residual_dropout": rate}
        start.inherit(stage_config("sft", tmp_path / "none", model=model), log=said.append)
        assert sum("--model.residual-dropout 0 leaves it out" in line for line in said) == named


@pytest.fixture
def from_text(lessons, tmp_path):
    """Makes a short run of pretraining on drawn parameters."""

    def make(name, model, **training):
        training = {"steps": 4, "batch_size": 8, "log_every_steps": 1, "eval_every_steps": 2} | training
        shape = {"num_layers": 1, "model_dim": 32, "num_heads": 4, "bias": False}
        return Config(
            model=ModelConfig(**shape | model),
            tokenizer=TokenizerConfig(path=str(lessons / "tokenizer.json")),
            data=DataConfig(path=str(lessons / "text.txt"), prepared_dir=str(tmp_path / "data")),
            training=TrainingConfig(**training, sample_every_steps=0, sample_tokens=2),
            run_dir=str(tmp_path / name),
        )

    return make


def test_rotary_rows_are_those_of_a_model_with_that_context(from_text, tmp_path):
    """Where nothing depends on the context but the rows, both ways to say it give the same losses, bit for bit; so does
    saying what is so anyway, and what is evaluated in training has such rows, too."""
    rope = {"positions": "rope"}
    train(from_text("context", rope | {"context_length": 16}))
    train(from_text("rows", rope | {"context_length": 64}, sequence_length=16))
    train(from_text("said", rope | {"context_length": 16}, sequence_length=16))
    train(
        from_text("longer", rope | {"context_length": 8}, sequence_length=16), console=Console(shown := io.StringIO())
    )
    one, *others = (records(tmp_path / name) for name in ("context", "rows", "said", "longer"))
    assert all(other == one for other in others)
    assert (
        "rows: training.sequence_length 16 is longer than the model's context of 8, where samples end"
        in shown.getvalue()
    )


def test_learned_positions_are_as_many_as_the_context(from_text, tmp_path):
    """A table of 64 of which rows reach 16: the others stay as they were drawn, but for weight decay."""
    train(from_text("run", {"context_length": 64}, sequence_length=16))
    run = load_run(tmp_path / "run")
    table, drawn = (np.asarray(params["positions"]) for params in (run.params, draw_params(run.model, 0)))
    assert table.shape[0] == 64
    decayed = table[16:] / drawn[16:]
    np.testing.assert_allclose(decayed, decayed[0, 0], rtol=1e-5)
    assert (table[:16] / drawn[:16]).std() > 1e-3
    more = [record for record in records(tmp_path / "run") if "loss" in record]
    assert more[-1]["tokens"] == 4 * 8 * 16
    with pytest.raises(
        UserError, match=r"training\.sequence_length 65 is more than model\.context_length 64.*; 64 works"
    ):
        train(from_text("none", {"context_length": 64}, sequence_length=65))
    assert not (tmp_path / "none").exists()


def test_runs_from_before_go_on(stage_config, talker, tmp_path, monkeypatch):
    """A configuration without the field, in config.json and in checkpoints, meant the context: the run goes on, and to
    the bits of one that was not stopped. Another length is refused."""

    def old(config):
        values = to_dict(config)
        del values["training"]["sequence_length"]
        return values

    def config(name, steps, **training):
        return stage_config(
            "sft", tmp_path / name, model={"init_from": str(talker)}, training={"steps": steps} | training
        )

    train(config("through", 4))
    with monkeypatch.context() as before:
        before.setattr(run_dir, "to_dict", old)
        before.setattr(callbacks, "to_dict", old)
        train(config("stopped", 2))
    saved = json.loads((tmp_path / "stopped" / "config.json").read_text())
    assert "sequence_length" not in saved["training"]
    train(config("stopped", 4))
    assert records(tmp_path / "stopped") == records(tmp_path / "through")
    one, other = (load_run(tmp_path / name).params for name in ("through", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    with pytest.raises(UserError, match=r"training\.sequence_length 48 → 32; leave these as they were"):
        train(config("stopped", 6, sequence_length=SHORT))


@pytest.mark.parametrize(
    ("stage", "file", "expected"),
    [
        ("sft", "talk.jsonl", r"tokens do not fit training\.sequence_length 16 .* training\.sequence_length \d+ would"),
        ("dpo", "ranked.jsonl", r"tokens do not fit training\.sequence_length 16 .*this one"),
        ("reward", "ranked.jsonl", r"tokens do not fit training\.sequence_length 16 .*this one"),
        ("grpo", "talk.jsonl", r"of which training\.sequence_length 16 leaves 10 beside rl\.answer_tokens"),
    ],
)
def test_what_is_longer_is_refused_by_name(stage_config, talker, tmp_path, stage, file, expected):
    """`data.on_long` decides, and the message names the field and the length that would do."""
    config = stage_config(
        stage, tmp_path / "run", file, model={"init_from": str(talker)}, rl=RL, training={"sequence_length": 16}
    )
    with pytest.raises(UserError, match=expected):
        train(config)


def test_the_length_that_is_named_works(stage_config, talker, tmp_path):
    """Of every stage whose rows are read: with it nothing is too long any more."""
    for stage, file in (("sft", "talk.jsonl"), ("reward", "ranked.jsonl"), ("dpo", "ranked.jsonl")):
        length = 16
        for _ in range(5):  # of ranked answers the first that is too long is named, not the longest
            config = stage_config(
                stage, tmp_path / "run", file, model={"init_from": str(talker)}, training={"sequence_length": length}
            )
            try:
                assert first_rows(config, log=lambda line: None).tokens_BT.shape[1] <= length + 1
                break
            except UserError as error:
                (word,) = [part for part in str(error).split("; ")[1].split(", ") if "would hold" in part]
                length = int(word.split("sequence_length ")[1].split()[0])
        else:
            pytest.fail(f"{stage}: never long enough")


def test_prompts_that_are_let_in_can_be_answered(stage_config, talker, tmp_path):
    """The longest prompt that is kept has room for an answer, in the rows and in the model's context: rollouts take
    whatever was let in, also where rows are longer than that."""
    for name, training in (("context", {}), ("short", {"sequence_length": 40}), ("long", {"sequence_length": 64})):
        limit = min(training.get("sequence_length", CONTEXT), CONTEXT)
        drawn = stage_config("grpo", tmp_path / name, model={"init_from": str(talker)}, rl=RL | {"answer_tokens": 1})
        longest = max(len(prompt.token_ids) for prompt in first_rows(drawn, log=lambda line: None).data.content.train)
        for room, fits in ((limit - longest, True), (limit - longest + 1, False)):
            config = stage_config(
                *("grpo", tmp_path / name),
                model={"init_from": str(talker)},
                rl=RL | {"answer_tokens": room},
                training={"steps": 1} | training,
            )
            if fits:
                assert train(config)["stopped"] == "finished"
                continue
            with pytest.raises(UserError, match=f"leaves {longest - 1} beside"):
                train(dataclasses.replace(config, run_dir=str(tmp_path / "none")))
