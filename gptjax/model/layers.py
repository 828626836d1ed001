"""The layers that blocks are made of, each with its initialization and its sharding.

Shape suffixes: B batch, T tokens, D model, F features out, H head dimension, N heads, X rows
(any leading dimensions, flattened), V vocabulary.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.model import fp8
from gptjax.model.int8 import Int8
from gptjax.model.lora import Lora
from gptjax.parallel import sharding
from gptjax.parallel.precision import precision


def matmul(
    x_BTD: jax.Array, w_DF: jax.Array | Int8 | Lora, axes: tuple[str, str], order: str = "df", in_fp8: bool = False
) -> jax.Array:
    """`x @ w` in x's type, of a weight as it is stored.

    The one place where the model multiplies by a weight. Each pass gathers it for itself. Its gradient leaves the
    product in float32, in which that is accumulated anyway, and is summed over devices in float32.

    Args:
        w_DF: in any type; in float32 where its gradient is asked for. One of `Int8` has none, of `Lora` its adapter.
        axes: logical axes of `w`. That of F is the result's last, which is whole where F is `embed`.
        order: of w's dimensions; `fd` for one that is stored as its transpose.
        in_fp8: whether the operands of this product, and of the two of its gradient, are rounded to eight bits.
    """
    if isinstance(w_DF, Int8):
        return _int8_matmul(x_BTD, w_DF, axes, order)
    if isinstance(w_DF, Lora):
        whole_BTF = _matmul(x_BTD, w_DF.w, axes, order, in_fp8)
        x_BTR = _matmul(sharding.unmark(x_BTD)[0], w_DF.a, (axes[0], "rank"), order, False)
        return whole_BTF + _matmul(x_BTR, w_DF.b, ("rank", axes[1]), order, False)
    return _matmul(x_BTD, w_DF, axes, order, in_fp8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(x_BTD, w_DF, axes, order, in_fp8):
    return _matmul_forward(x_BTD, w_DF, axes, order, in_fp8)[0]


def _matmul_forward(x_BTD, w_DF, axes, order, in_fp8):
    if in_fp8:
        kept = fp8.quantize(x_BTD, fp8.E4M3), fp8.quantize(w_DF, fp8.E4M3)
    else:
        kept = x_BTD, w_DF.astype(x_BTD.dtype)  # kept, for XLA would gather the result of a second cast once more
    return _product(*_operands(kept, axes, x_BTD.dtype), axes, order, precision(x_BTD)), kept


def _matmul_backward(axes, order, in_fp8, kept, dy_BTF):
    x_BTD, w_DF = _operands(kept, axes, dy_BTF.dtype)
    exact = precision(dy_BTF)
    if in_fp8:
        dy_BTF = fp8.dequantize(fp8.quantize(dy_BTF, fp8.E5M2), dy_BTF.dtype)
        exact = jax.lax.Precision.HIGHEST  # or cuBLASLt would add eight-bit products up with 14 bits of mantissa
    (dx_BTD,) = jax.linear_transpose(lambda x_BTD: _product(x_BTD, w_DF, axes, order, exact), x_BTD)(dy_BTF)
    return dx_BTD, sharding.reshard(weight_gradient(x_BTD, dy_BTF, axes, order, exact), *axes)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _int8_matmul(x_BTD: jax.Array, w_DF: Int8, axes: tuple[str, str], order: str) -> jax.Array:
    # Together, or XLA would convert them once, before a loop over tokens, and keep what eight bits are to save.
    x_BTD, values_DF = jax.lax.optimization_barrier((x_BTD, sharding.gather(w_DF.values, *axes)))
    y_BTF = _product(x_BTD, values_DF.astype(x_BTD.dtype), axes, order, precision(x_BTD))
    scale_F = sharding.gather(w_DF.scale, axes[order.index("f")])
    return (y_BTF * scale_F.reshape((1,) * (y_BTF.ndim - 1) + scale_F.shape)).astype(x_BTD.dtype)


def weight_gradient(
    x_BTD: jax.Array, dy_BTF: jax.Array, axes: tuple[str, str], order: str, exact: jax.lax.Precision | None
) -> jax.Array:
    """That of `matmul`'s weight in float32, summed on each device over its own tokens only."""
    (x, tokens), (dy, _) = _flatten(x_BTD), _flatten(dy_BTF)
    return jnp.einsum(
        f"{tokens}d,{tokens}f->{order}",
        *(x, dy),
        precision=exact,
        preferred_element_type=jnp.float32,
        out_sharding=sharding.partial_sums(*axes),
    )


