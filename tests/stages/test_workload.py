"""What every stage is said to hold, to compute and to read, against the step that is compiled for it."""

import dataclasses
from unittest import mock

import jax
import pytest

from gptjax.config import ModelConfig
from gptjax.model.workload import flops_per_token, sequence_tokens, state_bytes
from gptjax.parallel.mesh import one_device_mesh
from gptjax.resolve import resolve
from gptjax.stages import start
from gptjax.stages.dry_run import first_rows
from gptjax.stages.train import STAGES, _compile_step, train
from gptjax.training.loop import next_batch
from gptjax.training.metrics import read_metrics
from gptjax.training.run_dir import load_run_config
from gptjax.training.schedule import Progress, final_progress

RL = {"reward": "exact", "answers": 16, "answer_tokens": 6}
LORA = {"lora": {"rank": 4}}
CASES = {
    "pretrain": ("pretrain", "text.txt", {}),
    "sft": ("sft", "talk.jsonl", {}),
    "sft, lora": ("sft", "talk.jsonl", LORA),
    "reward": ("reward", "ranked.jsonl", {}),
    "reward, lora": ("reward", "ranked.jsonl", LORA),
    "dpo": ("dpo", "ranked.jsonl", {}),
    "dpo, lora": ("dpo", "ranked.jsonl", LORA),
    "ppo with text": ("ppo", "talk.jsonl", {"rl": RL, "ppo": {"pretraining_rows": 2}}),
    "ppo, lora": ("ppo", "talk.jsonl", {"rl": RL} | LORA),
    "grpo": ("grpo", "talk.jsonl", {"rl": RL}),
    "grpo, lora": ("grpo", "talk.jsonl", {"rl": RL} | LORA),
}


@pytest.fixture(scope="session")
def wide(once, lessons, stage_config):
    """A run of `sft` whose products with weights outweigh everything else."""
    shape = {"num_layers": 2, "model_dim": 192, "num_heads": 4, "context_length": 48, "attention_kernel": "xla"}
    model = ModelConfig(**shape, norm="rmsnorm", positions="rope", bias=False)

    def fill(folder):
        config = stage_config("sft", folder, training={"steps": 1}, tokenizer={"path": str(lessons / "tokenizer.json")})
        train(dataclasses.replace(config, model=model))

    return once("wide", fill)


@pytest.fixture
def opened(stage_config, wide, lessons, tmp_path):
    """Makes a stage as `train` makes it: its configuration, models and itself, on one device."""

    def make(stage, file, sections):
        if "pretraining_rows" in sections.get("ppo", {}):
            sections = sections | {"ppo": sections["ppo"] | {"pretraining_path": (str(lessons / "text.txt"),)}}
        model = {"init_from": str(wide), "attention_kernel": "xla"}
        sections = sections | {"model": model, "training": {"eval_sequences": 8}}
        config = start.inherit(stage_config(stage, tmp_path / "run", file, **sections))
        config = STAGES[stage].configure(config)
        data = STAGES[stage].load_data(config, None, lambda line: None)
        networks_of = start.networks_of(config, data.rows)
        config = resolve(config, jax.devices()[:1], data.tokenizer, num_rows=data.num_rows, networks_of=networks_of)
        (tmp_path / "run").mkdir()
        return config, networks_of(config), STAGES[stage].open_stage(config, data, tmp_path / "run", print)

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_stage_computes_and_keeps_what_is_counted(case, opened):
    """Within a tenth: FLOPs of the step as XLA counts them in the program that runs, and bytes of its state and of what
    it holds beside, frozen weights among them. Tokens are exactly those of the rows that the trained model reads."""
    with jax.set_mesh(one_device_mesh()):
        config, held, stage = opened(*CASES[case])
        state, stream = stage.new_state(), stage.stream(0)
        K = config.training.steps_per_dispatch
        *arguments, progress = next_batch(config, stream, Progress(), K, state, sequence_tokens(held))
        stream.close()
        rows = {name: value for name, value in arguments[0].items() if name in ("tokens", "pretraining")}
        shifted = config.stage != "reward"
        read = sum(value.size // value.shape[-1] * (value.shape[-1] - shifted) for value in rows.values())
        run = dataclasses.replace(config.training, steps=K)
        assert progress.tokens == read == final_progress(run, sequence_tokens(held)).tokens
        program = _compile_step(config, stage).lower(state, *arguments, K).compile()
    # Of a loop XLA counts the body once: one step of one micro-batch.
    tokens = config.training.batch_size * sequence_tokens(held)
    counted = program.cost_analysis()["flops"]
    said = flops_per_token(held).total * tokens
    trained = tuple(network for network in held if network.rows)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves((state, stage.frozen)))
    stated = state_bytes(trained, config.optimizer, gradients=False)
    given = program.memory_analysis().argument_size_in_bytes - sum(x.nbytes for x in jax.tree.leaves(arguments))
    assert said == pytest.approx(counted, rel=0.1)
    assert stated == pytest.approx(kept, rel=0.1)
    assert kept == pytest.approx(given, rel=0.1), "what is kept goes in"


def test_rows_of_an_epoch_are_all_that_is_learned_from(stage_config, wide):
    """Of ranked answers DPO learns from every pair, and a reward model from a prompt's answers together."""
    for stage, of_group in (("dpo", 3), ("reward", 1)):  # all of three answers are of different ranks
        config = start.inherit(stage_config(stage, "x", "ranked.jsonl", model={"init_from": str(wide)}))
        data = STAGES[stage].load_data(config, None, lambda line: None)
        assert data.num_rows == of_group * len(data.content.train)
        assert data.rows.count == (2 if stage == "dpo" else 3)
        assert data.rows.num_tokens % 16 == 0


def test_tokens_and_speed_of_a_run_are_those_of_its_rows(stage_config, wide, tmp_path):
    """What metrics and summary say is counted so, a saved count goes on, and MFU is the step's FLOPs over its time."""
    run = tmp_path / "run"
    config = stage_config("dpo", run, "ranked.jsonl", model={"init_from": str(wide)}, training={"eval_sequences": 8})
    with mock.patch("gptjax.stages.train.peak_flops", return_value=1e12):
        summary = train(config)
    rows = first_rows(config, log=lambda line: None).data.rows
    records = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    assert [record["tokens"] for record in records] == [n * 16 * 2 * rows.num_tokens for n in (1, 2, 3, 4)]
    assert summary["tokens"] == records[-1]["tokens"]
    saved = load_run_config(run)[0]
    said = flops_per_token(start.networks_of(saved, rows)(saved)).total
    last = records[-1]
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * said / jax.device_count() / 1e12)
