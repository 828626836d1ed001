"""Layers against their formulas in NumPy, and the properties that the model leans on."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig, ModelConfig
from gptjax.model.layers import (
    ACTIVATIONS,
    FeedForward,
    Linear,
    Norm,
    add_bias,
    constant,
    dropout,
    matmul,
    normal,
    softcap,
)
from gptjax.model.positions import rotary_factor, rotary_frequencies, rotate, sinusoid
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh

RANDOM = np.random.default_rng(0)


def test_matmul_and_its_gradient_under_a_mesh(mesh):
    """Flattening tokens changes neither the product nor the gradients, and the result is laid out as asked."""
    x, w, d = (RANDOM.normal(size=s).astype(np.float32) for s in ((8, 3, 4), (4, 6), (8, 3, 6)))
    x_BTD, w_DF = sharding.reshard(x, "batch", "sequence", "features"), sharding.reshard(w, "embed", "ffn")
    y_BTF, vjp = jax.vjp(lambda x, w: matmul(x, w, ("embed", "ffn")), x_BTD, w_DF)
    assert jax.typeof(y_BTF).sharding.spec == P(("data", "fsdp"), "context", "tensor")
    dx, dw = vjp(sharding.reshard(d, "batch", "sequence", "ffn"))
    np.testing.assert_allclose(y_BTF, x @ w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, d @ w.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw, np.einsum("btd,btf->df", x, d), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["df", "fd"])
def test_gradients_of_parameters_are_float32_sums(order):
    """Of bfloat16 activations a weight and a bias get the gradient that float32 sums over 512 tokens give, to float32's
    rounding, where bfloat16's is 2⁻⁹; the result and the gradient of the activation stay bfloat16."""
    x, d = (jnp.asarray(RANDOM.normal(size=(4, 128, size)), jnp.bfloat16) for size in (8, 6))
    w, b = RANDOM.normal(size=(8, 6)).astype(np.float32), RANDOM.normal(size=6).astype(np.float32)
    w = w if order == "df" else w.T

    def layer(x, w, b):
        return add_bias(matmul(x, w, ("embed", "ffn") if order == "df" else ("ffn", "embed"), order), b)

    y, vjp = jax.vjp(layer, x, w, b)
    dx, dw, db = vjp(d)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
    x, d = np.asarray(x, np.float64), np.asarray(d, np.float64)
    np.testing.assert_allclose(dw, np.einsum(f"btd,btf->{order}", x, d), rtol=0, atol=1e-4)  # of values up to 70
    np.testing.assert_allclose(db, d.sum((0, 1)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [True, False])
def test_norm(kind, bias):
    """LayerNorm centres and has a bias if asked; RMSNorm does neither, whatever `bias` says."""
    x = RANDOM.normal(2.0, 3.0, (2, 5, 8)).astype(np.float32)
    norm = Norm(kind, 1e-3, bias)
    names = {"scale", "b"} if kind == "layernorm" and bias else {"scale"}
    params = {name: RANDOM.normal(size=8).astype(np.float32) for name in names}
    assert set(norm.init(jax.random.key(0), x)["params"]) == names
    centred = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-3) * params["scale"]
    expected = expected + params.get("b", 0)
    np.testing.assert_allclose(norm.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


def test_norm_computes_in_float32():
    """In bfloat16 the mean of squares of 300 would lose its small terms; the result keeps the input's type."""
    x = jnp.full((1, 1, 1024), 300.0, jnp.bfloat16).at[:, :, 0].set(1.0)
    norm = Norm("rmsnorm", 1e-5)
    y = norm.apply(norm.init(jax.random.key(0), x), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y[0, 0, 1:].astype(jnp.float32), 1.0, rtol=2**-8)


def test_dropout_keeps_the_mean_and_needs_a_key():
    """E[dropout(x)] = x: over 2¹⁶ draws the mean is within five standard errors, and values are 0 or x/(1-rate)."""
    x, rate = jnp.ones((2**16,)), 0.25
    y = dropout(x, rate, jax.random.key(1))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(float(y.mean()) - 1) < 5 * (rate / (1 - rate) / x.size) ** 0.5
    assert dropout(x, rate, None) is x
    assert dropout(x, 0.0, jax.random.key(1)) is x


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 2, 4), (2, 2, 2)])
def test_dropout_draws_the_same_on_every_mesh(axes):
    """A draw is a function of the key and the global shape, never of which device holds an element."""
    x, key = np.ones((8, 2, 8), np.float32), jax.random.key(2)
    alone = dropout(jnp.asarray(x), 0.5, key)
    with jax.set_mesh(make_mesh(MeshConfig(data=axes[0], fsdp=axes[1], tensor=axes[2]))):
        split = dropout(sharding.reshard(x, "batch", "sequence", "ffn"), 0.5, key)
        np.testing.assert_array_equal(split, alone)