def _operands(kept: tuple, axes: tuple[str, str], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Activation and gathered weight as they are multiplied. A weight in eight bits is gathered in eight bits."""
    x_BTD, w_DF = kept
    if isinstance(w_DF, fp8.Scaled):
        w_DF = dataclasses.replace(w_DF, bits=sharding.gather(w_DF.bits, *axes))
        return fp8.dequantize(x_BTD, dtype), fp8.dequantize(w_DF, dtype)
    return x_BTD, sharding.gather(w_DF, *axes)


def _product(
    x_BTD: jax.Array, w_DF: jax.Array, axes: tuple[str, str], order: str, exact: jax.lax.Precision | None
) -> jax.Array:
    (x, tokens), out_axis = _flatten(x_BTD), axes[order.index("f")]
    out_axes = ("batch", "sequence", "features" if out_axis == "embed" else out_axis)
    out_sharding = sharding.spec(*(out_axes if tokens == "bt" else out_axes[::2]))
    y = jnp.einsum(f"{tokens}d,{order}->{tokens}f", x, w_DF, precision=exact, out_sharding=out_sharding)
    return jnp.reshape(y, (*x_BTD.shape[:-1], y.shape[-1]), out_sharding=sharding.spec(*out_axes))


def _flatten(x_BTD: jax.Array) -> tuple[jax.Array, str]:
    """Tokens in one dimension, and einsum's letters for them.

    XLA's CPU backend is slow at the weight gradient `btd,btf->df`, which contracts two dimensions; others do not mind.
    Where devices split sequences, flattened tokens would have to change places between them.
    """
    if sharding.num_shards("sequence") > 1:
        return x_BTD, "bt"
    return sharding.join_tokens(x_BTD), "x"


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a vector to the last dimension, whose gradient is summed in its own type, float32."""
    y = x.astype(bias.dtype) + bias.reshape((1,) * (x.ndim - 1) + bias.shape)
    return y.astype(x.dtype)


def parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Any:
    """`module.param(name, init, shape)`, but for `Int8` and `Lora`, of which Flax could not check the shape."""
    if module.has_variable("params", name) and isinstance(module.get_variable("params", name), Int8 | Lora):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


class Linear(nn.Module):
    """A dense layer with weight `w` of shape (D, F) and an optional bias `b` of shape (F,)."""

    features: int
    axes: tuple[str, str]
    bias: bool
    init_std: float
    fp8: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        shape = (x_BTD.shape[-1], self.features)
        w_DF = parameter(self, "w", normal(self.init_std, *self.axes), shape)
        y_BTF = matmul(x_BTD, w_DF, self.axes, in_fp8=self.fp8)
        if self.bias:
            b_F = self.param("b", constant(0.0, self.axes[1]), (self.features,))
            y_BTF = add_bias(y_BTF, sharding.gather(b_F, self.axes[1]))
        return y_BTF


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last dimension, in float32.

    `axis` is the logical axis of that dimension: `embed` in the residual stream, `head_dim` for queries and keys.
    """

    kind: Literal["layernorm", "rmsnorm"]
    epsilon: float
    bias: bool = False
    axis: str = "embed"
    zero_centered: bool = False
    """Whether `scale` is what it multiplies by less 1."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", constant(0.0 if self.zero_centered else 1.0, self.axis), (x.shape[-1],))
        if self.zero_centered:
            scale = 1.0 + scale
        bias = None
        if self.kind == "layernorm" and self.bias:
            bias = sharding.gather(self.param("b", constant(0.0, self.axis), scale.shape), self.axis)
        return normalize(x, sharding.gather(scale, self.axis), bias, self.kind == "layernorm", self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array | None, center: bool, epsilon: float) -> jax.Array:
    """`(x - mean) / deviation · scale + bias` over the last dimension, or without the mean, in float32.

    The backward pass starts from x and two numbers a row; derived by JAX it would keep whole arrays in float32.
    """
    return _normalize_forward(x, scale, bias, center, epsilon)[0]


def _normalize_forward(x, scale, bias, center, epsilon):
    mean = x.astype(jnp.float32).mean(axis=-1, keepdims=True) if center else None
    centered = _centered(x, mean)
    inverse = jax.lax.rsqrt(jnp.square(centered).mean(axis=-1, keepdims=True) + epsilon)
    y = centered * inverse * _as_row(scale, x.ndim)
    if bias is not None:
        y = y + _as_row(bias, x.ndim)
    return y.astype(x.dtype), (x, mean, inverse, scale, bias)


def _normalize_backward(center, epsilon, residuals, dy):
    x, mean, inverse, scale, _ = residuals
    d_scale, d_bias = _norm_parameter_gradients(residuals, dy)
    dy = dy.astype(jnp.float32)
    normal = _centered(x, mean) * inverse
    d_normal = dy * _as_row(scale, x.ndim)
    dx = d_normal - normal * (d_normal * normal).mean(axis=-1, keepdims=True)
    if center:
        dx = dx - d_normal.mean(axis=-1, keepdims=True)
    return (dx * inverse).astype(x.dtype), d_scale, d_bias


