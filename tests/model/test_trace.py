"""Attention weights taken from the model, against those recomputed from its parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.evaluation.inside import attention_weights, logit_lens, looked_at_most
from gptjax.model.gpt import GPT

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def new_params(config):
    params = jax.jit(GPT(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return jax.tree.map(lambda p: 4 * p, params)


def plain(switched_on, **changes):
    none = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}
    return dataclasses.replace(switched_on, **none, **changes)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_weights_are_causal_windowed_and_sum_to_one(switched_on, position):
    config = plain(switched_on, norm_position=position)
    weights_LNTS = attention_weights(config, new_params(config), TOKENS)
    T = len(TOKENS)
    assert weights_LNTS.shape == (3, 16, T, T)
    np.testing.assert_allclose(weights_LNTS.sum(-1), 1.0, rtol=1e-5)
    t, s = np.indices((T, T))
    assert (weights_LNTS[:, :, s > t] == 0).all()
    local = weights_LNTS[1]  # the pattern is dense, local
    assert (local[:, t - s >= config.attention_window] == 0).all()
    assert (weights_LNTS[0][:, s <= t] > 0).all()


def test_weights_are_the_formula(tiny):
    """Of the first layer they are softmax(q kᵀ / sqrt(H)) of the normalized embeddings, computed here by hand."""
    params = jax.tree.map(np.asarray, new_params(tiny))
    x = params["embedding"][TOKENS] + params["positions"][: len(TOKENS)]
    first = jax.tree.map(lambda w: w[0], params["blocks"])
    norm, attention = first["attention_norm"], first["attention"]
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + tiny.norm_epsilon)
    y = y * norm["scale"] + norm["b"]
    q, k = ((y @ attention[name]["w"] + attention[name]["b"]).reshape(len(TOKENS), tiny.num_heads, -1) for name in "qk")
    logits = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(np.tri(len(TOKENS), dtype=bool), logits, -np.inf)
    expected = np.exp(logits - logits.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(attention_weights(tiny, new_params(tiny), TOKENS)[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_the_last_lens_is_the_model(switched_on, position):
    """After the last layer the lens is the model's own prediction, after the first that of a model of one layer."""
    config = plain(switched_on, norm_position=position)
    params = new_params(config)
    lens = logit_lens(config, params, TOKENS)
    logits, _ = jax.jit(GPT(config).apply)({"params": params}, jnp.asarray([TOKENS]))
    probability = np.asarray(jax.nn.softmax(logits[0].astype(jnp.float32)))
    np.testing.assert_array_equal(lens.token_ids_LT[-1], probability.argmax(-1))
    np.testing.assert_allclose(lens.probability_LT[-1], probability.max(-1), rtol=1e-4)
    real = probability[:, : config.vocab_size].astype(np.float64)
    np.testing.assert_allclose(lens.entropy_LT[-1], -(real * np.log(real)).sum(-1), rtol=1e-3)
    shallow = dataclasses.replace(config, num_layers=1)
    cut = params | {"blocks": jax.tree.map(lambda w: w[:1], params["blocks"])}
    logits, _ = jax.jit(GPT(shallow).apply)({"params": cut}, jnp.asarray([TOKENS]))
    np.testing.assert_array_equal(lens.token_ids_LT[0], logits[0].argmax(-1))


@pytest.mark.parametrize("parametrization", ["standard", "mup", "completep"])
def test_a_lens_is_the_model_whose_later_layers_add_nothing(tiny, parametrization):
    """Whatever depth and width do to multipliers: the model stays the one that it is, and is not cut."""
    more = {"parametrization": parametrization, "base_num_layers": 1, "base_model_dim": 8, "base_head_dim": 4}
    config = plain(tiny, num_layers=4, initializer_std=0.3, **more)
    params = new_params(config)
    lens = logit_lens(config, params, TOKENS)
    for depth in (1, 2, 3):
        silent = jax.tree_util.tree_map_with_path(
            lambda path, w, d=depth: w.at[d:].set(0.0) if path[-2].key in ("out", "down") else w, params["blocks"]
        )
        logits, _ = GPT(config).apply({"params": params | {"blocks": silent}}, jnp.asarray([TOKENS]))
        probability = np.asarray(jax.nn.softmax(logits[0]))
        np.testing.assert_allclose(lens.probability_LT[depth - 1], probability.max(-1), rtol=1e-5)


def test_looked_at_most_is_the_mean_over_heads_of_what_is_before():
    weights_NTS = np.zeros((2, 3, 3))
    weights_NTS[:, 0, 0] = 1
    weights_NTS[0, 1, :2], weights_NTS[1, 1, :2] = (0.2, 0.8), (0.6, 0.4)
    weights_NTS[:, 2] = (0.5, 0.1, 0.4)
    found = looked_at_most(weights_NTS, 2)
    assert found == [[(0, 1.0)], [(1, pytest.approx(0.6)), (0, pytest.approx(0.4))], [(0, 0.5), (2, 0.4)]]
