"""The parity gate: every kernel that runs here against a float64 reference; who may run where; and cuDNN's lowering."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config, DataConfig, MeshConfig
from gptjax.errors import UserError
from gptjax.model import kernels
from gptjax.model.attention import attention
from gptjax.model.cache import empty_cache
from gptjax.model.gpt import GPT
from gptjax.model.kernels import Call, Machine
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.stages import messages
from gptjax.training.losses import language_model_loss
from gptjax.training.state import abstract_params

B, N = 2, 4
RANDOM = np.random.default_rng(0)
CPU, H100 = Machine("cpu", "cpu"), Machine("gpu", "NVIDIA H100", (9, 0))
V100, A100 = Machine("gpu", "V100", (7, 0)), Machine("gpu", "A100", (8, 0), has_tokamax=True)
MI300, TPU5, TPU4 = Machine("gpu", "MI300"), Machine("tpu", "TPU v5 lite", None, True), Machine("tpu", "TPU v4")
HOPPER = H100._replace(has_tokamax=True)
CALL = Call(256, 256, 64, 64, "bfloat16", in_order=True)


def reference(q, k, v, d_out, positions, segments, window, cap, scale):
    """The output, and the gradients of `sum(output · d_out)`, as the formulas read, in float64."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    k, v = (np.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    logits = scale * np.einsum("btnh,bsnh->bnts", q, k)
    capped = cap * np.tanh(logits / cap) if cap else logits
    ahead = positions[:, :, None] - positions[:, None, :]
    seen = (ahead >= 0) & (ahead < (window or np.inf)) & (segments[:, :, None] == segments[:, None, :])
    weights = np.exp(capped - capped.max()) * seen[:, None]
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("btnh,bsnh->bnts", d_out, v)
    d_logits = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True))
    d_logits *= scale * (1 - (capped / cap) ** 2 if cap else 1.0)
    out = np.einsum("bnts,bsnh->btnh", weights, v)
    dk, dv = np.einsum("bnts,btnh->bsnh", d_logits, q), np.einsum("bnts,btnh->bsnh", weights, d_out)
    return out, np.einsum("bnts,bsnh->btnh", d_logits, k), dk, dv


