"""What the backward pass keeps and computes again, by the names of `model.remat`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, ModelConfig
from gptjax.model import kernels
from gptjax.model.gpt import GPT
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.training.losses import language_model_loss
from gptjax.training.state import init_params

B, T, L = 2, 12, 3
CONFIG = ModelConfig(
    num_layers=L, model_dim=32, num_heads=4, ffn_dim=80, context_length=T, vocab_size=61, compute_dtype="float32"
)
TOKENS = np.random.default_rng(0).integers(0, 61, (B, T + 1)).astype(np.int32)
NAMES = ("none", "full", "save_dots", "save_attention", "offload")


def loss_of(config):
    def loss(params, tokens):
        return language_model_loss(GPT(config))(params, {"tokens": tokens}, None)[0]

    return loss


def abstract(config):
    return jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))


def kept(config):
    """Arrays that the forward pass hands to the backward pass."""
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32)
    if sharding.has_mesh():
        tokens = jax.typeof(sharding.put_batch(TOKENS))
    backward = jax.eval_shape(lambda p, t: jax.vjp(lambda p: loss_of(config)(p, t), p)[1], abstract(config), tokens)
    return jax.tree.leaves(backward)


@pytest.mark.parametrize("blockwise", [False, True])
def test_what_is_kept(blockwise, monkeypatch):
    """For each layer beside its input `full` keeps nothing, `save_attention` attention's result (and of the blockwise
    kernel the log-sum-exp), `save_dots` the products that others start from, and `none` most: of a kernel that holds
    them, weights in the square of the context."""
    if blockwise:
        monkeypatch.setitem(kernels.BLOCKWISE_FROM, "cpu", 1)
    found = {name: kept(dataclasses.replace(CONFIG, remat=name)) for name in NAMES}
    size = {name: sum(array.size for array in arrays) for name, arrays in found.items()}
    D, F, N = CONFIG.model_dim, CONFIG.ffn_dim, CONFIG.num_heads
    assert size["save_attention"] - size["full"] == L * B * T * (D + (N if blockwise else 0))
    assert size["save_dots"] - size["full"] == L * B * T * (4 * D + F)
    assert size["offload"] == size["save_attention"]
    assert size["none"] > size["save_dots"]
    square = {name for name, arrays in found.items() if any(x.shape[-2:] == (T, T) for x in arrays)}
    assert square == (set() if blockwise else {"none"})


def loops(config, equations):
    program = jax.make_jaxpr(jax.grad(loss_of(config)))(abstract(config), TOKENS)
    return sum(equation.primitive.name == "scan" for equation in equations(program.jaxpr))


def test_attention_is_not_computed_again(equations, monkeypatch):
    """The blockwise kernel is a loop in each pass. Recomputation repeats the forward one but where its result and its
    log-sum-exp are kept."""
    monkeypatch.setitem(kernels.BLOCKWISE_FROM, "cpu", 1)
    found = {name: loops(dataclasses.replace(CONFIG, remat=name), equations) for name in NAMES}
    assert found == {"none": 2 * L, "full": 3 * L, "save_dots": 3 * L, "save_attention": 2 * L, "offload": 2 * L}


def test_offload_goes_to_the_host():
    """Each layer's input and attention's result are put into the host's memory and fetched from there; other names move
    nothing. Read off the program for a GPU: on a CPU both memories are one."""
    for name, moved in (("offload", 2 * L), ("save_attention", 0)):
        gradient = jax.jit(jax.grad(loss_of(dataclasses.replace(CONFIG, remat=name))))
        text = gradient.trace(abstract(CONFIG), TOKENS).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count('"pinned_host"') == moved, name


@pytest.mark.parametrize("name", NAMES)
def test_gathered_parameters_are_not_kept(name):
    """Where devices share parameters none keeps a whole matrix of a block for the backward pass."""
    config = dataclasses.replace(CONFIG, remat=name)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))):
        arrays = kept(config)
    matrices = [x.sharding.spec for x in arrays if x.shape[-2:] in ((32, 80), (80, 32))]
    assert len(matrices) == 2 * L
    assert all("fsdp" in jax.tree.leaves(tuple(spec)) for spec in matrices)


def test_gradients_do_not_depend_on_the_name(monkeypatch):
    """With either way to run layers and either kernel."""
    params = jax.jit(lambda: init_params(GPT(CONFIG), jax.random.key(0)))()
    expected = jax.jit(jax.grad(loss_of(CONFIG)))(params, TOKENS)
    monkeypatch.setitem(kernels.BLOCKWISE_FROM, "cpu", 1)
    for scan_layers, name in ((False, "save_attention"), (True, "save_attention"), (True, "offload")):
        config = dataclasses.replace(CONFIG, remat=name, scan_layers=scan_layers)
        found = jax.jit(jax.grad(loss_of(config)))(params, TOKENS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
