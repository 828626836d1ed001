"""Weights in eight bits give what the rounded weights give, in a quarter of the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.model.gpt import GPT
from gptjax.model.int8 import Int8, quantize
from gptjax.model.layers import matmul
from gptjax.parallel.mesh import make_mesh
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.sampling.decode import decode_n_tokens, decoding_params, prefill, row_keys, start_decoding
from gptjax.sampling.rows import generate_tokens, stop_array

INT8 = DecodingConfig(weights="int8")


def whole(params):
    """Rounded parameters as float32 ones, with layers apart."""

    def one(leaf):
        if not isinstance(leaf, Int8):
            return leaf
        table = leaf.values.shape[0] == leaf.scale.shape[0] and leaf.values.shape[1] != leaf.scale.shape[0]
        return leaf.values.astype(jnp.float32) * (leaf.scale[:, None] if table else leaf.scale[None])

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, Int8))


@pytest.fixture
def model(tiny):
    """Widths that differ from each other and from the padded vocabulary."""
    params = jax.jit(GPT(tiny).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return tiny, jax.tree.map(lambda w: w + 0.05 * jax.random.normal(jax.random.key(w.size), w.shape), params)


def test_rounded_to_half_a_step():
    w = jax.random.normal(jax.random.key(0), (5, 7)).at[:, 3].set(0)
    for axis in (0, 1):
        values, scale = quantize(w, axis)
        again = values * jnp.expand_dims(scale, axis)
        assert values.dtype == jnp.int8
        assert jnp.all(jnp.abs(again - w) <= jnp.expand_dims(scale, axis) / 2 + 1e-7)
        assert jnp.all(jnp.abs(values).max(axis=axis) == jnp.where(jnp.abs(w).max(axis=axis) > 0, 127, 0))


@pytest.mark.parametrize("order", ["df", "fd"])
def test_product_is_that_of_the_rounded_weight(order):
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 5), (5, 7)]))
    w = w if order == "df" else w.T
    rounded = quantize(w, axis=order.index("d"))
    again = rounded.values * jnp.expand_dims(rounded.scale, order.index("d"))
    axes = ("embed", "ffn") if order == "df" else ("ffn", "embed")
    np.testing.assert_allclose(matmul(x, rounded, axes, order), matmul(x, again, axes, order), rtol=1e-5, atol=1e-5)


def test_the_model_is_that_of_the_rounded_weights(model):
    """Logits, and greedy texts through the cache; all matrices are rounded, norms, biases and positions are not."""
    config, params = model
    rounded = decoding_params(config, params, True)
    again = whole(rounded)
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9]])
    logits = [jax.jit(lambda p: GPT(config).apply({"params": p}, tokens)[0])(p) for p in (rounded, again)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
    kinds = {
        path[-1].key: isinstance(leaf, Int8)
        for path, leaf in jax.tree_util.tree_leaves_with_path(rounded, is_leaf=lambda leaf: isinstance(leaf, Int8))
    }
    assert {name for name, is_rounded in kinds.items() if is_rounded} == {"w", "embedding"}
    sampling = SamplingConfig(max_tokens=8, temperature=0)
    texts = [
        list(generate_tokens(config, p, [[3, 1, 4], [1]], sampling, (), 8, None, decoding))
        for p, decoding in ((params, INT8), (rounded, DecodingConfig()), (again, DecodingConfig()))
    ]
    assert texts[0] == texts[1] == texts[2]


def test_no_whole_weight_is_kept(model):
    """A quarter of the bytes; and no float32 array of a matrix's shape goes round in the loop."""
    config, params = model
    full, rounded = decoding_params(config, params), decoding_params(config, params, True)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(p["blocks"])) for p in (full, rounded)]
    assert sizes[1] < 0.35 * sizes[0]
    found = prefill(config, rounded, jnp.zeros((1, 4), jnp.int32), jnp.asarray([4]), 16)
    state = start_decoding(found, jnp.arange(1), jnp.asarray([12]), jnp.zeros((1, 128), bool), row_keys(0, 1))
    text = decode_n_tokens.lower(config, rounded, state, {}, stop_array(()), 4).compile().as_text()
    carried = [line.split(" while(")[0] for line in text.splitlines() if " while(" in line]
    assert sum("s8[32,128]" in arrays for arrays in carried) == 1
    assert not any("f32[32,128]" in arrays for arrays in carried)


def test_sharded(model):
    """Columns, rows and vocabulary in pieces: the texts of one device."""
    config, params = model
    sampling = SamplingConfig(max_tokens=8, temperature=1.0)
    expected = list(generate_tokens(config, params, [[3, 1, 4], [1]], sampling, (), 8, None, INT8))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), jnp.zeros((4, 8), jnp.int32))["params"])
        laid_out = jax.tree.map(
            lambda x, like: jax.device_put(x, jax.NamedSharding(mesh, like.sharding.spec)), params, shapes
        )
        assert list(generate_tokens(config, laid_out, [[3, 1, 4], [1]], sampling, (), 8, None, INT8)) == expected
