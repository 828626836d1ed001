"""The GPT as a whole. Each switch does what its name says, and ways of computing it agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.model.attention import Placement
from gptjax.model.gpt import GPT, apply_blocks, layer
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh, one_device_mesh
from gptjax.training.state import init_params

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 61, (8, 16)).astype(np.int32)


@pytest.fixture
def small(tiny):
    """One layer, for what does not depend on depth."""
    return dataclasses.replace(tiny, num_layers=1)


def new_params(config, std=0.2):
    """Parameters large enough for attention to be far from uniform, biases included, without compiling anything."""
    shapes = jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape) * std, p.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens=TOKENS, arguments=None):
    """Logits of the real vocabulary; `arguments` are GPT's keyword arguments."""
    logits, _ = GPT(config).apply({"params": params}, tokens, **(arguments or {}))
    return sharding.reshard(logits, "batch", "sequence", "features")[..., : config.vocab_size]


@pytest.mark.parametrize(
    ("pattern", "num_layers"), [(("dense",), 1), (("local",), 1), (("local",), 3), (("local", "dense"), 1)]
)
def test_causality_by_gradient(tiny, pattern, num_layers):
    """Output t depends on input s exactly where t may see s: the gradient is 0, not small, for every s > t. A local
    layer reaches window-1 tokens back, so L of them reach L·(window-1); dense layers reach everything before."""
    config = dataclasses.replace(tiny, attention_pattern=pattern, num_layers=num_layers, attention_window=4)
    blocks = new_params(config)["blocks"]
    T, D = 16, config.model_dim
    x_BTD = jnp.asarray(RANDOM.normal(size=(1, T, D)), jnp.float32)
    directions_TD = jnp.asarray(RANDOM.normal(size=(T, D)), jnp.float32)

    @jax.jit
    def reads(x_BTD):
        positions = jnp.arange(T)[None]
        _, vjp = jax.vjp(lambda x: apply_blocks(config, blocks, x, Placement(positions, positions), None), x_BTD)
        cotangents_TBTD = jnp.eye(T)[:, None, :, None] * directions_TD[None, None]
        return jnp.abs(jax.vmap(vjp)(cotangents_TBTD)[0]).sum(axis=(1, 3)) > 0

    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    reach = num_layers * 3 if pattern[0] == "local" else T
    np.testing.assert_array_equal(reads(x_BTD), (distance >= 0) & (distance <= reach))


def test_causality_of_tokens(switched_on):
    """Tokens after t cannot change the logits up to t by a single bit, with every switch on."""
    params = new_params(switched_on)
    changed = TOKENS.copy()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    before, after = logits_of(switched_on, params), logits_of(switched_on, params, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(axis=-1).all()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "none"])
def test_order(tiny, positions):
    """Attention sums over a set: one layer without positions gives the last token the same logits for any order of
    those before it. Every kind of position tells orders apart, and so does the causal mask of a second layer."""
    shuffled = TOKENS.copy()
    shuffled[:, :-1] = RANDOM.permuted(TOKENS[:, :-1], axis=1)

    def sensitive(num_layers):
        config = dataclasses.replace(tiny, num_layers=num_layers, positions=positions)
        params = new_params(config, std=0.2)
        last = [logits_of(config, params, tokens)[:, -1] for tokens in (TOKENS, shuffled)]
        return not np.allclose(*last, atol=1e-3)

    assert sensitive(1) == (positions != "none")
    assert positions != "none" or sensitive(2)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_only_rope_is_relative(small, positions):
    """RoPE sees distances: shifting all positions changes nothing. Learned positions are places."""
    config = dataclasses.replace(small, positions=positions)
    params = new_params(config)
    counted = np.tile(np.arange(12, dtype=np.int32), (8, 1))
    here, there = (logits_of(config, params, TOKENS[:, :12], {"positions": counted + shift}) for shift in (0, 4))
    assert np.allclose(here, there, atol=1e-3) == (positions == "rope")


def test_scan_unroll_and_remat_are_one_function(tiny):
    """How layers are run is no part of the model: outputs and gradients agree, with dropout on, where the pattern
    of two does not divide the three layers (one period is scanned, the last layer is not)."""
    rates = {f"{name}_dropout": 0.2 for name in ("embedding", "attention", "residual")}
    pattern = {"attention_pattern": ("dense", "local"), "attention_window": 3, "num_layers": 3}
    config = dataclasses.replace(tiny, **rates, **pattern)
    params = new_params(config, std=0.1)

    def value_and_gradient(scan_layers, remat):
        way = dataclasses.replace(config, scan_layers=scan_layers, remat=remat)

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            logits, _ = GPT(way).apply({"params": params}, TOKENS[:2], dropout_key=jax.random.key(3))
            return jnp.sin(logits[..., :61]).sum()

        return loss(params)

    value, gradient = value_and_gradient(False, "none")
    for way in ((True, "none"), (False, "save_dots"), (True, "full")):
        other_value, other_gradient = value_and_gradient(*way)
        np.testing.assert_allclose(other_value, value, rtol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), other_gradient, gradient)


