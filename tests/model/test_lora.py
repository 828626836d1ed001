"""Adapters: what they add, that only they learn, and that merged they are the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.model import lora
from gptjax.model.accounting import adapter_parameters
from gptjax.model.gpt import GPT, VALUE_HEAD
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.training.losses import language_model_loss
from gptjax.training.state import draw_params, draw_trained, init_params
from gptjax.tuning_config import LoraConfig

CONFIG = LoraConfig(rank=3, alpha=6.0)
TOKENS = np.random.default_rng(0).integers(0, 61, (8, 17)).astype(np.int32)


@pytest.fixture(params=["tiny", "switched_on"])
def model(request):
    config = dataclasses.replace(request.getfixturevalue(request.param), embedding_dropout=0.0)
    return GPT(config), init_params(GPT(config), jax.random.key(0))


def trained(model, seed=1):
    """Adapters that have learned something."""
    drawn = draw_trained(model, CONFIG, jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), drawn)


def logits(model, params):
    return jax.jit(lambda p: model.apply({"params": p}, TOKENS[:, :-1])[0])(params)


def test_new_adapters_change_nothing(model):
    model, params = model
    joined = lora.join(params, draw_trained(model, CONFIG, jax.random.key(1)), CONFIG)
    np.testing.assert_array_equal(logits(model, joined), logits(model, params))


def test_merged_they_are_the_same_model(model):
    """x w + (x a) b (alpha / rank), and x (w + a b (alpha / rank))."""
    model, params = model
    joined = lora.join(params, trained(model), CONFIG)
    merged = lora.merge(joined)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert np.abs(logits(model, merged) - logits(model, params))[..., :61].max() > 1e-2
    np.testing.assert_allclose(logits(model, joined), logits(model, merged), rtol=1e-4, atol=1e-5)
    w = merged["blocks"]["attention"]["q"]["w"]
    adapter = trained(model)["adapters"]["attention"]["q"]
    expected = params["blocks"]["attention"]["q"]["w"] + 2.0 * np.einsum("ldr,lrf->ldf", adapter["a"], adapter["b"])
    np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_chain_rule(model):
    """dL/da = (alpha / rank) dL/dw bᵀ and dL/db = (alpha / rank) aᵀ dL/dw, with dL/dw of the merged model."""
    model, params = model
    own, batch = trained(model), {"tokens": TOKENS}
    loss = language_model_loss(model)
    found = jax.jit(jax.grad(lambda t: loss(lora.join(params, t, CONFIG), batch, None)[0]))(own)
    whole = jax.jit(jax.grad(lambda p: loss(p, batch, None)[0]))(lora.merge(lora.join(params, own, CONFIG)))
    for part, layers in own["adapters"].items():
        for name, adapter in layers.items():
            dw = whole["blocks"][part][name]["w"]
            gradient = found["adapters"][part][name]
            da, db = 2 * np.einsum("ldf,lrf->ldr", dw, adapter["b"]), 2 * np.einsum("ldr,ldf->lrf", adapter["a"], dw)
            np.testing.assert_allclose(gradient["a"], da, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(gradient["b"], db, rtol=1e-3, atol=1e-4)


def test_the_count_is_right(model):
    model, _ = model
    for targets in (CONFIG.targets, ("q", "v")):
        config = dataclasses.replace(CONFIG, targets=targets)
        drawn = draw_trained(model, config, jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(drawn)) == adapter_parameters(model.config, config)


def test_a_value_head_is_trained_whole(tiny):
    model = GPT(dataclasses.replace(tiny, value_head=True))
    drawn = draw_trained(model, CONFIG, jax.random.key(0))
    assert set(drawn) == {"value_head", "value_bias", "adapters"}


@pytest.mark.parametrize(
    ("axes", "scan"), [({"fsdp": 4, "tensor": 2}, True), ({"data": 2, "context": 2, "tensor": 2}, False)]
)
def test_meshes_agree(switched_on, axes, scan):
    config = dataclasses.replace(switched_on, embedding_dropout=0.0, scan_layers=scan)
    model, batch = GPT(config), {"tokens": TOKENS}
    loss = language_model_loss(model)

    def run(tokens):
        own = jax.jit(lambda key: draw_trained(model, CONFIG, key))(jax.random.key(1))
        own = jax.tree.map(lambda x: x + 0.1, own)
        params = jax.jit(lambda: init_params(model, jax.random.key(0)))()

        def of(own, params):
            return loss(lora.join(params, own, CONFIG), {"tokens": tokens}, None)[0]

        value, gradient = jax.jit(jax.value_and_grad(of))(own, params)
        return float(value), [float(jnp.square(g).sum()) for g in jax.tree.leaves(gradient)]

    alone = run(jnp.asarray(batch["tokens"]))
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | axes))):
        together = run(sharding.put_batch(batch["tokens"]))
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(together[1], alone[1], rtol=1e-3)


def test_a_value_head_is_drawn_without_the_model(tiny):
    """Of the draw of a whole model memory holds no more than what is kept, which is the same numbers."""
    model = GPT(dataclasses.replace(tiny, value_head=True))
    whole, heads = draw_params(model, 3), draw_params(model, 3, VALUE_HEAD)
    jax.tree.map(np.testing.assert_array_equal, heads, {name: whole[name] for name in VALUE_HEAD})
