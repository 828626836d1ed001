"""AdamW against its formulas in NumPy: which parameters decay, and what clipping does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import OptimizerConfig
from gptjax.model.gpt import GPT
from gptjax.training.optimizer import decay_mask, make_optimizer
from gptjax.training.state import draw_trained, init_params
from gptjax.tuning_config import LoraConfig

RANDOM = np.random.default_rng(0)


def test_weight_decay_mask(switched_on):
    """Matrices and embeddings decay; norms, biases and nothing else do not, in stacked blocks too, where a bias has
    two dimensions and a rule by shape would take it for a matrix."""
    learned = dataclasses.replace(switched_on, positions="learned", norm="layernorm", value_head=True)
    params = jax.eval_shape(lambda: init_params(GPT(learned), jax.random.key(0)))
    free, decayed = set(), set()
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        (decayed if decays else free).add(path[-1].key)
    assert free == {"b", "scale", "head_bias", "value_bias"}
    assert decayed == {"w", "embedding", "positions", "head", "value_head"}


def test_adapters_decay(switched_on):
    """They are matrices, and the value head that is trained beside them is one, too."""
    model = GPT(dataclasses.replace(switched_on, value_head=True))
    params = draw_trained(model, LoraConfig(rank=2), jax.random.key(0))
    params = jax.tree.map(jnp.ones_like, params)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.2))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        expected = 0.0 if path[-1].key == "value_bias" else 0.2
        np.testing.assert_allclose(update, expected, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_adamw(clip_norm):
    """Three updates equal the papers' formulas, with the gradient scaled down to the norm before the moments."""
    config = OptimizerConfig(beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.2, clip_norm=clip_norm)
    optimizer = make_optimizer(config)
    params = {name: RANDOM.normal(size=(3, 2)) for name in ("w", "b")}
    state = optimizer.init(jax.tree.map(jnp.float32, params))
    m, v = ({name: np.zeros((3, 2)) for name in params} for _ in range(2))
    for step in range(1, 4):
        gradients = {name: RANDOM.normal(size=(3, 2)) for name in params}
        updates, state = optimizer.update(
            jax.tree.map(jnp.float32, gradients), state, jax.tree.map(jnp.float32, params)
        )
        norm = sum(np.square(g).sum() for g in gradients.values()) ** 0.5
        factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for name, gradient in gradients.items():
            gradient = gradient * factor
            m[name] = 0.8 * m[name] + 0.2 * gradient
            v[name] = 0.9 * v[name] + 0.1 * gradient**2
            expected = m[name] / (1 - 0.8**step) / (np.sqrt(v[name] / (1 - 0.9**step)) + 1e-3)
            expected += (0.2 if name == "w" else 0.0) * params[name]
            np.testing.assert_allclose(updates[name], expected, rtol=1e-4, atol=1e-6)
            params[name] = params[name] - 0.1 * expected