def test_segments_isolate_documents(tiny):
    """Two documents in a row, with positions of their own, get the logits that each gets alone."""
    config = dataclasses.replace(tiny, attention_pattern=("dense", "local"), attention_window=4)
    params = new_params(config)
    segment_ids = np.repeat([[0] * 7 + [1] * 9], 8, axis=0).astype(np.int32)
    positions = np.repeat([[*range(7), *range(9)]], 8, axis=0).astype(np.int32)
    packed = logits_of(config, params, TOKENS, {"segment_ids": segment_ids, "positions": positions})
    np.testing.assert_allclose(packed[:, :7], logits_of(config, params, TOKENS[:, :7]), atol=1e-4)
    np.testing.assert_allclose(packed[:, 7:], logits_of(config, params, TOKENS[:, 7:]), atol=1e-4)


def test_grouped_queries_are_repeated_heads(small):
    """Two key/value heads for four query heads equal four heads of which pairs have the same weights."""
    grouped = dataclasses.replace(small, num_kv_heads=2)
    params = new_params(grouped)
    repeated = jax.tree.map(lambda p: p, params)
    for name in ("k", "v"):
        linear = params["blocks"]["attention"][name]
        for leaf in linear:
            heads = linear[leaf].reshape(*linear[leaf].shape[:-1], 2, 8)
            repeated["blocks"]["attention"][name][leaf] = jnp.repeat(heads, 2, axis=-2).reshape(*heads.shape[:-2], 32)
    np.testing.assert_allclose(logits_of(grouped, params), logits_of(small, repeated), atol=1e-4)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_forgets_the_length_of_queries_and_keys(small, qk_norm):
    """With it, scaling the query and key weights is no change; without it, it is."""
    config = dataclasses.replace(small, qk_norm=qk_norm, bias=False, norm_epsilon=1e-12)
    params = new_params(config)
    before = logits_of(config, params)
    for name in ("q", "k"):
        params["blocks"]["attention"][name]["w"] *= 3.0
    assert np.allclose(before, logits_of(config, params), atol=1e-3) == qk_norm


def test_logit_softcap_bounds(small):
    params = new_params(small)
    capped = logits_of(dataclasses.replace(small, logit_softcap=0.5), params)
    free = logits_of(small, params)
    assert jnp.abs(free).max() > 0.5
    np.testing.assert_allclose(capped, 0.5 * np.tanh(free / 0.5), atol=1e-5)


def test_post_norm(tiny):
    """As in GPT-1: the blocks' output is itself normalized, so there is no final norm; pre-norm has one."""
    config = dataclasses.replace(tiny, norm_position="post", norm_bias=False)
    params = new_params(config)
    for name in ("attention_norm", "feed_forward_norm"):
        params["blocks"][name]["scale"] = jnp.ones((2, 32))
    assert "final_norm" not in params
    assert "final_norm" in new_params(tiny)
    x_BTD = jnp.asarray(RANDOM.normal(5.0, 3.0, (2, 16, 32)), jnp.float32)
    positions = jnp.tile(jnp.arange(16), (2, 1))
    y_BTD = jax.jit(lambda x: apply_blocks(config, params["blocks"], x, Placement(positions, positions), None))(x_BTD)
    np.testing.assert_allclose(y_BTD.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y_BTD.std(-1), 1, atol=1e-3)


def test_heads(small):
    """A tied head multiplies by the embedding, an untied one by its own matrix; the bias is added to either."""
    tied = new_params(small)
    untied = dataclasses.replace(small, tie_embeddings=False, head_bias=True)
    assert set(new_params(untied)) - set(tied) == {"head", "head_bias"}
    bias = jnp.arange(128.0)
    same = {**tied, "head": tied["embedding"], "head_bias": bias}
    np.testing.assert_allclose(logits_of(untied, same), logits_of(small, tied) + bias[None, None, :61], atol=1e-4)
    assert jnp.abs(logits_of(untied, {**same, "head": tied["embedding"][::-1]}) - logits_of(untied, same)).max() > 1