CASES = {  # tokens, head_dim, key/value heads, then what differs from plain causal attention
    "causal": (128, 64, 4, {}),
    "window": (128, 96, 2, {"window": 5}),
    "odd, one key/value head": (131, 128, 1, {"window": 40, "scale": 0.2}),
    "documents": (128, 64, 2, {"documents": [0, 50, 51, 99], "window": 20}),
    "softcap": (128, 64, 2, {"softcap": 2.0, "scale": 0.5}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", [*kernels.RUN])
def test_parity(kernel, case, dtype):
    """Output and gradients are off by no more than the type rounds: ten times less than one token more in a window."""
    T, H, K, settings = CASES[case]
    starts = np.array(settings.get("documents", [0]))
    window, cap, scale = settings.get("window"), settings.get("softcap", 0.0), settings.get("scale", H**-0.5)
    call = Call(T, T, H, H, dtype, window, cap, in_order=True, documents="documents" in settings)
    reason = kernels.WHY_NOT[kernel](call, kernels.this_machine())
    if reason is not None:
        pytest.skip(f"{kernel} {reason}")
    document = np.searchsorted(starts, np.arange(T), side="right") - 1
    segments, positions = (np.tile(x, (B, 1)).astype(np.int32) for x in (document, np.arange(T) - starts[document]))
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    arrays = [jnp.asarray(RANDOM.normal(size=shape), dtype) for shape in shapes]

    @jax.jit
    def run(q, k, v, d_out):
        def attend(q, k, v):
            return attention(
                *(q, k, v),
                q_positions=positions,
                kv_positions=positions,
                segment_ids=segments if call.documents else None,
                window=window,
                softcap=cap,
                scale=scale,
                in_order=True,
                kernel=kernel,
            )

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(d_out)

    expected = reference(*arrays, positions, segments, window, cap, scale)
    for got, exact in zip(run(*arrays), expected, strict=True):
        assert got.dtype == dtype
        if exact.shape != got.shape:  # a gradient of each query head, of which groups share one
            exact = exact.reshape(B, T, K, N // K, H).sum(3)
        off = np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)
        assert off < (1e-5 if dtype == "float32" else 1e-2)


REFUSED = [
    ("cudnn", CPU, {}, "needs an NVIDIA GPU, and this is cpu"),
    ("cudnn", MI300, {}, "needs an NVIDIA GPU, and this is MI300"),
    ("cudnn", V100, {}, "needs compute capability 8.0, and V100 has 7.0"),
    ("cudnn", H100, {"dtype": "float32"}, "bfloat16, not float32"),
    ("cudnn", H100, {"head_dim": 60, "value_dim": 60}, "not 60"),
    ("cudnn", H100, {"head_dim": 256, "value_dim": 256}, "not 256"),
    ("cudnn", H100, {"value_dim": 72}, "not 72 and 64"),
    ("cudnn", H100, {"softcap": 30.0}, "attention_softcap is 30"),
    ("cudnn", H100, {"documents": True}, "packed documents"),
    ("cudnn", H100, {"in_order": False}, "in order"),
    ("cudnn", H100, {"dropout": True}, "dropout"),
    ("tokamax", H100, {}, 'pip install "gptjax[tokamax]"'),
    ("tokamax", A100, {}, "capability 9"),
    ("tokamax", HOPPER, {"num_queries": 200, "num_keys": 200}, "multiple of 128 tokens, not 200"),
    ("tokamax", HOPPER, {"dtype": "float32"}, "bfloat16, not float32"),
    ("tokamax", HOPPER, {"in_order": False}, "in order"),
    ("tokamax", TPU5, {"window": 9}, "no window on TPUs, and a layer sees 9 tokens"),
    ("tokamax", TPU4, {}, "this is TPU v4"),
    ("blockwise", CPU, {"dropout": True}, "dropout"),
]


@pytest.mark.parametrize(("kernel", "machine", "change", "reason"), REFUSED)
def test_a_forced_kernel_names_what_it_cannot(kernel, machine, change, reason):
    """One line with the condition and the kernels that would work; left to itself, the choice is another kernel."""
    call = CALL._replace(**change)
    with pytest.raises(UserError, match=re.escape(reason)) as refused:
        kernels.choose(call, machine, kernel)
    assert str(refused.value).startswith(f"model.attention_kernel {kernel} ")
    chosen = kernels.choose(call, machine)
    assert chosen != kernel
    assert chosen in str(refused.value).split(reason)[1]
    assert kernels.choose(call, machine, chosen) == chosen


def test_the_choice_is_the_fastest_that_can():
    long = CALL._replace(num_queries=4096, num_keys=4096)
    assert kernels.choose(CALL, H100) == kernels.choose(CALL._replace(window=9), A100) == "cudnn"
    assert kernels.choose(CALL._replace(softcap=2.0, documents=True, window=9), HOPPER) == "tokamax"
    assert kernels.choose(CALL, TPU5) == kernels.choose(CALL._replace(window=256), TPU5) == "tokamax"
    assert [kernels.choose(call._replace(in_order=False), H100) for call in (CALL, long)] == ["xla", "blockwise"]
    assert [kernels.choose(call, CPU) for call in (CALL, long)] == ["xla", "blockwise"]


@pytest.fixture
def on(monkeypatch):
    """`on(machine)`: tracing believes to be there."""
    return lambda machine: monkeypatch.setattr(kernels, "this_machine", lambda: machine)


def test_the_start_says_which_and_why_not_a_faster_one(tiny, on):
    """What is said and refused at the start is what the fields say: documents, context axis, dropout, windows."""
    half = dataclasses.replace(tiny, compute_dtype="bfloat16", context_length=256)
    config = Config(model=half, mesh=MeshConfig(data=1))
    on(CPU)
    assert messages.attention_kernels(config) == "xla"
    on(H100)
    assert messages.attention_kernels(config) == "cudnn"
    apart = dataclasses.replace(config, data=DataConfig(separate_documents=True))
    said = messages.attention_kernels(apart)
    assert said.startswith("xla (cudnn cannot separate packed documents; tokamax is not installed")
    changes = {"attention_dropout": 0.1, "attention_softcap": 9.0, "compute_dtype": "float32", "head_dim": 12}
    for name, value in changes.items():
        changed = dataclasses.replace(half, **{name: value}, attention_kernel="cudnn")
        with pytest.raises(UserError, match=r"^model\.attention_kernel cudnn "):
            messages.attention_kernels(dataclasses.replace(config, model=changed))
    split = MeshConfig(data=1, context=2)
    assert messages.attention_kernels(dataclasses.replace(config, mesh=split)).startswith("xla (cudnn needs whole")
    on(TPU5)
    local = dataclasses.replace(half, attention_pattern=("local", "dense"), attention_window=9)
    said = messages.attention_kernels(dataclasses.replace(config, model=local))
    assert said.startswith("xla for 9, tokamax for all tokens (cudnn needs an NVIDIA GPU")


@pytest.mark.parametrize("separator", [None, 3])
def test_a_forced_kernel_is_for_training(tiny, separator):
    """A model told to train with a kernel that is not here has parameters and decodes with a cache, but refuses to
    train; a kernel that is here gives the loss that another gives."""
    tokens = RANDOM.integers(0, 61, (2, 9)).astype(np.int32)
    cudnn = GPT(dataclasses.replace(tiny, attention_kernel="cudnn"))
    params = jax.jit(cudnn.init)(jax.random.key(0), tokens)["params"]
    logits, _ = jax.jit(lambda cache: cudnn.apply({"params": params}, tokens, cache=cache))(empty_cache(tiny, 2, 16))
    expected, _ = jax.jit(lambda tokens: GPT(tiny).apply({"params": params}, tokens))(tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    def loss(kernel):
        model = GPT(dataclasses.replace(tiny, attention_kernel=kernel))
        return jax.jit(language_model_loss(model, separator=separator))(params, {"tokens": tokens}, None)[0]

    with pytest.raises(UserError, match="cudnn needs an NVIDIA GPU"):
        loss("cudnn")
    np.testing.assert_allclose(loss("blockwise"), loss("xla"), rtol=1e-5)


def test_who_knows_that_tokens_are_in_order(tiny, on, monkeypatch):
    """Counted positions and those of documents that the loss tells apart are in order, so that a kernel without
    positions may run; those that a batch brings along are not known to be, and the sequences of a mesh that splits
    them are not."""
    on(HOPPER)
    calls = []

    def kernel(*arrays, **settings):
        calls.append(arrays[5])  # segments
        return kernels.xla_attention(*arrays, **settings)

    monkeypatch.setitem(kernels.RUN, "tokamax", kernel)
    monkeypatch.setitem(kernels.RUN, "cudnn", kernel)
    model = GPT(dataclasses.replace(tiny, compute_dtype="bfloat16", context_length=128))
    params, tokens = abstract_params(model), np.zeros((2, 129), np.int32)

    def ask(batch, separator=None):
        calls.clear()
        jax.eval_shape(lambda params: language_model_loss(model, separator=separator)(params, batch, None), params)
        return [segments is not None for segments in calls]

    assert ask({"tokens": tokens}) == [False] * 2
    assert ask({"tokens": tokens}, separator=3) == [True] * 2
    assert ask({"tokens": tokens, "segment_ids": tokens}) == [True] * 2
    assert ask({"tokens": tokens, "positions": tokens}) == []
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])):
        assert ask({"tokens": sharding.put_batch(tokens)}) == ask({"tokens": sharding.put_batch(tokens)}, 3) == []


