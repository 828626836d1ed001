"""A Hugging Face `config.json` read and written without any program of theirs: what is understood, and what refused.

What fields mean is compared with transformers in `test_families.py`.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from gptjax.config import ModelConfig
from gptjax.config_files import load_config
from gptjax.errors import UserError
from gptjax.interop.configs import from_theirs, is_huggingface, to_theirs
from gptjax.interop.ignored import IGNORED, IGNORED_WHEN
from gptjax.presets import gpt3
from gptjax.training.load import load_run

ROOT = Path(__file__).parents[2]
MODERN = {
    "num_layers": 3,
    "model_dim": 24,
    "num_heads": 4,
    "context_length": 32,
    "ffn_dim": 40,
    "vocab_size": 301,
    "norm": "rmsnorm",
    "positions": "rope",
    "feed_forward": "swiglu",
    "bias": False,
    "head_dim": 8,
}
LONG_FACTORS = {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
QWEN3 = {**MODERN, "qk_norm": True, "rope_scaling": "linear", "rope_factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feed_forward": "geglu"}, "feed_forward swiglu"),
        ({"value_head": True}, "value_head False instead of True"),
        ({"parametrization": "mup"}, "parametrization standard instead of mup"),
        ({"attention_pattern": ("dense", "local"), "qk_norm": False}, "banded layers"),
        ({"rope_fraction": 0.5, "rope_scaling": "none"}, "rope_fraction 1.0 instead of 0.5"),
        (
            {"attention_pattern": ("dense", "local"), "rope_scale_local": False},
            "rope_scale_local True instead of False",
        ),
        ({"attention_pattern": ("dense", "local"), "rope_local_base": 5.0}, "one rope_base for all layers"),
        ({"bias": True, "qkv_bias": False, "ffn_bias": False}, "qkv_bias True, as bias is, instead of False"),
        ({"ffn_bias": True, "qkv_bias": True, "qk_norm": False, "head_bias": True}, "qkv_bias False, as bias is"),
    ],
)
def test_a_model_that_no_family_has(changes, said):
    with pytest.raises(UserError, match="transformers has no model like this one; the nearest it has is ") as error:
        to_theirs(ModelConfig(**{**QWEN3, **changes}))
    assert said in str(error.value)


def test_gpt3_has_banded_layers():
    with pytest.raises(UserError, match="nearest it has is gpt2, which needs no banded layers"):
        to_theirs(gpt3("125M").model)


def test_older_fields_are_understood():
    """Those that transformers had before its version 5, and those of Meta's and EleutherAI's own files."""
    base = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    old = from_theirs(
        {**base, "rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "bfloat16", "pretraining_tp": 1}
    )
    new = from_theirs({**base, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old == new
    assert (old.rope_base, old.rope_scaling, old.rope_factor, old.rope_original_length) == (5e5, "llama3", 8.0, 64)
    neox = {**base, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 2e4}
    assert (from_theirs(neox).rope_fraction, from_theirs(neox).rope_base) == (0.5, 2e4)
    gemma = {**base, "num_hidden_layers": 12, "num_key_value_heads": 1, "intermediate_size": 9, "sliding_window": 6}
    found = from_theirs({**gemma, "model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4})
    assert found.attention_pattern == ("local",) * 5 + ("dense",)
    assert (found.rope_base, found.rope_local_base) == (1e6, 1e4)
    assert from_theirs({**gemma, "model_type": "gemma2"}).attention_pattern == ("local", "dense")
    qwen = {**base, "model_type": "qwen2", "num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 3}
    assert from_theirs({**qwen, "use_sliding_window": False}).attention_pattern == ("dense",)
    some = from_theirs({**qwen, "use_sliding_window": True, "max_window_layers": 3})
    assert some.attention_pattern == ("dense",) * 3 + ("local",)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "bert"}, 'model_type "bert"; those that gptjax can compute are gpt2, llama, mistral'),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "which gptjax cannot compute; null works"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "which gptjax cannot compute; null works"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu", which gptjax cannot compute; silu and swish work'),
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0, which gptjax does not know of llama models"),
        ({"rope_interleaved": True}, "rope_interleaved = true, which llama models of gptjax cannot have; false works"),
        ({"pruned_heads": {"0": [1]}}, "which llama models of gptjax cannot have; {} works: no head was taken out"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = true, which gptjax does not know of llama models"),
        (
            {"quantization_config": {"bits": 4}},
            "quantized, which gptjax does not read; take the model as it was before",
        ),
        ({"sliding_window": 7}, "sliding_window = 7, which gptjax does not know of llama models"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "which mistral models do not read"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "sliding_attention, and no sliding_window"),
        ({"model_type": "gemma2", "sliding_window_pattern": 3}, "does not know of gemma2 models"),
        ({"model_type": "gemma2", "sliding_window_size": 8}, "it takes sliding_window, 4096"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "cannot be understood: ZeroDivisionError"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, which llama models of gptjax cannot have"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates 0.5 of each head, and llama models rotate all"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters for full_attention, and all layers of llama"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}},
            "has rope_theta in its rope_parameters",
        ),
        (
            {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is what they read",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scales rotary positions by 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "does not say by what factor"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "wide"}, "model.model_dim"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "does not say by what low_freq_factor"),
        ({"rope_scaling": LONG_FACTORS}, "model.rope_short_factors must be 4 numbers above 0, one for each pair"),
        ({"rope_theta": "far", "rope_parameters": None}, "cannot be understood: ValueError("),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(fields, said):
    _, theirs = to_theirs(ModelConfig(**{**MODERN, "tie_embeddings": False}))
    if fields.get("model_type", "llama") != "llama":  # what it has of its own is left out
        theirs = {name: theirs[name] for name in theirs if name not in ("rope_parameters", "mlp_bias", "hidden_act")}
    with pytest.raises(UserError) as error:
        from_theirs({name: value for name, value in (theirs | fields).items() if value is not None})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


NEOX = {"model_type": "gpt_neox", "vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"partial_rotary_factor": 0.5},  # rotary_pct is what is read
        {"rope_theta": 500.0},  # rotary_emb_base is
        {"head_dim": 4},
    ],
)
def test_fields_that_gpt_neox_does_not_read(fields):
    """Those that say the same are no matter."""
    assert from_theirs(NEOX | {"partial_rotary_factor": 0.25, "rope_theta": 10_000}) == from_theirs(NEOX)
    assert from_theirs(NEOX).embedding_dropout == from_theirs(NEOX | {"hidden_dropout": 0.0}).residual_dropout
    with pytest.raises(UserError, match=next(iter(fields))):
        from_theirs(NEOX | fields)


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 32},
        {"n_embd": 32, "n_layer": 2},
        {"num_hidden_layers": 2, "model": "tiny"},
    ],
)
def test_a_configuration_without_its_kind(values, tmp_path):
    """It is told from a run's by its fields, and what it lacks is named."""
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert is_huggingface(tmp_path)
    with pytest.raises(UserError, match=r"lacks model_type.*gpt2, llama") as error:
        load_run(tmp_path)
    assert ("it is qwen3;" in str(error.value)) == ("architectures" in values)
    (tmp_path / "config.json").write_text(json.dumps({"model": {"num_layers": 2}, "training": {}, "architectures": []}))
    assert not is_huggingface(tmp_path)


