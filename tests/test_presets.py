"""The presets against the tables they are taken from, and each trained and sampled, made small."""

import dataclasses
from pathlib import Path

import pytest

from gptjax import presets
from gptjax.config import Config, ModelConfig
from gptjax.config_files import load_config
from gptjax.errors import UserError
from gptjax.model.accounting import parameter_counts
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.generate import generate
from gptjax.scaling.laws import STEP_LAW
from gptjax.stages.train import train
from gptjax.training.load import load_run
from gptjax.training.metrics import read_metrics
from gptjax.training.schedule import Progress, batch_size, learning_rate

CONFIG_FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(path for path in CONFIG_FOLDER.glob("*.py") if not path.stem.startswith("recipe_"))
EVERY = {path.stem: load_config(path) for path in FILES}
CONFIGS = {name: config for name, config in EVERY.items() if config.stage == "pretrain"}


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


@pytest.mark.parametrize(
    ("size", "layers", "d_model", "heads", "d_head", "batch", "rate"),
    [  # Table 2.1, with 16 heads for the 24 of XL and 5120 for the 5140 of 13B
        ("125m", 12, 768, 12, 64, 0.5e6, 6.0e-4),
        ("350m", 24, 1024, 16, 64, 0.5e6, 3.0e-4),
        ("760m", 24, 1536, 16, 96, 0.5e6, 2.5e-4),
        ("1_3b", 24, 2048, 16, 128, 1e6, 2.0e-4),
        ("2_7b", 32, 2560, 32, 80, 1e6, 1.6e-4),
        ("6_7b", 32, 4096, 32, 128, 2e6, 1.2e-4),
        ("13b", 40, 5120, 40, 128, 2e6, 1.0e-4),
        ("175b", 96, 12288, 96, 128, 3.2e6, 0.6e-4),
    ],
)
def test_gpt3_table(size, layers, d_model, heads, d_head, batch, rate):
    """Table 2.1 row by row, and what Appendix B says of all of them."""
    config = CONFIGS[f"gpt3_{size}"]
    model, optimizer = config.model, config.optimizer
    assert (model.num_layers, model.model_dim, model.num_heads) == (layers, d_model, heads)
    assert (model.resolved_head_dim, model.resolved_ffn_dim, model.context_length) == (d_head, 4 * d_model, 2048)
    assert model.attention_pattern == ("dense", "local")
    assert optimizer.peak_learning_rate == rate
    assert config.training.batch_size == 256 * round(batch / 2048 / 256)
    assert config.training.batch_ramp_start * 2048 == 2**15
    assert 4e9 <= config.training.batch_ramp_tokens <= 12e9
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert (optimizer.clip_norm, optimizer.weight_decay, optimizer.schedule) == (1.0, 0.1, "cosine")
    assert (optimizer.warmup_tokens, optimizer.decay_tokens) == (375_000_000, 260_000_000_000)
    assert optimizer.final_learning_rate_fraction == 0.1


def fields(**values: object) -> dict[str, object]:
    return values


