"""A plan is arithmetic that can be checked by hand, and says what it does not know."""

import dataclasses
import json

import pytest

import train
from gptjax.__main__ import main
from gptjax.config import Config, MeshConfig, ModelConfig, TokenizerConfig, TrainingConfig
from gptjax.errors import UserError
from gptjax.model.accounting import parameter_counts, training_flops_per_token
from gptjax.model.devices import DEVICES, Device, named, of_kind
from gptjax.presets import gpt3
from gptjax.scaling.depth import MAX_LEARNING_RATE, explain, of_depth
from gptjax.scaling.laws import EPOCH
from gptjax.scaling.plan import USABLE, make_plan
from gptjax.training.schedule import final_progress
from gptjax.tuning_config import LoraConfig

H100 = named("h100")
UNKNOWN = Device("cpu", (), None, None, None)


def test_time_and_price_follow_from_flops_and_the_assumed_share():
    config = gpt3("125M")
    plan = make_plan(config, H100, 8, price_usd_per_hour=2.0, efficiency=0.5)
    flops = training_flops_per_token(dataclasses.replace(config.model, vocab_size=50257)).total
    rate = 8 * 989.4e12 * 0.5 / flops
    assert plan.tokens_per_second == pytest.approx(rate)
    tokens = final_progress(config.training, 2048).tokens  # with the ramp of the batch
    assert plan.tokens == tokens == pytest.approx(300e9, rel=1e-3)
    assert plan.days == pytest.approx(tokens / rate / 86400)
    assert plan.price_usd == pytest.approx(tokens / rate / 3600 * 8 * 2.0)
    assert EPOCH.loss(parameter_counts(plan.model)["total"], tokens) == plan.forecasts[0].loss
    # What is recomputed takes time and is no model FLOP: two forward and one backward pass for one of each.
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    assert make_plan(full, H100, 8, efficiency=0.5).tokens_per_second == pytest.approx(rate * 3 / 4)


def test_rows_shorter_than_the_context_are_what_is_planned():
    """All that a run does depends on its rows, and only keys and values and learned positions on what it can read."""
    model = ModelConfig(num_layers=2, model_dim=64, num_heads=4, vocab_size=512, context_length=256, positions="rope")
    config = Config(model=model, training=TrainingConfig(steps=10, batch_size=16, micro_batch_size=8))
    rows = dataclasses.replace(config.training, sequence_length=256)
    long = dataclasses.replace(model, context_length=8192)
    mesh = MeshConfig(fsdp=2, context=2)
    short, plan, whole = (
        make_plan(Config(model=m, training=t, mesh=mesh), H100, 8)
        for m, t in ((model, config.training), (long, rows), (long, config.training))
    )
    own = ("model", "training", "cache_bytes")
    differing = [name for name in plan._fields if getattr(plan, name) != getattr(short, name)]
    assert set(differing) == set(own)
    assert plan.cache_bytes == whole.cache_bytes == 32 * short.cache_bytes
    assert plan.memory.activations == pytest.approx(whole.memory.activations / 32, rel=0.01)
    assert plan.tokens == whole.tokens / 32
    learned = [dataclasses.replace(m, positions="learned") for m in (model, long)]
    one, other = (make_plan(Config(model=m, training=rows, mesh=mesh), H100, 8) for m in learned)
    assert other.parameters["positions"] == 32 * one.parameters["positions"]
    assert other.flops == one.flops


def test_a_plan_knows_the_stage():
    """Pairs are twice the rows, adapters two thirds of the FLOPs and no moments, and PPO a second model that learns."""
    config = Config(model=ModelConfig(vocab_size=50257), training=TrainingConfig(steps=10, batch_size=8))
    sft, dpo, ppo = (make_plan(dataclasses.replace(config, stage=stage), H100) for stage in ("sft", "dpo", "ppo"))
    lora = make_plan(dataclasses.replace(config, stage="sft", lora=LoraConfig(rank=8)), H100)
    assert (sft.sequence, dpo.sequence) == ("1024 tokens", "2 × 1024 tokens")
    assert dpo.tokens == 2 * sft.tokens
    assert dpo.days == pytest.approx(2 * sft.days)
    assert dpo.memory.activations == pytest.approx(2 * sft.memory.activations)
    assert lora.flops.matmuls == pytest.approx(2 / 3 * sft.flops.matmuls, rel=0.02)
    assert lora.memory.optimizer < sft.memory.optimizer / 20
    assert lora.memory.parameters == pytest.approx(sft.memory.parameters, rel=0.02)
    assert ppo.flops.total == pytest.approx(2 * sft.flops.total - 6 * 50257 * 768, rel=1e-3)


def test_what_there_is_buys_tokens():
    plan = make_plan(gpt3("125M"), H100, 4, hours=10, budget_usd=60, price_usd_per_hour=3.0)
    assert plan.affordable_tokens == pytest.approx(plan.tokens_per_second * 3600 * 5, rel=1e-9), "60 USD are 5 hours"
    N, D = plan.optimal_size
    assert pytest.approx(parameter_counts(plan.model)["total"] * plan.affordable_tokens) == N * D
    assert EPOCH.loss(N, D) <= plan.affordable_forecasts[0].loss