def test_softcap():
    x = jnp.linspace(-1e3, 1e3, 101)
    assert jnp.abs(softcap(x, 5.0)).max() <= 5.0
    assert (jnp.diff(softcap(x / 100, 5.0)) > 0).all()
    np.testing.assert_allclose(jax.grad(lambda x: softcap(x, 5.0))(0.0), 1.0)
    assert softcap(x, 0.0) is x


ROTARY = functools.partial(ModelConfig, model_dim=16, num_heads=2, positions="rope", rope_base=100.0)


@pytest.mark.parametrize("rotary_dim", [8, 4, 0])
def test_rope_depends_on_relative_positions_only(rotary_dim):
    """q·k after rotation is unchanged when both positions move by the same amount, and changes when one does;
    lengths are kept, position 0 is the identity, and dimensions past `rotary_dim` stay as they were."""
    q, k = (jnp.asarray(RANDOM.normal(size=(2, 3, 2, 8)), jnp.float32) for _ in range(2))
    positions = jnp.array([[0, 1, 2], [5, 9, 40]])
    frequencies = rotary_frequencies(ROTARY(rope_fraction=rotary_dim / 8), local=False)

    def scores(q_shift, k_shift):
        rotated = [rotate(x, positions + s, frequencies) for x, s in ((q, q_shift), (k, k_shift))]
        return jnp.einsum("btnh,bsnh->bnts", *rotated)

    np.testing.assert_allclose(scores(7, 7), scores(0, 0), rtol=1e-4, atol=1e-4)
    assert np.allclose(scores(7, 0), scores(0, 0), atol=1e-2) == (rotary_dim == 0)
    rotated = rotate(q, positions, frequencies)
    np.testing.assert_array_equal(rotated[..., rotary_dim:], q[..., rotary_dim:])
    np.testing.assert_allclose(jnp.square(rotated).sum(-1), jnp.square(q).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(rotate(q, jnp.zeros_like(positions), frequencies), q)


def test_rope_formula():
    """Dimension i and i + half turn by position · base^(-2i/rotary_dim), as in Su et al. 2021 and GPT-NeoX."""
    x = np.zeros((1, 1, 1, 4), np.float32)
    x[..., 1] = 1.0
    frequencies = rotary_frequencies(ROTARY(rope_fraction=0.5), local=False)
    turned = rotate(jnp.asarray(x), jnp.array([[3]]), frequencies)[0, 0, 0]
    np.testing.assert_allclose(turned, [0, np.cos(0.3), 0, np.sin(0.3)], atol=1e-6)


SCALED = functools.partial(ModelConfig, model_dim=64, num_heads=1, positions="rope", rope_factor=8.0)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_rope_scaling(kind):
    """Linear makes all wavelengths longer, llama3 and yarn only those that hardly fit into the old context."""
    plain = rotary_frequencies(SCALED(), local=False)
    np.testing.assert_allclose(rotary_frequencies(SCALED(rope_scaling="linear"), local=False) * 8, plain, rtol=1e-6)
    config = SCALED(rope_scaling=kind, rope_original_length=1000, rope_truncate=False)
    scaled, times = rotary_frequencies(config, local=False), 1000 * plain / (2 * np.pi)
    often = {"llama3": 4, "yarn": 32}[kind]
    np.testing.assert_array_equal(scaled[times >= often], plain[times >= often])
    np.testing.assert_allclose(scaled[times <= 1] * 8, plain[times <= 1], rtol=1e-6)
    between = (times > 1) & (times < often)
    assert between.any()
    assert ((scaled[between] < plain[between]) & (scaled[between] * 8 > plain[between])).all()
    assert (np.diff(scaled) < 0).all()


def test_yarn_goes_over_by_the_number_of_the_pair():
    """From the pair that turns 2^10 times in the old context to the one that turns 2^2.5 times; or, rounded outward,
    from whole ones."""
    config = SCALED(rope_scaling="yarn", rope_base=2.0**32, rope_original_length=411_774, rope_factor=4.0)  # 2^17 π
    config = dataclasses.replace(config, rope_low_frequency=2.0**2.5, rope_high_frequency=2.0**10)
    for truncate, first, last in ((False, 6, 13.5), (True, 5, 14)):
        found = rotary_frequencies(dataclasses.replace(config, rope_truncate=truncate), local=False)
        kept = (found * 2.0 ** np.arange(32) - 1 / 4) / (1 - 1 / 4)
        np.testing.assert_allclose(kept, np.clip((last - np.arange(32)) / (last - first), 0, 1), atol=1e-5)


def test_longrope_is_decided_by_the_context():
    """Each wavelength has its own factor, from the one list or the other; the logits' from the ratio of contexts."""
    short, long = tuple(1.0 + i for i in range(32)), tuple(2.0 + i for i in range(32))
    config = SCALED(rope_scaling="longrope", rope_short_factors=short, rope_long_factors=long, context_length=8192)
    plain = rotary_frequencies(SCALED(), local=False)
    np.testing.assert_allclose(rotary_frequencies(config, local=False) * short, plain, rtol=1e-6)
    longer = dataclasses.replace(config, context_length=8193)
    np.testing.assert_allclose(rotary_frequencies(longer, local=False) * long, plain, rtol=1e-6)
    assert rotary_factor(config, local=False) == pytest.approx((1 + np.log(8) / np.log(8192)) ** 0.5)


def test_rotated_dimensions_alone_are_multiplied():
    """And by nothing where rope_scaling is none of those that do."""
    config = SCALED(rope_scaling="yarn", rope_fraction=0.5)
    assert rotary_factor(config, local=False) == pytest.approx(0.1 * np.log(8) + 1)
    assert rotary_factor(dataclasses.replace(config, rope_attention_factor=1.5), local=False) == 1.5
    assert rotary_factor(SCALED(rope_scaling="linear"), local=False) == 1
    x = jnp.ones((1, 1, 1, 64))
    turned = rotate(x, jnp.zeros((1, 1), int), rotary_frequencies(config, local=False), 1.5)[0, 0, 0]
    np.testing.assert_array_equal(turned, [1.5] * 32 + [1.0] * 32)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_local_layers_are_scaled_where_they_are_to_be(kind):
    """Their base is another matter."""
    dense = SCALED(rope_scaling=kind, rope_original_length=1000)
    apart = dataclasses.replace(dense, rope_local_base=100.0)
    np.testing.assert_allclose(rotary_frequencies(apart, local=True), 100.0 ** (-np.arange(32) / 32), rtol=1e-5)
    assert rotary_factor(apart, local=True) == 1
    alike = dataclasses.replace(dense, rope_scale_local=True)
    for compute in (rotary_frequencies, rotary_factor):
        np.testing.assert_array_equal(compute(alike, local=True), compute(dense, local=False))
    other = dataclasses.replace(apart, rope_scale_local=True, rope_base=7.0)
    expected = rotary_frequencies(dataclasses.replace(dense, rope_base=100.0), local=False)
    np.testing.assert_array_equal(rotary_frequencies(other, local=True), expected)


@pytest.mark.parametrize("dim", [6, 5])
def test_sinusoid_formula(dim):
    positions = np.array([[0, 1, 1000]])
    expected = [
        [(np.cos if d % 2 else np.sin)(p / 10_000 ** ((d - d % 2) / dim)) for d in range(dim)] for p in positions[0]
    ]
    np.testing.assert_allclose(sinusoid(jnp.asarray(positions), dim)[0], expected, atol=1e-4)


def test_activations():
    x = np.linspace(-4, 4, 33)
    sigmoid, relu = 1 / (1 + np.exp(-x)), np.maximum(x, 0)
    cdf = np.array([0.5 * (1 + math.erf(v / 2**0.5)) for v in x])
    tanh = 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    expected = {
        "relu": relu,
        "relu2": relu**2,
        "gelu_tanh": tanh,
        "geglu": tanh,
        "gelu": x * cdf,
        "swiglu": x * sigmoid,
    }
    assert set(expected) == set(ACTIVATIONS)
    for name, values in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), values, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward(gated):
    """`act(x gate) * (x up)` where gated, `act(x up)` otherwise, each with its bias, times `down`."""
    layer = FeedForward(6, "relu", gated, bias=True, init_std=0.5, residual_std=0.5)
    x = RANDOM.normal(size=(2, 3, 4)).astype(np.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    assert set(params) == ({"gate", "up", "down"} if gated else {"up", "down"})
    params = jax.tree.map(lambda p: RANDOM.normal(size=p.shape).astype(np.float32), params)

    def linear(name, x):
        return x @ params[name]["w"] + params[name]["b"]

    hidden = np.maximum(linear("gate" if gated else "up", x), 0) * (linear("up", x) if gated else 1)
    np.testing.assert_allclose(layer.apply({"params": params}, x), linear("down", hidden), rtol=1e-4, atol=1e-5)


def test_initializers(mesh):
    """Draws have the standard deviation asked for, and are born in their shards, equal on every mesh."""
    drawn = jax.jit(lambda key: normal(0.3, "embed", "ffn")(key, (128, 128)))(jax.random.key(0))
    assert jax.typeof(drawn).sharding.spec == P(("fsdp", "context"), "tensor")
    assert abs(float(drawn.std()) / 0.3 - 1) < 5 / (2 * drawn.size) ** 0.5
    assert jax.typeof(constant(2.0, "ffn")(None, (8,))).sharding.spec == P("tensor")
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
        np.testing.assert_array_equal(normal(0.3, "embed", "ffn")(jax.random.key(0), (128, 128)), drawn)


def test_linear_output_layout(mesh):
    """A projection into the residual stream leaves it whole on each device, although its weight is stored in pieces."""
    layer = Linear(8, ("ffn", "embed"), bias=True, init_std=1.0)
    x = sharding.reshard(np.ones((8, 2, 4), np.float32), "batch", "sequence", "ffn")
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert jax.typeof(variables["params"]["w"]).sharding.spec == P("tensor", ("fsdp", "context"))
    assert jax.typeof(y).sharding.spec == P(("data", "fsdp"), "context", None)
