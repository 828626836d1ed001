"""Products in eight bits: how far from exact ones, on every mesh alike, in the form that XLA's GPU compiler knows."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, OptimizerConfig
from gptjax.errors import UserError
from gptjax.model import fp8
from gptjax.model.gpt import GPT
from gptjax.model.layers import matmul
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import abstract_params, init_params, init_state
from gptjax.training.step import make_train_step

AXES = ("embed", "ffn")
RANDOM = np.random.default_rng(0)
X, W, DY = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((4, 8, 64), (64, 48), (4, 8, 48)))


def product_and_gradients(x, w, dy):
    y, pull = jax.vjp(lambda x, w: matmul(x, w, AXES, "df", True), x, w)
    return y, *pull(dy)


@pytest.mark.parametrize(("dtype", "step", "least"), [(fp8.E4M3, 2**-4, 2**-10), (fp8.E5M2, 2**-3, 2**-17)])
@pytest.mark.parametrize("factor", [1.0, 3.3e-12, 7.7e20])
def test_rounding(dtype, step, least, factor):
    """Each element is off by half a step of its own size at most, or of the least number, and none overflows: the
    largest lies in the upper half of the range. Scales are powers of two."""
    x = (X * factor).astype(np.float32)
    scaled = fp8.quantize(jnp.asarray(x), dtype)
    values = np.asarray(jax.lax.bitcast_convert_type(scaled.bits, dtype), np.float32)
    assert np.frexp(float(scaled.scale))[0] == 0.5
    limit = float(jnp.finfo(dtype).max)
    assert limit / 2 <= np.abs(values).max() <= limit
    error = np.abs(np.asarray(fp8.dequantize(scaled, jnp.float32)) - x)
    assert (error <= np.maximum(step * np.abs(x), least * float(scaled.scale))).all()
    in_bfloat16 = np.asarray(fp8.dequantize(scaled, jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(in_bfloat16, values * float(scaled.scale))


def test_product_and_gradients_against_float64():
    """Two e4m3 operands are each off by 2⁻⁴ at most, 2.6 % in root mean square; a gradient, e5m2, by twice as much. So
    the product stays within 5 % of the exact one, and gradients within 8 %. That they are further off than float32
    would be shows that the compiler does not leave the rounding out."""
    found = jax.jit(product_and_gradients)(X, W, DY)
    x, w, dy = (array.astype(np.float64) for array in (X, W, DY))
    exact = x @ w, dy @ w.T, np.einsum("btd,btf->df", x, dy)
    for name, result, expected, limit in zip(("y", "dx", "dw"), found, exact, (0.05, 0.08, 0.08), strict=True):
        assert result.dtype == jnp.float32
        error = np.linalg.norm(np.asarray(result) - expected) / np.linalg.norm(expected)
        assert limit / 4 < error < limit, (name, error)
    bound = (2 * 2**-4 + 2**-8) * (np.abs(x) @ np.abs(w))
    assert (np.abs(np.asarray(found[0]) - exact[0]) <= bound + 1e-3).all()


def test_weight_gradient_is_a_float32_sum():
    """Of a bfloat16 model, too: not rounded to bfloat16 on its way."""
    x, dy = X.astype(jnp.bfloat16), DY.astype(jnp.bfloat16)
    y, dx, dw = product_and_gradients(x, W, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert (dw == dw.astype(jnp.bfloat16)).mean() < 0.5


def test_scale_does_not_matter():
    """Operands 2²⁰ times as large give results exactly as much larger, in all three products."""
    y, dx, dw = product_and_gradients(X, W, DY)
    for factors in ((2.0**20, 1, 1), (1, 2.0**-20, 1), (1, 1, 2.0**-20)):
        a, b, c = factors
        found = product_and_gradients(X * a, W * b, DY * c)
        for result, expected in zip(found, (y * a * b, dx * b * c, dw * a * c), strict=True):
            np.testing.assert_array_equal(result, expected)


def test_zeros_and_what_is_not_finite():
    """Zeros give zeros. A number that is not finite is seen in the result, so that the step is skipped."""
    for result in product_and_gradients(0 * X, W, 0 * DY):
        assert not np.asarray(result).any()
    for bad in (np.nan, np.inf, -np.inf):
        broken = X.copy()
        broken[1, 2, 3] = bad
        y, _, dw = product_and_gradients(broken, W, DY)
        assert not np.isfinite(np.asarray(y)[1, 2]).any()
        assert not np.isfinite(np.asarray(dw)).all()
        assert not np.isfinite(np.asarray(product_and_gradients(X, W, DY * np.float32(bad))[1])).any()


def test_scale_is_of_the_whole_tensor():
    """Under a mesh, too: what is 2³⁰ times smaller than another device's rows is rounded to zero, as on one device,
    and results are those without a mesh."""
    x = X.copy()
    x[0] *= 2.0**30
    expected = product_and_gradients(x, W, DY)
    assert not np.asarray(expected[0])[1:].any()
    for axes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}):
        with jax.set_mesh(make_mesh(MeshConfig(**axes))):
            found = jax.jit(product_and_gradients)(*placed(x, W, DY))
        for result, reference in zip(found, expected, strict=True):
            np.testing.assert_allclose(result, reference, rtol=1e-5, atol=1e-6 * np.abs(reference).max())


def placed(x, w, dy):
    return (
        jax.device_put(x, sharding.spec("batch", "sequence", "features")),
        jax.device_put(w, sharding.spec(*AXES)),
        jax.device_put(dy, sharding.spec("batch", "sequence", "ffn")),
    )


def test_model_under_a_mesh(switched_on):
    """Gradients of the whole model are those without a mesh but for elements near the middle between two steps, which
    float32's own differences round the other way."""
    plain = {"scan_layers": False, "remat": "none", "num_layers": 1, "attention_pattern": ("dense",), "fp8": True}
    model = GPT(dataclasses.replace(switched_on, **plain))
    params = jax.device_get(jax.jit(lambda: init_params(model, jax.random.key(0)))())
    tokens = RANDOM.integers(0, 61, (8, 17)).astype(np.int32)
    gradient = jax.grad(language_model_loss(model), has_aux=True)
    expected, _ = jax.jit(gradient)(params, {"tokens": tokens}, None)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        target = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model))
        found, _ = jax.jit(gradient)(jax.device_put(params, target), {"tokens": sharding.put_batch(tokens)}, None)

    def compare(path, left, right):
        error, size = np.linalg.norm(np.asarray(left) - np.asarray(right)), np.linalg.norm(np.asarray(right))
        assert error < 0.02 * size + 1e-6, (jax.tree_util.keystr(path), error, size)

    jax.tree_util.tree_map_with_path(compare, found, expected)