def test_the_largest_micro_batch_fits_and_twice_as_much_does_not():
    config = dataclasses.replace(gpt3("1.3B"), training=TrainingConfig(batch_size=512, micro_batch_size=4, steps=10))
    memory = make_plan(config, H100).memory
    assert memory.fits
    limit = USABLE * H100.memory_bytes

    def total(size):
        training = dataclasses.replace(config.training, micro_batch_size=size)
        return make_plan(dataclasses.replace(config, training=training), H100).memory.total

    assert total(memory.largest_micro_batch) <= limit < total(2 * memory.largest_micro_batch)
    sizes = [row.largest_micro_batch for row in make_plan(config, H100).alternatives]
    assert sizes == sorted(sizes), "what recomputes more, fits more"


def test_too_large_is_said_and_splits_help():
    config = dataclasses.replace(gpt3("6.7B"), training=TrainingConfig(batch_size=64, micro_batch_size=1, steps=10))
    alone = make_plan(config, H100)
    assert (alone.memory.fits, alone.suggestion) == (False, None)
    many = dataclasses.replace(config, training=TrainingConfig(batch_size=64, steps=10))
    plan = make_plan(many, H100, 8)
    assert plan.mesh.fsdp * plan.mesh.tensor > 1
    assert plan.suggestion is not None
    padding = 4 * 4096 * (50304 - 50257)
    whole = 4 * plan.parameters["total"] + padding
    assert plan.memory.parameters == whole // (plan.mesh.fsdp * plan.mesh.tensor)


def test_unknown_stays_unknown():
    plan = make_plan(of_depth(2), UNKNOWN)
    assert (plan.tokens_per_second, plan.days, plan.price_usd, plan.memory.fits) == (None, None, None, None)
    assert plan.model.compute_dtype == "float32"
    with pytest.raises(UserError, match="parameters are counted before there is a tokenizer"):
        make_plan(Config(model=ModelConfig(), tokenizer=TokenizerConfig(kind="char")), H100)


def test_devices_are_told_apart():
    kinds = [kind for device in DEVICES for kind in device.kinds]
    assert len(set(kinds)) == len(kinds)
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    assert of_kind("NVIDIA H200") is named("H200")
    with pytest.raises(UserError, match=r"no device h300 is known; did you mean h[12]00.*--peak-tflops, --mem.* and"):
        named("h300")


def test_one_number_gives_a_model():
    config = of_depth(12)
    assert (config.model.model_dim, config.model.num_heads, config.training.batch_size) == (768, 12, 64)
    tokens = config.training.steps * config.training.batch_size * 2048
    assert tokens == pytest.approx(
        20 * parameter_counts(dataclasses.replace(config.model, vocab_size=2**15))["total"], rel=0.01
    )
    assert of_depth(16).model.resolved_head_dim == 128
    assert of_depth(1).optimizer.peak_learning_rate == MAX_LEARNING_RATE
    assert not any("warning" in line for line in explain(config))
    assert "is extrapolation" in explain(of_depth(40))[-1]
    with pytest.raises(UserError, match="depth is 0"):
        of_depth(0)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--device h200 --count 8 --hours 24 --budget-usd 2000 --price-usd-per-hour 3 --json a.json"
    assert main(["plan", "--depth", "12", *options.split()]) == 0
    printed = capsys.readouterr().out
    for words in (
        "shape: 12 layers",
        "parameters: 110M",
        "an estimate",
        "suggested: model.remat none",
        "what there is buys",
    ):
        assert words in printed
    card = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert card["memory"]["total"] == sum(
        card["memory"][name] for name in ("parameters", "optimizer", "gradients", "copies", "activations", "logits")
    )
    described = "--peak-tflops 100 --memory-gb 8 --bandwidth 500".split()
    assert main(["plan", "--depth", "4", *described]) == 0
    assert "described (8 GB)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device h300", "no device h300"),
        ("--memory-gb 3", "describe a device together"),
        ("--hours 0", "hours is 0.0, but must be positive"),
        ("--budget-usd 3", "budget-usd needs price-usd-per-hour"),
        ("--mfu 45", "must be a fraction of the peak"),
        ("--law none.json", "none.json is no JSON of"),
        ("--count 3 --mesh.fsdp 2", "but there are 3 devices"),
    ],
)
def test_bad_input(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(["plan", "--depth", "4", *options.split()])
    with pytest.raises(UserError, match="--depth x: it takes a number of layers"):
        main(["plan", "--depth", "x"])


def test_a_law_of_one_s_own_forecasts_with_an_interval(tmp_path, capsys):
    coefficients = {"E": 1.0, "A": 100.0, "B": 200.0, "alpha": 0.4, "beta": 0.4}
    rows = [[1.0 + n / 100, 100.0, 200.0, 0.4, 0.4] for n in range(100)]
    ranges = {"parameters_range": [1e6, 1e9], "tokens_range": [1e6, 1e10]}
    card = coefficients | ranges | {"counts": "total", "resamples": rows}
    (tmp_path / "law.json").write_text(json.dumps(card), encoding="utf-8")
    assert main(["plan", "--depth", "12", "--law", str(tmp_path / "law.json"), "--json", str(tmp_path / "p.json")]) == 0
    forecast = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))["forecasts"][0]
    low, high = forecast["interval"]
    assert (high - low, low - forecast["loss"]) == (pytest.approx(0.89), pytest.approx(0.05))
    assert "your fit" in capsys.readouterr().out


def test_a_dry_run_plans_shows_rows_and_leaves_no_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gptjax.parallel.platform.configure", lambda **_: None)
    options = "--data.path text.txt --tokenizer.kind byte --model.context-length 32 --run-dir runs/a --dry-run"
    assert train.main(options.split()) == 0
    printed = capsys.readouterr().out
    assert "row 0: 32 tokens in, 32 learned" in printed
    assert "or not to be" in printed
    assert "time: unknown" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text.txt"]
