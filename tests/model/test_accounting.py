"""What a model costs, against the parameters it really has and the published sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from gptjax.model.accounting import (
    activation_bytes,
    mfu,
    parameter_counts,
    peak_flops,
    training_flops_per_token,
)
from gptjax.model.gpt import GPT
from gptjax.model.workload import networks, state_bytes
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import init_params

SWITCHES = {
    "num_kv_heads": [None, 1, 2],
    "head_dim": [None, 6],
    "ffn_dim": [None, 24],
    "norm": ["layernorm", "rmsnorm"],
    "norm_position": ["pre", "post", "both"],
    "norm_bias": [True, False],
    "positions": ["learned", "sinusoidal", "rope", "none"],
    "feed_forward": ["gelu", "swiglu"],
    "qk_norm": [True, False],
    "bias": [True, False],
    "qkv_bias": [None, True, False],
    "ffn_bias": [None, True, False],
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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("switches", [{}, {"feed_forward": "swiglu", "num_kv_heads": 2, "head_dim": 6, "bias": True}])
def test_state_is_what_the_optimizer_keeps(kind, switches):
    """Weights, gradients and all that the optimizer holds an element of: of Muon's matrices one momentum."""
    shape = {"num_layers": 3, "model_dim": 16, "num_heads": 4, "context_length": 10, "vocab_size": 128}
    config, optimizer = ModelConfig(**shape, **switches, compute_dtype="bfloat16"), OptimizerConfig(kind=kind)
    params = jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))
    kept = params, jax.eval_shape(make_optimizer(optimizer).init, params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept) if leaf.ndim)  # and a step's count
    models = networks(Config(model=config))
    assert state_bytes(models, optimizer, gradients=False) == held
    assert state_bytes(models, optimizer) == held + 4 * parameter_counts(config)["total"]


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


@pytest.mark.parametrize("switches", [{}, {"feed_forward": "swiglu", "num_kv_heads": 2, "head_dim": 24}])
def test_activations_are_those_that_jax_keeps(switches):
    """What `save_dots` and `save_attention` keep beyond `full` is the bytes that the traced loss keeps beyond it."""
    shape = {"num_layers": 3, "model_dim": 32, "num_heads": 4, "ffn_dim": 80, "context_length": 12, "vocab_size": 61}
    mesh, batch_size = MeshConfig(data=1, fsdp=1, tensor=1), 5

    def bytes_of(name):
        config = ModelConfig(**shape | switches, remat=name, compute_dtype="bfloat16")
        loss = language_model_loss(GPT(config))
        params = jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((batch_size, 13), jnp.int32)
        kept = jax.eval_shape(lambda p, t: jax.vjp(lambda p: loss(p, {"tokens": t}, None)[0], p)[1], params, tokens)
        traced = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
        return np.array([traced, activation_bytes(config, mesh, batch_size, quadratic=True).least])

    full = bytes_of("full")
    for name in ("save_dots", "save_attention"):
        traced, formula = bytes_of(name) - full
        assert traced == formula > 0


@pytest.mark.parametrize(("remat", "scan_layers"), [("none", False), ("full", True)])
def test_activations_of_a_compiled_step(remat, scan_layers):
    """What XLA plans for a batch grows with it by no less than the bound, and by about the estimate. (Layers that are
    unrolled XLA's CPU backend never computes again, whatever is asked of it.)"""
    config = ModelConfig(
        num_layers=4,
        model_dim=64,
        num_heads=4,
        context_length=64,
        vocab_size=512,
        remat=remat,
        scan_layers=scan_layers,
        compute_dtype="float32",
    )
    loss, mesh = language_model_loss(GPT(config)), MeshConfig(data=1, fsdp=1, tensor=1)
    params = jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))

    def planned(batch_size):
        tokens = jax.ShapeDtypeStruct((batch_size, 65), jnp.int32)
        program = jax.jit(jax.grad(lambda p, t: loss(p, {"tokens": t}, None)[0])).lower(params, tokens).compile()
        return program.memory_analysis().temp_size_in_bytes

    few, many = (activation_bytes(config, mesh, size, quadratic=True) for size in (8, 24))
    growth = planned(24) - planned(8)
    assert many.least - few.least <= growth
    assert 0.6 < growth / (many.likely - few.likely) < 2.5


def test_memory_is_shared_out():
    """Twice the devices of an axis halve what it splits: rows and tokens all, `tensor` all but the residual stream, a
    chunk of the loss its logits; offload leaves nothing of the layers."""
    config = ModelConfig(vocab_size=50257, compute_dtype="bfloat16")

    def least(chunk_tokens=0, remat="none", **axes):
        mesh = MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | axes)
        return activation_bytes(dataclasses.replace(config, remat=remat), mesh, 8, chunk_tokens).least

    whole, tokens = least(), 8 * 1024
    assert least(data=2) == least(fsdp=2) == least(context=2) == whole // 2
    assert least(tensor=2) - whole // 2 == tokens * 768 * (2 * 12 + 1)
    assert whole - least(chunk_tokens=1024) == 2 * 7 * 1024 * config.padded_vocab_size
    assert least(remat="offload") == 2 * tokens * (768 + config.padded_vocab_size)


def test_unknown_peak_stays_unknown():
    """A device that the table does not name exactly has no MFU; a known one has the quotient of the definition."""
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak_flops("NVIDIA H100", "bfloat16") is None
    assert peak_flops("cpu", "bfloat16") is None
    assert mfu(1000.0, 2e9, 4, None) is None
    assert mfu(1000.0, 2e9, 4, 1e12) == 0.5
