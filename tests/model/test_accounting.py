"""What a model costs, against the parameters it really has and the published sizes."""

import dataclasses

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import ModelConfig
from gptjax.model.accounting import mfu, parameter_counts, peak_flops, training_flops_per_token
from gptjax.model.gpt import GPT
from gptjax.training.state import init_params

SWITCHES = {
    "num_kv_heads": [None, 1, 2],
    "head_dim": [None, 6],
    "ffn_dim": [None, 24],
    "norm": ["layernorm", "rmsnorm"],
    "norm_position": ["pre", "post"],
    "norm_bias": [True, False],
    "positions": ["learned", "sinusoidal", "rope", "none"],
    "feed_forward": ["gelu", "swiglu"],
    "qk_norm": [True, False],
    "bias": [True, False],
    "tie_embeddings": [True, False],
    "head_bias": [True, False],
}


def real_sizes(config):
    """Elements of each parameter of the model, none of it computed."""
    shapes = jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))
    return {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


@settings(max_examples=25, deadline=None)
@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SWITCHES.items()}))
def test_counts_are_the_real_parameters(switches):
    """For any combination of switches the formula equals the leaves' sizes, less the vocabulary's padding."""
    shape = {"num_layers": 3, "model_dim": 16, "num_heads": 4, "context_length": 10, "vocab_size": 100}
    config = ModelConfig(**shape, **switches, compute_dtype="float32")
    padding = 28 * 16 * (1 if config.tie_embeddings else 2) + (28 if config.head_bias else 0)
    assert parameter_counts(config)["total"] == sum(real_sizes(config).values()) - padding


@pytest.mark.parametrize(
    ("num_layers", "model_dim", "num_heads", "published"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_gpt2_sizes(num_layers, model_dim, num_heads, published):
    """The four GPT-2s have exactly the parameters of OpenAI's checkpoints, which are counted by part and in sum."""
    shape = {"num_layers": num_layers, "model_dim": model_dim, "num_heads": num_heads}
    config = ModelConfig(**shape, vocab_size=50257, compute_dtype="float32")
    counts = parameter_counts(config)
    assert counts["total"] == published == sum(size for part, size in counts.items() if part != "total")
    assert sum(real_sizes(config).values()) == published + (50304 - 50257) * model_dim


def test_flops_of_gpt2():
    """nanoGPT's formula, 6N + 12·L·D·T, where N counts every weight but the positions, norms and biases."""
    config = ModelConfig(vocab_size=50257)
    weights = 12 * 12 * 768**2 + 50257 * 768
    flops = training_flops_per_token(config)
    assert flops.matmuls == 6 * weights
    assert flops.attention == 12 * 12 * 768 * 1024
    assert flops.attention_causal == 12 * 12 * 768 * 1025 // 2
    assert flops.total == flops.matmuls + flops.attention > flops.total_causal


def test_flops_of_windows_and_groups():
    """Each query of a local layer sees min(position + 1, window) keys; fewer key/value heads save projections only."""
    config = ModelConfig(
        num_layers=2, model_dim=8, num_heads=2, vocab_size=128, attention_pattern=("local", "dense"), attention_window=3
    )
    T = 7
    seen = [min(t + 1, 3) for t in range(T)] + [t + 1 for t in range(T)]
    flops = training_flops_per_token(config, T)
    assert flops.attention == 12 * 8 * (3 + 7)
    assert flops.attention_causal == round(12 * 8 * sum(seen) / T)
    grouped = training_flops_per_token(dataclasses.replace(config, num_kv_heads=1), T)
    assert flops.matmuls - grouped.matmuls == 6 * 2 * 2 * 8 * 4
    assert grouped.attention == flops.attention


def test_unknown_peak_stays_unknown():
    """A device that the table does not name exactly has no MFU; a known one has the quotient of the definition."""
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak_flops("NVIDIA H100", "bfloat16") is None
    assert peak_flops("cpu", "bfloat16") is None
    assert mfu(1000.0, 2e9, 4, None) is None
    assert mfu(1000.0, 2e9, 4, 1e12) == 0.5
