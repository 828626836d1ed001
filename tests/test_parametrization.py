"""Parametrizations are their table: initialization, rates, epsilon, and multipliers, read off what the model does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig, OptimizerConfig
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.parametrization import STANDARD, Multipliers, multipliers
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import init_state
from gptjax.training.step import make_train_step

BASE = ModelConfig(
    num_layers=2,
    num_heads=2,
    model_dim=32,
    context_length=16,
    vocab_size=64,
    norm="rmsnorm",
    positions="rope",
    bias=False,
    base_model_dim=32,
    base_num_layers=2,
    base_head_dim=16,
)
ADAMW = OptimizerConfig(peak_learning_rate=0.01, weight_decay=0.1, clip_norm=1e9, epsilon=1e-3)
ROWS = np.random.default_rng(0).integers(0, 64, (2, 17)).astype(np.int32)


def resized(parametrization, width=1, depth=1):
    return dataclasses.replace(
        BASE,
        parametrization=parametrization,
        model_dim=32 * width,
        num_heads=2 * width,
        num_layers=2 * depth,
    )


def trained(config, optimizer=ADAMW, steps=3):
    model, update = GPT(config), make_optimizer(optimizer, multipliers(config))
    step = make_train_step(language_model_loss(model), update, dropout_seed=None, accumulates=False)
    state, losses = init_state(model, update, 0), []
    for _ in range(steps):
        rate = np.full(1, optimizer.peak_learning_rate, np.float32)
        state, metrics = step(state, {"tokens": jnp.asarray(ROWS[None, None])}, np.ones(1, np.int32), rate, 1)
        losses.append(float(metrics["loss"][0]))
    return state.params, losses


def leaves(params):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def is_matrix(name):
    return "blocks" in name and "norm" not in name


@pytest.mark.parametrize("parametrization", ["mup", "completep"])
def test_a_model_of_the_base_size_is_the_standard_one(parametrization):
    """To the bit: initialization, and three steps of training."""
    assert multipliers(resized(parametrization)) == Multipliers()
    params, losses = trained(resized(parametrization))
    standard, others = trained(resized("standard"))
    assert losses == others
    for name, leaf in leaves(params).items():
        np.testing.assert_array_equal(leaf, leaves(standard)[name], err_msg=name)


def test_the_table():
    wide = multipliers(resized("mup", width=4))
    assert wide == Multipliers(0.5, 1.0, 0.25, 0.5, 0.25, 0.25, 1.0, 1.0, 0.25)
    deep = multipliers(resized("completep", width=4, depth=4))
    assert deep == Multipliers(0.5, 2.0, 0.25, 0.5, 0.25, 0.0625, 1.0, 0.25, 0.25)
    assert multipliers(resized("standard", width=4, depth=4)) == STANDARD
    double = dataclasses.replace(resized("mup"), num_heads=1)
    assert multipliers(double).attention == pytest.approx(0.5**0.5), "1/H and not 1/√H, from the base head size on"


@pytest.mark.parametrize("width", [2, 4])
def test_initialization_falls_as_the_root_of_the_width_in_blocks_alone(width):
    config, standard = resized("mup", width), resized("standard", width)
    params, others = (leaves(GPT(c).init(jax.random.key(0), ROWS[:, :-1])["params"]) for c in (config, standard))
    for name, leaf in params.items():
        ratio = width**-0.5 if is_matrix(name) else 1.0
        np.testing.assert_allclose(leaf, ratio * others[name], rtol=1e-5, err_msg=name)
        if is_matrix(name):
            ending = (2 * config.num_layers) ** -0.5 if "out" in name or "down" in name else 1.0
            assert leaf.std() == pytest.approx(0.02 * ratio * ending, rel=0.05), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_updates_by_hand(kind):
    """The first update of every tensor, before the learning rate: its own factor, epsilon and decay, in float64."""
    config = resized("completep", width=2, depth=2)
    sizes, model = multipliers(config), GPT(config)
    optimizer = make_optimizer(dataclasses.replace(ADAMW, kind=kind), sizes)
    plain = make_optimizer(dataclasses.replace(ADAMW, kind=kind))
    params = model.init(jax.random.key(0), ROWS[:, :-1])["params"]
    gradients = jax.tree.map(lambda leaf: 1e-3 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    standard, _ = plain.update(gradients, plain.init(params), params)
    for name, found in leaves(updates).items():
        g, p, other = (leaves(tree)[name].astype(np.float64) for tree in (gradients, params, standard))
        decay = 0.0 if "norm" in name else ADAMW.weight_decay * p
        if kind == "muon" and is_matrix(name):
            expected = sizes.hidden_rate_muon * (other - decay) + decay
        else:
            epsilon = ADAMW.epsilon * (sizes.block_epsilon if "blocks" in name else sizes.epsilon)
            expected = (sizes.hidden_rate if is_matrix(name) else 1.0) * g / (np.abs(g) + epsilon) + decay
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6, err_msg=name)


def test_logits_and_sublayers_are_scaled():
    """Read off the model: with blocks that add nothing the logits are the embedding's, over m."""
    config = resized("mup", width=4)
    params = GPT(config).init(jax.random.key(0), ROWS[:, :-1])["params"]
    logits, _ = GPT(config).apply({"params": params}, ROWS[:, :-1])
    plain, _ = GPT(dataclasses.replace(config, parametrization="standard", base_head_dim=16)).apply(
        {"params": params}, ROWS[:, :-1]
    )
    np.testing.assert_allclose(logits[..., :64], plain[..., :64] / 4, rtol=1e-4, atol=1e-6)


def test_completep_is_for_norms_before_sublayers():
    with pytest.raises(UserError, match="completep"):
        dataclasses.replace(BASE, parametrization="completep", norm_position="post")
