"""Muon: what it owns, what its update is, and that no mesh and no checkpoint changes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import CheckpointConfig, MeshConfig, OptimizerConfig
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh, one_device_mesh
from gptjax.training.checkpoint import open_checkpoints, restore, save
from gptjax.training.losses import language_model_loss
from gptjax.training.muon import muon, orthogonalize
from gptjax.training.optimizer import make_optimizer, owners
from gptjax.training.state import abstract_state, init_params, init_state
from gptjax.training.step import make_train_step

CONFIG = OptimizerConfig(kind="muon", clip_norm=0.5)
RANDOM = np.random.default_rng(0)


def test_what_muon_owns(switched_on):
    """The seven matrices of a gated block, and nothing else: stacked biases and norms have two dimensions, too."""
    config = dataclasses.replace(switched_on, positions="learned", norm="layernorm", bias=True)
    params = jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(owners(params))
    named = {".".join(part.key for part in path): owner for path, owner in leaves}
    owned = {name for name, owner in named.items() if owner == "muon"}
    assert owned == {f"blocks.attention.{name}.w" for name in ("q", "k", "v", "out")} | {
        f"blocks.feed_forward.{name}.w" for name in ("gate", "up", "down")
    }
    assert {"embedding", "positions", "head", "head_bias", "final_norm.scale", "blocks.attention.q.b"} <= set(named)
    state = jax.eval_shape(make_optimizer(CONFIG).init, params)
    kept = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert sum(name.endswith("['w']") for name in kept) == 7, "one momentum each, and neither of Adam's moments"


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_update_of_a_stack_is_that_of_each_layer(shape):
    """Each layer's matrix is made orthogonal by itself: singular values near 1, of the very singular vectors of the
    momentum; and scaled to one root mean square whatever its shape."""
    stack = RANDOM.normal(size=(3, *shape)).astype(np.float32)
    stack[1] *= 1e-6  # a layer with small gradients gets an update of the same size
    update, state = muon(0.9, 0.2).update(stack, muon(0.9, 0.2).init(stack))
    for layer in range(3):
        alone, _ = muon(0.9, 0.2).update(stack[layer][None], muon(0.9, 0.2).init(stack[layer][None]))
        np.testing.assert_allclose(update[layer], alone[0], atol=1e-5)
        values = np.linalg.svd(np.asarray(update[layer]) / (0.2 * max(shape) ** 0.5), compute_uv=False)
        assert values.max() < 1.25
        assert np.median(values) > 0.65
        if shape[0] != shape[1]:  # a square one of random numbers has singular values that are nearly zero
            assert values.min() > 0.65
            assert np.sqrt(np.square(update[layer]).mean()) == pytest.approx(0.2, rel=0.2)
        u, _, v = np.linalg.svd(stack[layer].astype(np.float64), full_matrices=False)
        aligned = np.diag(u.T @ np.asarray(update[layer], np.float64) @ v.T)
        np.testing.assert_allclose(np.sort(aligned) / (0.2 * max(shape) ** 0.5), np.sort(values), atol=1e-3)
    again = RANDOM.normal(size=stack.shape).astype(np.float32)
    second, _ = muon(0.9, 0.2).update(again, state)
    nesterov = again + 0.9 * (again + 0.9 * stack)
    np.testing.assert_allclose(second, 0.2 * max(shape) ** 0.5 * orthogonalize(jnp.asarray(nesterov)), atol=1e-5)
    assert not np.asarray(orthogonalize(jnp.zeros((2, *shape)))).any(), "no gradient, no update"


def losses_on(mesh, config, start):
    """Losses of 12 steps from the same parameters on the same rows."""
    draw, losses = np.random.default_rng(3), []
    with jax.set_mesh(mesh):
        model, optimizer = GPT(config), make_optimizer(CONFIG)
        step = make_train_step(language_model_loss(model), optimizer, dropout_seed=None, accumulates=False)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer))
        state = jax.device_put(start, shardings)
        for _ in range(12):
            tokens = draw.integers(0, config.vocab_size, (1, 1, 8, 9)).astype(np.int32) // 4
            batch = {"tokens": sharding.put_batch(tokens)}
            state, metrics = step(state, batch, np.ones(1, np.int32), np.full(1, 3e-3, np.float32), 1)
            losses.append(float(np.asarray(metrics["loss"])[0]))
        kept = jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), state, shardings)
        assert all(jax.tree.leaves(kept))
    return np.array(losses)


def test_meshes_train_alike(switched_on):
    """Three layers, shared out among eight devices that keep matrices in pieces and copies: losses are one device's."""
    plain = {"scan_layers": False, "remat": "none", "context_length": 8}
    dropouts = dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"), 0.0)
    config = dataclasses.replace(switched_on, attention_pattern=("dense",), **plain, **dropouts)
    with jax.set_mesh(one_device_mesh()):
        start = jax.device_get(init_state(GPT(config), make_optimizer(CONFIG), seed=0))
    expected = losses_on(one_device_mesh(), config, start)
    assert expected[-1] < expected[0] - 0.5
    found = losses_on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), config, start)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_state_is_saved_and_restored(tiny, mesh, tmp_path):
    """`abstract_state` has the shardings that the state is born with, and a checkpoint fills it bit for bit."""
    model, optimizer = GPT(tiny), make_optimizer(CONFIG)
    state, abstract = init_state(model, optimizer, seed=0), abstract_state(model, optimizer)
    state = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))(state)
    alike = jax.tree.map(lambda leaf, a: leaf.sharding.is_equivalent_to(a.sharding, leaf.ndim), state, abstract)
    assert all(jax.tree.leaves(alike))
    with open_checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as manager:
        save(manager, 1, state, {}, None)
    restored, _ = restore(tmp_path / "checkpoints", 1, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("fields", [{"kind": "sgd"}, {"muon_momentum": 1.0}, {"muon_update_rms": 0.0}])
def test_bad_settings_are_refused(fields):
    with pytest.raises(UserError, match=f"optimizer.{next(iter(fields))}"):
        OptimizerConfig(**fields)