def test_cudnn_is_called_causally_and_without_a_mask(tiny, mesh, on, monkeypatch):
    """A training step lowered for a GPU calls flash attention once forward and once backward for each layer, with the
    causal mask and the window as attributes: a boolean mask would come as a bias. No logits are multiplied elsewhere.
    """
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)
    on(H100)
    config = dataclasses.replace(tiny, compute_dtype="bfloat16", attention_pattern=("dense", "local"))
    config = dataclasses.replace(config, attention_window=7, attention_kernel="cudnn", context_length=64)
    model = GPT(config)
    params, batch = abstract_params(model), {"tokens": sharding.put_batch(np.zeros((8, 65), np.int32))}
    gradient = jax.jit(jax.grad(lambda *args: language_model_loss(model)(*args, None)[0]))
    text = gradient.trace(params, batch).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$(\w+)\(([^)]*)\) (.*)", text)
    names = [name for name, _, _ in calls]
    assert sorted(names) == ["fmhaSoftmax"] * 2 + ["fmhaSoftmaxBackward"] * 2
    for name, operands, attributes in calls:
        assert len(operands.split(",")) == (3 if name == "fmhaSoftmax" else 6)  # and output, its gradient, softmax sums
        assert re.search(r"mask_type\\22: \\22CAUSAL\\22", attributes)
    reach = [int(re.search(r"sliding_window_length\\22: (\d+)", attributes)[1]) for _, _, attributes in calls]
    assert sorted(reach) == [0, 0, 7, 7]
    assert "64x64xf32" not in text, "logits of T × S"
