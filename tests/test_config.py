"""Configuration: what is refused and in which words, what is derived, and that files keep all of it."""

import ast
import dataclasses
import inspect
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import config, model_config, safety_config, tuning_config
from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GrpoConfig,
    GuardConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    PreferenceConfig,
    RlConfig,
    TokenizerConfig,
    TrainingConfig,
)
from gptjax.config_files import differences, from_dict, load_config, replace_fields, saved_config, to_dict
from gptjax.errors import UserError

SECTIONS = (
    Config,
    ModelConfig,
    TokenizerConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    CheckpointConfig,
    GuardConfig,
    LoraConfig,
    PreferenceConfig,
    RlConfig,
    PpoConfig,
    GrpoConfig,
)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(model_dim=768, num_heads=13), ["768", "13", "nearest", "12"]),
        (lambda: ModelConfig(num_heads=12, num_kv_heads=5), ["num_kv_heads 5", "12"]),
        (lambda: ModelConfig(num_layers=0), ["model.num_layers", "0", "at least 1"]),
        (lambda: ModelConfig(residual_dropout=1.0), ["residual_dropout", "0.99"]),
        (lambda: ModelConfig(attention_pattern=()), ["attention_pattern", "dense"]),
        (lambda: ModelConfig(positions="rope", rope_fraction=0.52), ["rope_fraction", "33", "even"]),
        (lambda: ModelConfig(rope_scaling="yarn", rope_base=1.0), ["rope_base is 1,", "more than 1"]),
        (lambda: ModelConfig(rope_scaling="longrope"), ["rope_short_factors must be 32 numbers above 0", "is []"]),
        (lambda: ModelConfig(rope_attention_factor=1.5), ["rope_attention_factor 1.5", "not none"]),
        (lambda: ModelConfig(rope_low_frequency=4), ["rope_low_frequency 4", "rope_high_frequency 4"]),
        (lambda: TokenizerConfig(vocab_size=200), ["tokenizer.vocab_size", "200", "272"]),
        (lambda: DataConfig(validation_fraction=1.0), ["validation_fraction", "between 0 and 1"]),
        (lambda: DataConfig(weights=(1.0, 0.0)), ["data.weights", "0", "positive"]),
        (lambda: MeshConfig(tensor=0), ["mesh.tensor"]),
        (lambda: MeshConfig(expert=2), ["mesh.expert is 2", "reserved", "1 works"]),
        (lambda: OptimizerConfig(beta2=1.0), ["beta2"]),
        (lambda: OptimizerConfig(warmup_steps=3, warmup_tokens=9), ["warmup_steps 3", "warmup_tokens 9"]),
        (lambda: TrainingConfig(batch_size=33, micro_batch_size=8), ["33", "8", "nearest", "32"]),
        (lambda: TrainingConfig(batch_size=8, batch_ramp_start=16, micro_batch_size=8), ["16", "larger", "8"]),
        (lambda: TrainingConfig(batch_size=8, micro_batch_size=2, batch_ramp_start=2), ["batch_ramp_tokens"]),
        (lambda: CheckpointConfig(keep_newest=0), ["checkpoint.keep_newest"]),
    ],
)
def test_refuses_in_one_line(make, words):
    """What does not fit is refused when it is written, with the field, the values and what would fit."""
    with pytest.raises(UserError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_json_keeps_everything():
    """A configuration read back from JSON is equal, tuples included, so that a resumed run compares equal."""
    config = replace_fields(
        Config(), {"model.attention_pattern": ["dense", "local"], "data.path": ["a", "b"], "run_dir": "x"}
    )
    assert config.model.attention_pattern == ("dense", "local")
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_files(tmp_path):
    """A Python file that assigns `config` and a run's JSON load alike; anything else is one clear error."""
    config = Config(model=ModelConfig(num_layers=3))
    (tmp_path / "small.py").write_text("from gptjax.config import *\nconfig = Config(model=ModelConfig(num_layers=3))")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config) | {"environment": {"jax": "1"}}))
    (tmp_path / "empty.py").write_text("")
    assert load_config(tmp_path / "small.py") == load_config(tmp_path / "config.json") == config
    with pytest.raises(UserError, match="does not assign"):
        load_config(tmp_path / "empty.py")
    with pytest.raises(UserError, match=r"smal\.py; did you mean .*small\.py"):
        load_config(tmp_path / "smal.py")
    with pytest.raises(UserError, match=r"model\.num_layer .*did you mean model\.num_layers"):
        from_dict({"model": {"num_layer": 3}})


def test_saved_long_ago():
    """Runs had rows as long as their context before there was a field for it, and what was imported none."""
    values = to_dict(Config(model=ModelConfig(context_length=4096)))
    assert saved_config(values).training.sequence_length is None, "what was saved as open stays open"
    del values["training"]["sequence_length"]
    assert saved_config(values).training.sequence_length == 4096
    assert saved_config(values | {"environment": {"imported": {"from": "a"}}}).training.sequence_length == 2048


def test_differences_name_fields_and_values():
    old = Config()
    new = replace_fields(old, {"model.num_layers": 3, "run_dir": "b"})
    assert differences(old, new) == {"model.num_layers": (12, 3), "run_dir": (None, "b")}
    assert differences(old, old) == {}


def test_replace_fields_validates_once_all_are_set():
    """Fields that only fit together can be changed together, in any order."""
    config = replace_fields(Config(), {"model.num_heads": 5, "model.model_dim": 40})
    assert config.model.resolved_head_dim == 8


def test_derived_values():
    gated = ModelConfig(model_dim=768, feed_forward="swiglu")
    assert (gated.resolved_head_dim, gated.resolved_num_kv_heads, gated.resolved_ffn_dim) == (64, 12, 2048)
    assert ModelConfig(model_dim=768).resolved_ffn_dim == 3072
    assert ModelConfig(vocab_size=50257).padded_vocab_size == 50304
    assert ModelConfig(vocab_size=256).padded_vocab_size == 256
    with pytest.raises(UserError, match="tokenizer"):
        _ = ModelConfig().padded_vocab_size
    assert DataConfig(path="one").path == ("one",)


@given(st.integers(1, 9), st.lists(st.sampled_from(["dense", "local"]), min_size=1, max_size=4))
def test_pattern_repeats_over_layers(num_layers, pattern):
    windows = ModelConfig(num_layers=num_layers, attention_pattern=tuple(pattern), attention_window=7).layer_windows
    assert len(windows) == num_layers
    for layer, window in enumerate(windows):
        assert window == (7 if pattern[layer % len(pattern)] == "local" else None)


def test_every_field_has_its_doc():
    """`--help` shows the string under a field: each field has one, of one line."""
    trees = [
        ast.parse(inspect.getsource(module)).body for module in (config, model_config, safety_config, tuning_config)
    ]
    classes = {node.name: node.body for tree in trees for node in tree if isinstance(node, ast.ClassDef)}
    for section in SECTIONS:
        body = classes[section.__name__]
        documented = {
            field.target.id: doc.value.value
            for field, doc in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
        }
        assert {f.name for f in dataclasses.fields(section)} == (
            set(documented)
            | ({f.name for f in dataclasses.fields(Config)} - {"run_dir"} if section is Config else set())
        )
        assert all(doc.strip() and "\n" not in doc for doc in documented.values())
