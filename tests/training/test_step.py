"""The train step: accumulation, traced counts, dispatches of several steps, and every mesh."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptjax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from gptjax.model.gpt import GPT, Head
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh, one_device_mesh
from gptjax.training.guard import init_guard
from gptjax.training.loop import next_batch
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.schedule import Progress
from gptjax.training.state import TrainState, abstract_state, init_state
from gptjax.training.step import make_train_step

V, T = 11, 5
RANDOM = np.random.default_rng(0)
OPTIMIZER = make_optimizer(OptimizerConfig())
MESHES = [
    dict(zip(("data", "fsdp", "context", "tensor"), sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if math.prod(sizes) == 8
]


def bigram_state():
    params = {"embedding": jnp.asarray(np.random.default_rng(1).normal(size=(V, V)), jnp.float32)}
    return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params), init_guard())


def bigram_apply(variables, tokens, dropout_key, output):
    logits = variables["params"]["embedding"][tokens]
    noise = 0.0 if dropout_key is None else 0.3 * jax.random.normal(dropout_key, logits.shape)
    return output(Head(jnp.eye(V), None), logits + noise), None


BIGRAM_CONFIG = ModelConfig(model_dim=V, num_heads=1, vocab_size=V)
BIGRAM = language_model_loss(SimpleNamespace(apply=bigram_apply, config=BIGRAM_CONFIG), z_loss=0.01)


def bigram_step(**settings):
    settings = {"dropout_seed": None, "accumulates": True} | settings
    return make_train_step(BIGRAM, OPTIMIZER, **settings)


def rows(*shape):
    """Tokens, and a loss mask of unequal weight in every row."""
    tokens = RANDOM.integers(0, V, (*shape, T + 1)).astype(np.int32)
    return {
        "tokens": tokens,
        "loss_mask": (RANDOM.random(tokens.shape) < RANDOM.random((*shape, 1))).astype(np.float32),
    }


def counts(*values, dtype=np.int32):
    return np.array(values, dtype)


def assert_close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


def test_accumulation_equals_the_large_batch():
    """Three micro-batches of two are one batch of six, although their masks weigh differently: sums are divided by
    the whole weight once. A fourth, which is not counted in, changes nothing."""
    batch = rows(1, 4, 2)
    large = jax.tree.map(lambda x: x[:, :3].reshape(1, 1, 6, T + 1), batch)
    rate = counts(0.1, dtype=np.float32)
    accumulated = bigram_step()(bigram_state(), batch, counts(3), rate, 1)
    at_once = bigram_step(accumulates=False)(bigram_state(), large, counts(1), rate, 1)
    assert_close(accumulated, at_once, rtol=1e-5, atol=1e-6)
    assert float(accumulated[1]["weight"][0]) == large["loss_mask"][..., 1:].sum()


def test_metrics_and_update():
    """`loss` is nats a token without z-loss, `grad_norm` the norm before clipping, and the new parameters are the old
    ones less learning rate times the optimizer's update of the mean gradient."""
    batch, state = rows(1, 1, 4), bigram_state()
    micro = jax.tree.map(lambda x: x[0, 0], batch)
    grads, sums = jax.grad(BIGRAM, has_aux=True)(state.params, micro, None)
    grads = jax.tree.map(lambda g: g / sums["weight"], grads)
    updates, _ = OPTIMIZER.update(grads, state.optimizer, state.params)
    expected = jax.tree.map(lambda p, u: p - 0.3 * u, state.params, updates)
    state, metrics = bigram_step(accumulates=False)(state, batch, counts(1), counts(0.3, dtype=np.float32), 1)
    assert_close(state.params, expected, rtol=1e-5, atol=1e-6)
    assert int(state.step) == 1
    assert float(metrics["loss"][0]) == pytest.approx(float(sums["loss"] / sums["weight"]), rel=1e-5)
    norm = sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)) ** 0.5
    assert float(metrics["grad_norm"][0]) == pytest.approx(norm, rel=1e-5)


