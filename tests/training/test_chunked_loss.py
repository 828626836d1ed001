"""The loss whose logits are never all there: its value and gradients, what it keeps, and what it sends."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, ModelConfig, OptimizerConfig
from gptjax.model.gpt import GPT, Head
from gptjax.parallel import sharding
from gptjax.parallel.collectives import bytes_by_kind
from gptjax.parallel.mesh import make_mesh
from gptjax.training.losses import language_model_loss, loss_of_labels
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import init_params, init_state
from gptjax.training.step import make_train_step

B, T, D, V, PADDED, CAP = 4, 7, 16, 100, 128, 5.0
CONFIG = ModelConfig(model_dim=D, num_heads=1, vocab_size=V, logit_softcap=CAP)
RANDOM = np.random.default_rng(0)
W, BIAS, X = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((PADDED, D), (PADDED,), (B, T, D)))
LABELS = RANDOM.integers(0, V, (B, T)).astype(np.int32)
D_NLL, D_LOG_Z = RANDOM.normal(size=(2, B, T)).astype(np.float32)


def reference(w, bias, x, length=T):
    """(nll, log Z) and the gradients of w, bias and x along D_NLL and D_LOG_Z, by hand in float64, of the first tokens
    of each row."""
    w, bias, x = (np.asarray(a, np.float64) for a in (w, bias, x[:, :length]))
    labels, d_nll, d_log_z = (a[:, :length] for a in (LABELS, D_NLL, D_LOG_Z))
    logits = CAP * np.tanh((x @ w.T + bias) / CAP)
    real = np.where(np.arange(PADDED) < V, logits, -np.inf)
    log_z = np.log(np.exp(real).sum(-1))
    probability = np.exp(real - log_z[..., None])
    one_hot = np.arange(PADDED) == labels[..., None]
    d_logits = probability * (d_nll + d_log_z)[..., None] - one_hot * d_nll[..., None]
    d_raw = d_logits * (1 - (logits / CAP) ** 2)
    gradients = np.einsum("btv,btd->vd", d_raw, x), d_raw.sum((0, 1)), d_raw @ w
    return (log_z - (logits * one_hot).sum(-1), log_z), gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 12, 1000])
def test_loss_and_gradients_are_the_formulas(dtype, chunk_tokens):
    """Whole or in chunks of one, of three (which do not divide seven tokens) and of all tokens of a row: within 1e-5
    in float32; in bfloat16 within what rounding the logits to 8 bits does, of the same inputs. The gradient of the
    hidden states has their type, that of the head is float32."""
    x = jnp.asarray(X, dtype)
    w = jnp.asarray(W, dtype).astype(jnp.float32)  # so that the cast inside rounds nothing

    def function(w, bias, x):
        return loss_of_labels(CONFIG, LABELS, chunk_tokens)(Head(w, bias), x)

    @jax.jit
    def value_and_gradients(w, bias, x):
        value, vjp = jax.vjp(function, w, bias, x)
        return value, vjp((D_NLL, D_LOG_Z))

    found = value_and_gradients(w, BIAS, x)
    assert [g.dtype for g in found[1]] == [jnp.float32, jnp.float32, x.dtype]
    expected = reference(w, BIAS, x.astype(jnp.float32))
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == "float32" else {"rtol": 2**-5, "atol": 2**-5}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), b, **tolerance), found, expected)


@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}, {"fsdp": 4, "context": 2}],
)
def test_on_every_axis(axes):
    """Split over rows, sequences and vocabulary the chunks give the formulas' values and gradients, in the shards of
    their parameters."""
    odd = 6  # of each sequence; two of them, and then three, on each device
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1} | axes))):
        w, bias = sharding.reshard(W, "vocab", "embed"), sharding.reshard(BIAS, "vocab")
        x = sharding.reshard(X[:, :odd], "batch", "sequence", "features")
        labels, *gradients = (sharding.reshard(a[:, :odd], "batch", "sequence") for a in (LABELS, D_NLL, D_LOG_Z))

        @jax.jit
        def value_and_gradients(w, bias, x, labels, gradients):
            value, vjp = jax.vjp(lambda *p: loss_of_labels(CONFIG, labels, 16)(Head(*p[:2]), p[2]), w, bias, x)
            return value, vjp(gradients)

        value, found = value_and_gradients(w, bias, x, labels, tuple(gradients))
    assert [g.sharding.spec for g in found] == [a.sharding.spec for a in (w, bias, x)]
    expected = reference(W, BIAS, X, odd)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), (value, found), expected)


def test_in_the_model(switched_on):
    """Of packed documents with a loss mask and z-loss on a mesh that splits sequences, whose tokens change places: sums
    and gradients of all parameters are those of the whole loss."""
    config = dataclasses.replace(switched_on, num_layers=1, attention_pattern=("dense",), scan_layers=False)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))):
        model = GPT(config)
        params = jax.tree.map(lambda p: 3 * p, jax.jit(lambda: init_params(model, jax.random.key(0)))())
        tokens, mask = (
            RANDOM.integers(0, 8, (4, 17)).astype(np.int32),
            RANDOM.integers(0, 2, (4, 17)).astype(np.float32),
        )
        batch = {"tokens": sharding.put_batch(tokens), "loss_mask": sharding.put_batch(mask)}

        def run(chunk_tokens):
            loss = language_model_loss(model, z_loss=0.1, separator=3, chunk_tokens=chunk_tokens)
            return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, None)

        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(24), run(0))


def test_the_head_is_gathered_and_reduced_once(mesh):
    """Chunks send no more than the whole: the head is gathered once a pass, and its gradient summed over devices once.
    Of either, eight times as much as the rest would be sent if it were once a chunk."""
    config = dataclasses.replace(CONFIG, model_dim=64, vocab_size=512)

    def sent(chunk_tokens):
        def loss(head, x, labels):
            return sum(y.sum() for y in loss_of_labels(config, labels, chunk_tokens)(head, x))

        head = Head(sharding.reshard(jnp.ones((512, 64)), "vocab", "embed"), None)
        x = sharding.reshard(jnp.ones((4, 16, 64)), "batch", "sequence", "features")
        labels = sharding.reshard(jnp.ones((4, 16), jnp.int32), "batch", "sequence")
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, x, labels).compile()
        return sum(bytes_by_kind(compiled.as_text()).values())

    assert sent(8) == pytest.approx(sent(0), rel=0.35)  # the whole one may share its one gather between the passes


def train_step(chunk_tokens):
    """The step of a bfloat16 model, and its arguments: 16 rows of 24 tokens, so that nothing but logits is so large."""
    config = ModelConfig(
        num_layers=1, model_dim=32, num_heads=2, context_length=24, vocab_size=1500, compute_dtype="bfloat16"
    )
    model, optimizer = GPT(config), make_optimizer(OptimizerConfig())
    loss = language_model_loss(model, z_loss=1e-4, chunk_tokens=chunk_tokens)
    step = make_train_step(loss, optimizer, dropout_seed=None, accumulates=False)
    state = jax.eval_shape(lambda: init_state(model, optimizer, seed=0))
    batch = {"tokens": jax.ShapeDtypeStruct((1, 1, 16, 25), jnp.int32)}
    return loss, step, (state, batch, np.ones(1, np.int32), np.ones(1, np.float32), 1)


LOGITS_SIZE = 16 * 24 * 1536


def sizes(hlo):
    """Elements of every array that an HLO module's text names, in fusions, too."""
    shapes = re.findall(r"\b[a-z]\w*\[([\d,]+)\]", hlo)
    return [math.prod(int(n) for n in shape.split(",")) for shape in shapes]