def test_scaled_embedding(small):
    """`scale_embedding` is the model whose embedding, where it is read, is sqrt(model_dim) times larger."""
    untied = dataclasses.replace(small, tie_embeddings=False)
    params = new_params(untied)
    larger = {**params, "embedding": params["embedding"] * 32**0.5}
    scaled = logits_of(dataclasses.replace(untied, scale_embedding=True), params)
    np.testing.assert_allclose(scaled, logits_of(untied, larger), atol=1e-3)


def test_initialization(tiny):
    """Weights have standard deviation 0.02, those that write to the residual stream 0.02 / sqrt(2L) (GPT-2), biases
    are 0, scales 1, and no two layers are equal."""
    config = dataclasses.replace(tiny, num_layers=8, model_dim=64, feed_forward="swiglu", tie_embeddings=False)
    params = jax.jit(lambda key: init_params(GPT(config), key))(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [part.key for part in path]
        residual = names[-2:] in (["out", "w"], ["down", "w"])
        if names[-1] in ("b", "scale"):
            np.testing.assert_array_equal(leaf, float(names[-1] == "scale"))
        else:
            expected = 0.02 / 4 if residual else 0.02
            assert abs(float(leaf.std()) / expected - 1) < 5 / (2 * leaf.size) ** 0.5, names
    first, second = layer(params["blocks"], 0), layer(params["blocks"], 1)
    assert (first["attention"]["q"]["w"] != second["attention"]["q"]["w"]).all()


def test_dropout_needs_a_key_and_follows_it(small):
    """Without a key all is deterministic; a key decides the draw, another key draws otherwise; and each of the three
    places has a dropout of its own."""
    params = new_params(small)
    never = logits_of(small, params, TOKENS, {"dropout_key": jax.random.key(0)})
    for name in ("embedding", "attention", "residual"):
        config = dataclasses.replace(small, **{f"{name}_dropout": 0.3})
        np.testing.assert_allclose(logits_of(config, params), never, atol=1e-5)
        one, again, other = (logits_of(config, params, TOKENS, {"dropout_key": jax.random.key(n)}) for n in (0, 0, 1))
        np.testing.assert_array_equal(one, again)
        assert not np.allclose(one, other, atol=0.1), name
        assert not np.allclose(one, never, atol=0.1), name


def test_every_mesh_computes_the_same(switched_on):
    """Parameters and logits, dropout included, do not depend on the mesh, nor on whether there is one."""
    arguments = {"dropout_key": jax.random.key(7)}

    def compute():
        params = jax.jit(lambda key: init_params(GPT(switched_on), key))(jax.random.key(0))
        params = jax.tree.map(lambda p: 5 * p, params)
        return params, logits_of(switched_on, params, sharding.put_batch(TOKENS), arguments)

    expected = compute()
    for mesh in (one_device_mesh(), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        with jax.set_mesh(mesh):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), compute(), expected)


def test_padding_columns(small):
    """Columns that are no token are -inf, and the rows of the head behind them get no gradient."""
    config = dataclasses.replace(small, tie_embeddings=False, head_bias=True, logit_softcap=30.0)
    params = new_params(config)

    @jax.jit
    @jax.grad
    def gradients(params):
        logits, _ = GPT(config).apply({"params": params}, TOKENS)
        return jax.nn.logsumexp(logits, axis=-1).mean()

    logits, _ = GPT(config).apply({"params": params}, TOKENS)
    assert logits.shape == (8, 16, 128)
    assert (logits[..., 61:] == -jnp.inf).all()
    assert jnp.isfinite(logits[..., :61]).all()
    found = gradients(params)
    np.testing.assert_array_equal(found["head"][61:], 0)
    np.testing.assert_array_equal(found["head_bias"][61:], 0)
    assert (found["head_bias"][:61] != 0).all()


def test_bfloat16_is_near_float32(switched_on):
    """The compute type rounds, and changes nothing else; logits come in that type."""
    params = new_params(switched_on, std=0.1)
    half = logits_of(dataclasses.replace(switched_on, compute_dtype="bfloat16"), params)
    full = logits_of(switched_on, params)
    assert half.dtype == jnp.bfloat16
    assert float(jnp.abs(half.astype(jnp.float32) - full).mean() / full.std()) < 0.05


def test_select_gives_the_logits_of_one_token(small):
    params, index = new_params(small), np.arange(8, dtype=np.int32)
    selected = logits_of(small, params, TOKENS, {"select_B": index})
    np.testing.assert_allclose(selected[:, 0], logits_of(small, params)[np.arange(8), index], atol=1e-5)