def test_counts_and_rates_do_not_recompile():
    """A batch that ramps up from one to four micro-batches, the warm-up, and dispatches cut to any length run one
    program: counts, rates and numbers of steps are traced."""
    step, state = bigram_step(steps_per_dispatch=2), bigram_state()
    for micro in (1, 2, 3, 4):
        for num_steps in (1, 2):
            state, _ = step(
                state, rows(2, 4, 2), counts(micro, micro), counts(0.1 * micro, 0.2, dtype=np.float32), num_steps
            )
    assert step._cache_size() == 1
    assert int(state.step) == 12


def test_dispatch_equals_single_steps():
    """Steps handed over three, then two at once are bit-equal to single ones, dropout included: its key depends on
    the step's number alone. What a cut dispatch holds behind its end is not read."""
    batch = rows(6, 2, 2)
    num_micro, rates = counts(1, 2, 2, 1, 2, 2), np.linspace(0.1, 0.3, 6).astype(np.float32)
    single, several = bigram_step(dropout_seed=5), bigram_step(dropout_seed=5, steps_per_dispatch=3)
    state, losses = bigram_state(), []
    for k in range(5):
        at = slice(k, k + 1)
        state, metrics = single(state, jax.tree.map(lambda x, at=at: x[at], batch), num_micro[at], rates[at], 1)
        losses.append(float(metrics["loss"][0]))
    other, found = bigram_state(), []
    for k, num_steps in ((0, 3), (3, 2)):
        at = slice(k, k + 3)
        part = jax.tree.map(lambda x, at=at: x[at], batch)
        other, metrics = several(other, part, num_micro[at], rates[at], num_steps)
        found += [float(x) for x in metrics["loss"][:num_steps]]
    assert found == losses
    jax.tree.map(np.testing.assert_array_equal, other, state)
    assert len(set(losses)) == 5


def test_dropout_follows_step_and_micro_batch():
    """The same rows get new draws in every step and in every micro-batch, the same ones when a step is repeated, and
    none without a seed."""
    same = jax.tree.map(lambda x: np.broadcast_to(x, (1, 2, *x.shape[2:])), rows(1, 1, 4))

    def loss(step, number, num_micro):
        state = bigram_state()._replace(step=jnp.asarray(number, jnp.int32))
        return float(step(state, same, counts(num_micro), counts(0.0, dtype=np.float32), 1)[1]["loss"][0])

    seeded, plain = bigram_step(dropout_seed=0), bigram_step()
    assert loss(seeded, 0, 1) == loss(seeded, 0, 1)
    assert abs(loss(seeded, 0, 1) - loss(seeded, 1, 1)) > 1e-4
    assert abs(loss(seeded, 0, 1) - loss(seeded, 0, 2)) > 1e-4
    assert loss(plain, 0, 1) == pytest.approx(loss(plain, 1, 2), rel=1e-6)


@pytest.mark.parametrize("switches", ["default", "switched on"])
def test_no_gradient_is_rounded_to_bfloat16(switches, tiny, switched_on):
    """Of every parameter of a bfloat16 model less than half of the gradient's elements are numbers that bfloat16 has,
    as some sums of few terms are by chance. Each operation is compiled alone, for XLA leaves out roundings between
    operations. Without rotation a bias of the keys has no gradient: it moves all logits of a query alike."""
    alone = {"compute_dtype": "bfloat16", "scan_layers": False, "remat": "none"}
    config = dataclasses.replace({"default": tiny, "switched on": switched_on}[switches], **alone)
    model = GPT(config)
    params, tokens = init_state(model, OPTIMIZER, seed=0).params, RANDOM.integers(0, 61, (8, 9))
    grads = jax.grad(language_model_loss(model), has_aux=True)(params, {"tokens": tokens}, None)[0]

    def rounded(grad):
        return float((grad == grad.astype(jnp.bfloat16))[grad != 0].mean())

    shares = {jax.tree_util.keystr(path): rounded(g) for path, g in jax.tree_util.tree_leaves_with_path(grads)}
    if switches == "default":
        del shares["['blocks']['attention']['k']['b']"]
    assert max(shares.values()) < 0.5, shares


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 1, "tensor": 8}, {"data": 1, "context": 4}], ids=str)
def test_a_batch_of_one_sequence(axes, switched_on):
    """JAX takes a dimension of one for none, and so forgets how it is split: gradients are those without a mesh."""
    config = dataclasses.replace(switched_on, context_length=8)
    model, tokens = GPT(config), RANDOM.integers(0, 61, (1, 9)).astype(np.int32)
    start = jax.device_get(init_state(model, OPTIMIZER, seed=0).params)
    gradient = jax.grad(language_model_loss(model), has_aux=True)
    expected, _ = jax.jit(gradient)(start, {"tokens": tokens}, None)
    with jax.set_mesh(make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(axes.values())])):
        target = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, OPTIMIZER).params)
        found, _ = jax.jit(gradient)(jax.device_put(start, target), {"tokens": sharding.put_batch(tokens)}, None)
    assert_close(jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-5)