def test_form_that_xla_rewrites():
    """Lowered for a GPU, all three products multiply a converted eight-bit tensor times one number by another such:
    nothing stands between. Gradients are asked for in full accumulation."""
    x, dy = X.astype(jnp.bfloat16), DY.astype(jnp.bfloat16)
    text = jax.jit(product_and_gradients).trace(x, W, dy).lower(lowering_platforms=("cuda",)).as_text()
    lines = {line.split("=")[0].strip(): line for line in text.splitlines() if "=" in line}
    products = [line for line in lines.values() if "stablehlo.dot_general" in line]
    assert len(products) == 3
    assert sum("HIGHEST" in line for line in products) == 2
    for line in products:
        for operand in re.findall(r"%\w+", line.split("=")[1])[:2]:
            steps = []
            while "convert" not in steps:
                source = lines[operand]
                steps.append(re.search(r"stablehlo\.(\w+)", source)[1])
                operand = re.search(r"%\w+", source.split("=")[1])[0]
            assert re.search(r"\(tensor<[\dx]+xf8E\w+>\) -> tensor<[\dx]+xbf16>", source), source
            assert steps[-2:] == ["multiply", "convert"]
            assert set(steps[:-2]) <= {"reshape", "transpose"}


def device(platform, capability, kind="NVIDIA"):
    return SimpleNamespace(platform=platform, compute_capability=capability, device_kind=kind)


def test_which_devices():
    for capability in ("8.9", "9.0", "10.0", "12.1"):
        fp8.require_hardware(device("gpu", capability))
    for other in (device("gpu", "8.6", "RTX 3090"), device("gpu", "gfx942", "MI300"), device("cpu", None, "cpu")):
        with pytest.raises(UserError, match=f"model.fp8 needs .* but this is {other.device_kind}") as error:
            fp8.require_hardware(other)
        assert "\n" not in str(error.value)


def test_loss_curve_stays_near(tiny):
    """Forty steps of a small model on text with something to learn: at no step the loss lies more than 0.05 nats off
    that of the same model without, while it falls by more than a nat."""
    draw = np.random.default_rng(1)
    starts = draw.integers(0, 61, (40, 1, 1, 16, 1))
    batches = (starts + 3 * np.arange(17)).astype(np.int32) % 61

    def losses(in_fp8):
        model, optimizer = GPT(dataclasses.replace(tiny, fp8=in_fp8)), make_optimizer(OptimizerConfig())
        step = make_train_step(language_model_loss(model), optimizer, dropout_seed=None, accumulates=False)
        state, found = init_state(model, optimizer, seed=0), []
        for tokens in batches:
            state, metrics = step(state, {"tokens": tokens}, np.ones(1, np.int32), np.full(1, 3e-3, np.float32), 1)
            found.append(float(metrics["loss"][0]))
        return np.array(found)

    plain, rounded = losses(False), losses(True)
    assert plain[-1] < plain[0] - 1
    assert 1e-5 < np.abs(plain - rounded).max() < 0.05