def test_apertus_has_an_activation_of_its_own():
    """What its published models have is refused; the quickstart is one of it."""
    config = load_config(ROOT / "configs" / "quickstart.py").model
    family, theirs = to_theirs(dataclasses.replace(config, vocab_size=300))
    assert family.model_type == "apertus"
    assert theirs["hidden_act"] == "relu2"
    with pytest.raises(UserError, match='"xielu", which gptjax cannot compute'):
        from_theirs({key: value for key, value in theirs.items() if key != "hidden_act"})
    plain = from_theirs({key: value for key, value in theirs.items() if key not in ("rope_parameters", "rms_norm_eps")})
    assert (plain.rope_scaling, plain.rope_factor, plain.rope_base, plain.norm_epsilon) == ("llama3", 8.0, 12e6, 1e-5)


def test_harmless_fields_are_not():
    _, theirs = to_theirs(ModelConfig(**MODERN))
    assert from_theirs(theirs | {"_anything": 3, "use_cache": False, "clip_qkv": None}) == from_theirs(theirs)
    assert from_theirs(theirs | dict.fromkeys(set(IGNORED) - set(theirs), "anything")) == from_theirs(theirs)
    assert from_theirs(theirs | {name: values[0] for name, (values, _) in IGNORED_WHEN.items()}) == from_theirs(theirs)
