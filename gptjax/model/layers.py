"""The layers that blocks are made of, each with its initialization and its sharding.

Shape suffixes: B batch, T tokens, D model, F features out, H head dimension, N heads, X rows
(any leading dimensions, flattened), V vocabulary.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.parallel import sharding


def matmul(x_BTD: jax.Array, w_DF: jax.Array, out_axis: str) -> jax.Array:
    """`x @ w` over flattened tokens, with the result's last dimension laid out by `out_axis`.

    The one place where the model multiplies by a weight. Tokens are flattened because XLA's CPU backend
    is slow at the weight gradient `btd,btf->df`, which contracts two dimensions; others do not mind. Where
    devices split sequences, flattened tokens would have to change places between them.
    """
    lead = x_BTD.shape[:-1]
    if sharding.num_shards("sequence") > 1:
        out_sharding = sharding.spec("batch", "sequence", out_axis)
        return jnp.einsum("btd,df->btf", x_BTD, w_DF, precision=precision(x_BTD), out_sharding=out_sharding)
    x_XD = x_BTD.reshape(-1, x_BTD.shape[-1])
    y_XF = jnp.dot(x_XD, w_DF, precision=precision(x_XD), out_sharding=sharding.spec("batch", out_axis))
    out_axes = ("batch", *["sequence"] * (len(lead) - 1), out_axis)
    return jnp.reshape(y_XF, (*lead, w_DF.shape[-1]), out_sharding=sharding.spec(*out_axes))


def precision(x: jax.Array) -> jax.lax.Precision | None:
    """Float32 means float32: by default GPUs and TPUs would multiply it with 10 or fewer bits of mantissa."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a vector to the last dimension; explicit broadcasting keeps rank promotion an error."""
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + bias.shape)


class Linear(nn.Module):
    """A dense layer with weight `w` of shape (D, F) and an optional bias `b` of shape (F,)."""

    features: int
    axes: tuple[str, str]
    bias: bool
    init_std: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        shape = (x_BTD.shape[-1], self.features)
        w_DF = self.param("w", normal(self.init_std, *self.axes), shape)
        out_axis = "features" if self.axes[1] == "embed" else self.axes[1]
        y_BTF = matmul(x_BTD, sharding.gather(w_DF.astype(x_BTD.dtype), *self.axes), out_axis)
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", constant(1.0, self.axis), (x.shape[-1],))
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.epsilon)
        y = y * sharding.gather(scale, self.axis).reshape((1,) * (x.ndim - 1) + scale.shape)
        if self.kind == "layernorm" and self.bias:
            y = add_bias(y, sharding.gather(self.param("b", constant(0.0, self.axis), scale.shape), self.axis))
        return y.astype(x.dtype)


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


def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of a table, (B, T, D). Where devices split the vocabulary, each looks up its own, and they add up."""
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


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """`cap · tanh(x / cap)`, which bounds logits smoothly (Gemma 2); 0 leaves them."""
    return cap * jnp.tanh(x / cap) if cap else x


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
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

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        def project(name: str) -> jax.Array:
            return Linear(self.ffn_dim, ("embed", "ffn"), self.bias, self.init_std, name=name)(x_BTD)

        activation = ACTIVATIONS[self.activation]
        x_BTD = sharding.fan_out(x_BTD, "ffn")
        h_BTF = activation(project("gate")) * project("up") if self.gated else activation(project("up"))
        return Linear(x_BTD.shape[-1], ("ffn", "embed"), self.bias, self.residual_std, name="down")(h_BTF)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, base: float, rotary_dim: int) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) of the first `rotary_dim` dimensions of each head.

    Dimension i is paired with i + rotary_dim / 2, as GPT-NeoX and Llama do.
    """
    half = rotary_dim // 2
    frequency_H = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTNH = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency_H[None, None, None, :]
    cos, sin = jnp.cos(angle_BTNH), jnp.sin(angle_BTNH)
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), (half, rotary_dim), axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


def sinusoid(positions_BT: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal position encoding (Vaswani et al. 2017): sines in the even, cosines in the odd dimensions."""
    frequency_D = 10_000.0 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle_BTD = positions_BT.astype(jnp.float32)[:, :, None] * frequency_D[None, None, :]
    pairs_BTD2 = jnp.stack([jnp.sin(angle_BTD), jnp.cos(angle_BTD)], axis=-1)
    return pairs_BTD2.reshape(*positions_BT.shape, -1)[:, :, :dim]