RECIPES = {  # of one name or of all that begin with it
    "gpt1": {  # Radford et al. 2018, section 4.1
        "model": fields(num_layers=12, model_dim=768, num_heads=12, context_length=512, norm_position="post"),
        "optimizer": fields(
            peak_learning_rate=2.5e-4,
            warmup_steps=2000,
            schedule="cosine",
            weight_decay=0.01,
            beta1=0.9,
            beta2=0.999,
            final_learning_rate_fraction=0.0,
        ),
        "training": fields(batch_size=64),
        "tokenizer": fields(vocab_size=40478),
    },
    "gpt2": {  # Radford et al. 2019: context, batch, vocabulary; the rest is train_gpt2.py of nanoGPT
        "model": fields(context_length=1024, norm_position="pre", embedding_dropout=0.0, residual_dropout=0.0),
        "optimizer": fields(
            warmup_steps=2000, beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0, final_learning_rate_fraction=0.1
        ),
        "training": fields(batch_size=512),
        "tokenizer": fields(vocab_size=50257),
    },
    "gpt2_124m": {
        "model": fields(num_layers=12, model_dim=768, num_heads=12),
        "optimizer": fields(peak_learning_rate=6e-4),
    },
    "gpt2_355m": {
        "model": fields(num_layers=24, model_dim=1024, num_heads=16),
        "optimizer": fields(peak_learning_rate=3e-4),
    },
    "gpt2_774m": {
        "model": fields(num_layers=36, model_dim=1280, num_heads=20),
        "optimizer": fields(peak_learning_rate=2.5e-4),
    },
    "gpt2_1558m": {
        "model": fields(num_layers=48, model_dim=1600, num_heads=25),
        "optimizer": fields(peak_learning_rate=2e-4),
    },
    "shakespeare_char": {  # nanoGPT: train.py's defaults, and what both settings share
        "model": fields(bias=False, norm_bias=False, feed_forward="gelu"),
        "optimizer": fields(
            peak_learning_rate=1e-3,
            warmup_steps=100,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.1,
            clip_norm=1.0,
            final_learning_rate_fraction=0.1,
        ),
        "tokenizer": fields(kind="char"),
        "data": fields(validation_fraction=0.1, split="position"),
    },
    "shakespeare_char_gpu": {  # config/train_shakespeare_char.py
        "model": fields(
            num_layers=6,
            model_dim=384,
            num_heads=6,
            context_length=256,
            embedding_dropout=0.2,
            attention_dropout=0.2,
            residual_dropout=0.2,
        ),
        "training": fields(steps=5000, batch_size=64),
    },
    "shakespeare_char_cpu": {  # README
        "model": fields(
            num_layers=4,
            model_dim=128,
            num_heads=4,
            context_length=64,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            residual_dropout=0.0,
        ),
        "training": fields(steps=2000, batch_size=12),
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_recipes(recipe):
    """Shapes, optimizer and batch as published: parameter counts know nothing of heads and learning rates."""
    names = [name for name in CONFIGS if name == recipe or (recipe not in CONFIGS and name.startswith(recipe))]
    assert names
    for name in names:
        for section, published in RECIPES[recipe].items():
            found = dataclasses.asdict(getattr(CONFIGS[name], section))
            assert {field: found[field] for field in published} == published, (name, section)


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


FAMILIES = (
    *("gpt1", "gpt2_124m", "gpt3_175b", "article_gpt35", "shakespeare_char_cpu", "modern_1_5b"),
    "shakespeare_speedrun",
)
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
        data=dataclasses.replace(
            config.data, path=(str(text),), prepared_dir=str(tmp_path / "data"), validation_fraction=0.1
        ),
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


def test_little_text_asks_for_more_of_it_to_be_held_out(tmp_path):
    """What a recipe for the web holds out of it is not one row; the share that is named gives some."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n * n} are a number and its square.\n" for n in range(900)), encoding="utf-8")
    config = made_small(CONFIGS["modern_10m"])
    data = dataclasses.replace(config.data, path=(str(text),), prepared_dir=str(tmp_path / "data"))
    with pytest.raises(
        UserError, match=r"validation_fraction 0\.002\): .*; data\.validation_fraction 0\.05 holds"
    ) as error:
        train(dataclasses.replace(config, data=data, run_dir=str(tmp_path / "run")))
    works = float(str(error.value).split("data.validation_fraction ")[-1].split()[0])
    data = dataclasses.replace(data, validation_fraction=works)
    assert train(dataclasses.replace(config, data=data, run_dir=str(tmp_path / "run")))["stopped"] == "finished"


def test_a_recipe_without_text_asks_for_it(tmp_path):
    """It names the file that it is meant for, and leaves nothing behind."""
    config = dataclasses.replace(made_small(CONFIGS["shakespeare_char_cpu"]), run_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"--data\.path shakespeare\.txt"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("modern_")])
def test_modern_models_follow_the_law_that_is_cited(name):
    """Rate and batch are those of the published law, of which there is one copy."""
    config = CONFIGS[name]
    model, training = config.model, config.training
    matrices = model.num_layers * (4 * model.model_dim**2 + 3 * model.model_dim * model.resolved_ffn_dim)
    tokens = training.steps * training.batch_size * model.context_length
    assert config.optimizer.peak_learning_rate == float(f"{STEP_LAW.learning_rate(matrices, tokens):.2g}")
    batch = training.batch_size * model.context_length
    assert 0.7 <= batch / STEP_LAW.batch_tokens(matrices, tokens) <= 1.42