def _norm_parameter_gradients(residuals, dy):
    x, mean, inverse, _, bias = residuals
    # Behind a barrier, or XLA:GPU would share the product with dx and write it out in float32, to sum it by columns.
    x, dy = jax.lax.optimization_barrier((x, dy))
    dy, rows = dy.astype(jnp.float32), tuple(range(x.ndim - 1))
    return (dy * _centered(x, mean) * inverse).sum(axis=rows), None if bias is None else dy.sum(axis=rows)


normalize.defvjp(_normalize_forward, _normalize_backward)


def _centered(x: jax.Array, mean: jax.Array | None) -> jax.Array:
    return x.astype(jnp.float32) if mean is None else x.astype(jnp.float32) - mean


def _as_row(x_D: jax.Array, ndim: int) -> jax.Array:
    return x_D.reshape((1,) * (ndim - 1) + x_D.shape)


def normal(std: float, *axes: str):
    """Initializer: normal with this standard deviation, drawn straight into its shards."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return std * jax.random.normal(key, shape, jnp.float32, out_sharding=sharding.spec(*axes))

    return init


def constant(value: float, *axes: str):
    """Initializer: one value everywhere."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return sharding.reshard(jnp.full(shape, value, jnp.float32), *axes)

    return init


def dropout(x_BTD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero elements with probability `rate` and scale the others to keep the mean; no key: no dropout.

    The draw is over the global shape, so that every mesh drops the same elements.
    """
    if key is None or rate == 0.0:
        return x_BTD
    if sharding.num_shards("sequence") == 1:
        keep_BTD = jax.random.bernoulli(key, 1.0 - rate, x_BTD.shape, out_sharding=jax.typeof(x_BTD).sharding)
    else:  # drawn in the order of the text, whole
        whole = sharding.spec("batch", "keys", "features")
        keep_BTD = jax.random.bernoulli(key, 1.0 - rate, x_BTD.shape, out_sharding=whole)
        keep_BTD = sharding.reshard(sharding.balance(keep_BTD), "batch", "sequence", "features")
    return jnp.where(keep_BTD, x_BTD / (1.0 - rate), 0)


def look_up(table_VD: jax.Array | Int8, tokens_BT: jax.Array) -> jax.Array:
    """Rows of a table that is stored in pieces, (B, T, D).

    Where devices split the vocabulary, each looks up its own, and they add up.
    """
    if isinstance(table_VD, Int8):
        rows_BTD = look_up(table_VD.values, tokens_BT).astype(jnp.float32)
        return rows_BTD * look_up(table_VD.scale[:, None], tokens_BT)
    table_VD = sharding.gather(table_VD, "vocab", "embed")
    out_sharding = sharding.spec("batch", "sequence", "features")
    if sharding.num_shards("vocab") == 1:
        return table_VD.at[tokens_BT].get(out_sharding=out_sharding)

    def local(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        row_BT = tokens_BT - jax.lax.axis_index(sharding.TABLE["vocab"]) * len(table_VD)
        here_BT1 = ((row_BT >= 0) & (row_BT < len(table_VD)))[:, :, None]
        return jax.lax.psum(jnp.where(here_BT1, table_VD.at[row_BT].get(mode="clip"), 0), sharding.TABLE["vocab"])

    tokens_BT = sharding.reshard(tokens_BT, "batch", "sequence")
    in_specs = sharding.spec("vocab", "features"), sharding.spec("batch", "sequence")
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_sharding)(table_VD, tokens_BT)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """`factor · x`, and x itself where the factor is 1."""
    return x if factor == 1.0 else x * factor


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """`cap · tanh(x / cap)`, which bounds logits smoothly (Gemma 2); 0 leaves them."""
    return cap * jnp.tanh(x / cap) if cap else x


def gelu(x: jax.Array) -> jax.Array:
    """`x Φ(x)` (Hendrycks and Gimpel 2016), by erf: `jax.nn.gelu` takes erfc, which XLA computes in two branches."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": gelu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
}


class FeedForward(nn.Module):
    """`act(x W_up) W_down`, or `(act(x W_gate) * x W_up) W_down` where gated (Shazeer 2020)."""

    ffn_dim: int
    activation: str
    gated: bool
    bias: bool
    init_std: float
    residual_std: float
    fp8: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        def project(name: str) -> jax.Array:
            return Linear(self.ffn_dim, ("embed", "ffn"), self.bias, self.init_std, self.fp8, name=name)(x_BTD)

        # The backward pass starts from the input alone: JAX would keep several arrays of this, the largest, size.
        activation = jax.checkpoint(ACTIVATIONS[self.activation])
        x_BTD = sharding.fan_out(x_BTD, "ffn")
        h_BTF = activation(project("gate")) * project("up") if self.gated else activation(project("up"))
        down = Linear(x_BTD.shape[-1], ("ffn", "embed"), self.bias, self.residual_std, self.fp8, name="down")
        return down(h_BTF)
