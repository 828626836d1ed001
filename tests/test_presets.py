"""The presets against the tables they are taken from, and each trained and sampled, made small."""

import dataclasses
from pathlib import Path

import pytest

from gptjax import presets
from gptjax.config import Config, ModelConfig, load_config
from gptjax.errors import UserError
from gptjax.model.accounting import parameter_counts
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.generate import generate
from gptjax.stages.pretrain import train
from gptjax.training.load import load_run
from gptjax.training.metrics import read_metrics
from gptjax.training.schedule import Progress, batch_size, learning_rate

CONFIGS = {path.stem: load_config(path) for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py"))}


def count(config: Config, vocab_size: int | None = None) -> int:
    size = vocab_size or config.tokenizer.vocab_size
    return parameter_counts(dataclasses.replace(config.model, vocab_size=size))["total"]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt1", 116_534_784),  # of the released weights; "117M"
        ("gpt2_124m", 124_439_808),
        ("gpt2_355m", 354_823_168),
        ("gpt2_774m", 774_030_080),
        ("gpt2_1558m", 1_557_611_200),
    ],
)
def test_exact_counts(name, published):
    """Of models whose weights were released, every parameter is counted."""
    assert count(CONFIGS[name]) == published


@pytest.mark.parametrize(
    ("name", "published", "unit"),
    [  # Table D.1, in millions, to the digits it gives
        ("gpt3_125m", 125, 1),
        ("gpt3_350m", 356, 1),
        ("gpt3_760m", 760, 1),
        ("gpt3_1_3b", 1320, 10),
        ("gpt3_2_7b", 2650, 10),
        ("gpt3_6_7b", 6660, 10),
        ("gpt3_13b", 12850, 10),
        ("gpt3_175b", 174600, 100),
    ],
)
def test_gpt3_counts(name, published, unit):
    """Rounded like Table D.1 of the paper, the counts are its own: this decides where Table 2.1 contradicts itself."""
    assert round(count(CONFIGS[name]) / 1e6 / unit) * unit == published


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("gpt3")])
def test_gpt3_sees_its_tokens(name):
    """With its ramp a run reaches 300 billion tokens with its last step and not before; the learning rate rises until
    375 million, and is a tenth of the peak from 260 billion on."""
    config, progress = CONFIGS[name], Progress()
    rates, first_full = {}, None
    while progress.step < config.training.steps:
        for mark in (375 * 10**6, 260 * 10**9):
            if progress.tokens >= mark and mark not in rates:
                rates[mark] = learning_rate(config.optimizer, progress)
        size = batch_size(config.training, progress)
        if size == config.training.batch_size and first_full is None:
            first_full = progress.tokens
        before, progress = progress.tokens, progress.advance(size, config.model.context_length)
    assert before < 300 * 10**9 <= progress.tokens
    peak = config.optimizer.peak_learning_rate
    assert rates == {375 * 10**6: pytest.approx(peak, rel=1e-3), 260 * 10**9: pytest.approx(peak / 10)}
    assert 4 * 10**9 * 0.9 < first_full < 12 * 10**9 * 1.01


def test_article_formula():
    """The count is a formula of the vocabulary: 37,829,632 + 1025 V."""
    for vocab_size in (81, 8192, 50257):
        assert count(CONFIGS["article_gpt35"], vocab_size) == 37_829_632 + 1025 * vocab_size


def test_shakespeare_counts():
    """nanoGPT reports 0.80M and 10.65M, without positions; its vocabulary is the 65 characters."""
    for name, published in (("shakespeare_char_cpu", 0.80), ("shakespeare_char_gpu", 10.65)):
        config = CONFIGS[name]
        without = count(config, 65) - config.model.context_length * config.model.model_dim
        assert round(without / 1e6, 2) == published


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("modern")])
def test_modern_counts(name):
    """Each rung has the parameters of its name, to a tenth, and sees 20 tokens for each."""
    config = CONFIGS[name]
    text = name.removeprefix("modern_").replace("_", ".")
    published = float(text[:-1]) * {"m": 1e6, "b": 1e9}[text[-1]]
    assert count(config) == pytest.approx(published, rel=0.1)
    tokens = config.training.steps * config.training.batch_size * config.model.context_length
    assert tokens == pytest.approx(20 * count(config), rel=0.01)


def test_every_file_is_a_preset():
    """No shape without a file, and no file whose name says another size than it holds."""
    families = {"gpt2": presets.GPT2_SHAPES, "gpt3": presets.GPT3_ROWS, "modern": presets.MODERN_SHAPES}
    for family, sizes in families.items():
        for size in sizes:
            assert CONFIGS[f"{family}_{size.lower().replace('.', '_')}"] == getattr(presets, family)(size)


def test_unknown_size_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 124M\?"):
        presets.gpt2("125M")


FAMILIES = ("gpt1", "gpt2_124m", "gpt3_175b", "article_gpt35", "shakespeare_char_cpu", "modern_1_5b")
"""One configuration for each combination of switches; the others of a family differ in numbers only."""


def made_small(config: Config) -> Config:
    """The same switches and settings at a shape that a test can train."""
    heads = 4
    model = dataclasses.replace(config.model, num_layers=2, model_dim=8 * heads, num_heads=heads, ffn_dim=None)
    model = dataclasses.replace(model, context_length=32, attention_window=8)
    training = dataclasses.replace(
        config.training,
        steps=10,
        batch_size=16,
        micro_batch_size=8,
        batch_ramp_start=8 if config.training.batch_ramp_start else None,
        batch_ramp_tokens=1000 if config.training.batch_ramp_tokens else 0,
        log_every_steps=1,
        eval_every_steps=0,
        sample_every_steps=0,
        sample_tokens=4,
    )
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=400)
    return dataclasses.replace(config, model=model, training=training, tokenizer=tokenizer)


def switches(model: ModelConfig) -> ModelConfig:
    """The architecture without its sizes."""
    sizes = {"num_layers": 1, "model_dim": 2, "num_heads": 1, "ffn_dim": None, "context_length": 1, "vocab_size": None}
    return dataclasses.replace(model, **sizes)


def test_families_cover_all_switches():
    """What is trained below stands for every preset: the rest differs from one of them in sizes and dropout alone."""
    trained = [switches(CONFIGS[name].model) for name in FAMILIES]
    no_dropout = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}
    for name in set(CONFIGS) - {"quickstart"}:
        model = switches(CONFIGS[name].model)
        assert model in trained or dataclasses.replace(model, **no_dropout) in trained, name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_preset_trains_and_samples(name, tmp_path):
    """Ten steps of the recipe change the loss to a smaller number, and the run can be sampled."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n * n} are a number and its square.\n" for n in range(900)), encoding="utf-8")
    config = made_small(CONFIGS[name])
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=(str(text),), prepared_dir=str(tmp_path / "data")),
        # Warm-ups of hundreds of steps would not move it in ten.
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=2, warmup_tokens=0, peak_learning_rate=1e-2),
        run_dir=str(tmp_path / "run"),
    )
    summary = train(config)
    assert summary["stopped"] == "finished"
    records = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert records[-1] < records[0] - 0.1
    run = load_run(tmp_path / "run")
    (completion,) = generate(run.config.model, run.params, run.tokenizer, ["1 and"], SamplingConfig(max_tokens=4))
    assert completion.token_ids


def test_a_recipe_without_text_asks_for_it(tmp_path):
    """It names the file that it is meant for, and leaves nothing behind."""
    config = dataclasses.replace(made_small(CONFIGS["shakespeare_char_cpu"]), run_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"--data\.path shakespeare\.txt"):
        train(config)
    assert not (tmp_path / "run").exists()