def test_no_array_of_all_logits_is_in_the_chunked_step():
    """In no type and in no fusion of the compiled step: nothing is larger than the head and its moments, or than the
    logits of a chunk. The whole loss has such arrays."""
    _, step, arguments = train_step(chunk_tokens=64)
    assert max(sizes(step.lower(*arguments).compile().as_text())) < LOGITS_SIZE / 5
    _, step, arguments = train_step(chunk_tokens=0)
    assert LOGITS_SIZE in sizes(step.lower(*arguments).as_text(dialect="hlo"))


ELEMENTWISE = {
    "convert_element_type",
    "broadcast_in_dim",
    "exp",
    "log",
    "sub",
    "mul",
    "select_n",
    "neg",
    "add",
    "add_any",
    "jit",
    "pjit",
}
REDUCTIONS = {"reduce_max", "reduce_sum"}


def test_no_float32_copy_of_the_logits_is_kept(equations):
    """Of the bfloat16 step, whole: float32 arrays of the logits' size only come from elementwise operations and only go
    into such and reductions, which one fusion does without an array; none enters a product or a loop. For the backward
    pass the logits are kept once, in bfloat16. (XLA's CPU backend itself widens the operands of bfloat16 products and
    keeps what several reductions share, so that its compiled step shows what it does, not what was asked of it.)"""
    loss, step, arguments = train_step(chunk_tokens=0)
    found = 0

    def is_wide(x):
        return x.aval.size == LOGITS_SIZE and x.aval.dtype == jnp.float32

    for equation in equations(jax.make_jaxpr(step)(*arguments).jaxpr):
        if any(map(is_wide, equation.outvars)):
            found += 1
            assert equation.primitive.name in ELEMENTWISE, equation
        if any(is_wide(x) for x in equation.invars):
            assert equation.primitive.name in ELEMENTWISE | REDUCTIONS, equation
    assert found > 3
    tokens = jax.ShapeDtypeStruct((16, 25), jnp.int32)
    kept = jax.eval_shape(
        lambda p, t: jax.vjp(lambda p: loss(p, {"tokens": t}, None)[0], p)[1], arguments[0].params, tokens
    )
    assert [x.dtype for x in jax.tree.leaves(kept) if x.size == LOGITS_SIZE] == [jnp.bfloat16]


INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) [\w\-]+\((.*)")


def kept_for_the_backward_pass(hlo):
    """Types of the arrays of the logits' size that a compiled program's backward pass gets from its forward pass.

    Backward is what has JAX's `transpose(` in a name, its own or one inside it. Only whole instructions count: what is
    inside a fusion is no array.
    """
    bodies = {match[1]: match[0] for match in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?^\}", hlo, re.M | re.S)}
    (entry,) = (body for body in bodies.values() if body.startswith("ENTRY"))

    def is_backward(text):
        called = re.findall(r"(?:calls|body|to_apply)=%?([\w.\-]+)", text)
        return "transpose(" in text or any(is_backward(bodies[name]) for name in called)

    lines = [match for match in map(INSTRUCTION.match, entry.splitlines()) if match]
    forward = {match[1]: match[2] for match in lines if not is_backward(match[0])}
    used = {name for match in lines if match[1] not in forward for name in re.findall(r"%([\w.\-]+)", match[3])}
    shapes = [shape for name in used & set(forward) for shape in re.findall(r"[a-z]\w*\[[\d,]+\]", forward[name])]
    return [shape.split("[")[0] for shape in shapes if sizes(shape) == [LOGITS_SIZE]]


def test_the_compiled_step_keeps_bfloat16_logits():
    """From the forward to the backward pass one array of the logits' size is kept, and it is not float32."""
    _, step, arguments = train_step(chunk_tokens=0)
    assert kept_for_the_backward_pass(step.lower(*arguments).compile().as_text()) == ["bf16"]


def test_no_float32_logits_on_a_tpu(monkeypatch):
    """In the step compiled for a TPU, which takes libtpu and no TPU, nothing of the logits' size is an array but the
    bfloat16 logits; their float32 copy and their gradient are inside fusions."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    _, step, arguments = train_step(chunk_tokens=0)
    there = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=there), arguments)
    hlo = step.lower(*arguments).compile().as_text()
    entry = hlo[hlo.index("\nENTRY") :]
    found = {match[1] for match in re.finditer(r"([a-z]\w*)\[[\d,]+\]", entry) if sizes(match[0]) == [LOGITS_SIZE]}
    assert found == {"bf16"}
    assert kept_for_the_backward_pass(hlo) == ["bf16"]