def test_state_is_donated_and_stays_float32():
    state = bigram_state()
    embedding = state.params["embedding"]
    state, _ = bigram_step()(state, rows(1, 1, 2), counts(1), counts(0.1, dtype=np.float32), 1)
    assert embedding.is_deleted()
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.optimizer[1].mu))} == {jnp.dtype("float32")}


def losses_on(mesh, config, start, num_micro=1, separator=None, length=8):
    """Losses of 20 steps from the same parameters on the same rows."""
    draw = np.random.default_rng(3)
    with jax.set_mesh(mesh):
        model, optimizer = GPT(config), make_optimizer(OptimizerConfig(clip_norm=0.5))
        loss = language_model_loss(model, z_loss=1e-4, separator=separator)
        step = make_train_step(loss, optimizer, dropout_seed=1, accumulates=num_micro > 1)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer))
        state, losses = jax.device_put(start, shardings), []
        for _ in range(20):
            tokens = draw.integers(0, config.vocab_size, (1, num_micro, 8, length + 1)).astype(np.int32) // 4
            batch = {"tokens": sharding.put_batch(tokens)}
            state, metrics = step(state, batch, counts(num_micro), counts(3e-3, dtype=np.float32), 1)
            losses.append(float(np.asarray(metrics["loss"])[0]))
        kept = jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), state, shardings)
        assert all(jax.tree.leaves(kept))
        return np.array(losses)


def test_every_mesh_trains_alike(switched_on):
    """For every axis alone and every three together, 20 steps of a model with most switches on, dropout included, have
    the losses of one device within 1e-5. A context of eight has 16 pieces, so it is the next test's."""
    # Compiling takes the time: scan and remat are the next test's, and one kind of dropout stands for three.
    cheaper = {"scan_layers": False, "remat": "none", "embedding_dropout": 0.0, "attention_dropout": 0.0}
    config = dataclasses.replace(switched_on, num_layers=1, attention_pattern=("local",), context_length=8, **cheaper)
    with jax.set_mesh(one_device_mesh()):
        start = jax.device_get(init_state(GPT(config), OPTIMIZER, seed=0))
    expected = losses_on(one_device_mesh(), config, start)
    assert expected[-1] < expected[0] - 0.5
    meshes = {frozenset(n for n, size in axes.items() if size > 1): axes for axes in MESHES if axes["context"] < 8}
    assert len(meshes) == 3 + 6 + 4
    for axes in (axes for names, axes in meshes.items() if len(names) != 2):  # two are in some three
        found = losses_on(make_mesh(MeshConfig(**axes)), config, start)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0, err_msg=str(axes))


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "context": 8}])
def test_accumulation_on_a_mesh(axes, tiny):
    """The same with GPT-2's switches, two micro-batches a step, all dropouts, packed documents that do not see each
    other, and layers that are scanned and recomputed."""
    dropouts = dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"), 0.1)
    config = dataclasses.replace(tiny, scan_layers=True, remat="full", **dropouts)
    with jax.set_mesh(one_device_mesh()):
        start = jax.device_get(init_state(GPT(config), OPTIMIZER, seed=0))
    meshes = one_device_mesh(), make_mesh(MeshConfig(**axes))
    found = [losses_on(mesh, config, start, num_micro=2, separator=3, length=16) for mesh in meshes]
    np.testing.assert_allclose(*found, atol=1e-5, rtol=0)


def test_state_shardings(tiny, mesh):
    """Parameters and moments are born in the shards that the table gives them, and `abstract_state` says the same."""
    state = init_state(GPT(tiny), OPTIMIZER, seed=0)
    expected = {
        "['embedding']": P("tensor", ("fsdp", "context")),
        "['positions']": P(None, ("fsdp", "context")),
        "['blocks']['attention']['q']['w']": P(None, ("fsdp", "context"), "tensor"),
        "['blocks']['attention']['out']['w']": P(None, "tensor", ("fsdp", "context")),
        "['blocks']['feed_forward']['up']['b']": P(None, "tensor"),
        "['blocks']['feed_forward']['down']['w']": P(None, "tensor", ("fsdp", "context")),
        "['final_norm']['scale']": P(("fsdp", "context")),
    }
    for tree in (state.params, state.optimizer[1].mu, state.optimizer[1].nu):
        found = {jax.tree_util.keystr(path): x.sharding.spec for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        assert {name: found[name] for name in expected} == expected

    def compare(leaf, abstract):
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)

    jax.tree.map(compare, state, abstract_state(GPT(tiny), OPTIMIZER))


@pytest.mark.parametrize("switches", ["default", "grouped queries", "switched on"])
def test_no_product_contracts_two_dimensions(switches, tiny, switched_on, equations):
    """XLA's CPU backend is 1.7 times slower at products that sum over two dimensions, as the gradient of a product
    of three-dimensional arrays does: no product of the whole step, forward or backward, sums over two."""
    configs = {
        "default": tiny,
        "grouped queries": dataclasses.replace(tiny, num_kv_heads=2),
        "switched on": switched_on,
    }
    model = GPT(configs[switches])
    loss = language_model_loss(model)
    step = make_train_step(loss, OPTIMIZER, dropout_seed=0, accumulates=True)
    state = jax.eval_shape(lambda: init_state(model, OPTIMIZER, seed=0))
    batch = {"tokens": jax.ShapeDtypeStruct((1, 2, 8, 9), jnp.int32)}
    program = jax.make_jaxpr(step)(state, batch, counts(2), counts(0.1, dtype=np.float32), 1)
    products = [e.params["dimension_numbers"][0] for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) > 20
    assert max(len(left) for left, _ in products) == 1


def test_feeding_a_mesh_waits_for_nothing(tiny, monkeypatch):
    """Steps on eight devices that share a batch, fed as the loop feeds them: nothing is read back from a device, and
    nothing moves between devices outside the program, so that the host runs ahead of them as it does of one."""
    config = Config(
        model=tiny, training=TrainingConfig(batch_size=16, micro_batch_size=8), optimizer=OptimizerConfig(decay_steps=9)
    )

    class Stream:
        def take(self, num_rows, state):
            return np.ones((num_rows, tiny.context_length + 1), np.int32)

    def refuse(array):
        raise AssertionError("an array was read back")

    with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=2))):
        model = GPT(tiny)
        loss = language_model_loss(model)
        step = make_train_step(loss, OPTIMIZER, dropout_seed=None, accumulates=True)
        state, progress = init_state(model, OPTIMIZER, seed=0), Progress()
        with monkeypatch.context() as patch, jax.transfer_guard_device_to_device("disallow"):
            patch.setattr(type(state.step), "_value", property(refuse))  # what every read of an array goes through
            for _ in range(3):
                *batch, progress = next_batch(config, Stream(), progress, 1, state)
                state, metrics = step(state, *batch, 1)
            with pytest.raises(AssertionError, match="read back"):
                float(metrics["loss"][0])
        assert np.isfinite(metrics["loss"][0])
