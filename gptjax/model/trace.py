"""The model opened up: what each head looks at, and what each block makes of its input, by its own functions.

Shape suffixes: B batch, T query tokens, S key tokens, D model, N query heads, K key/value heads, L layers.
"""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.model.attention import Attention, Placement, attention
from gptjax.model.gpt import GPT, Block, Params, make_norm, unstack
from gptjax.model.layers import normal
from gptjax.parallel import sharding
from gptjax.parallel.precision import compute_dtype


class AttentionWeights(Attention):
    """The weights that `Attention` multiplies values by: what it gives where the values are the identity."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, place: Placement) -> jax.Array:
        """(B, T, N, S)."""
        q_BTNH, k_BSKH, _ = self.queries_keys_values(x_BTD, place)
        B, S, K, _ = k_BSKH.shape
        identity = jnp.broadcast_to(jnp.eye(S, dtype=x_BTD.dtype)[None, :, None, :], (B, S, K, S))
        return attention(
            q_BTNH,
            k_BSKH,
            sharding.reshard(identity, "batch", "sequence", "kv_heads", "head_dim"),
            q_positions=place.positions,
            kv_positions=place.kv_positions,
            window=self.window,
            softcap=self.config.attention_softcap,
        )


class _Opened(GPT):
    """What both views below start from."""

    def start(self, tokens_BT: jax.Array) -> tuple[jax.Array, Placement]:
        """The residual stream before the first block, and where its tokens stand."""
        c = self.config
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        positions = sharding.reshard(positions, "batch", "sequence")
        embedding_VD = self.param(
            "embedding", normal(c.initializer_std, "vocab", "embed"), (c.padded_vocab_size, c.model_dim)
        )
        x_BTD = self._embed(embedding_VD, tokens_BT, positions).astype(compute_dtype(c))
        return x_BTD, Placement(positions, positions, in_order=True)

    def layers(self) -> Iterator[tuple[int | None, Params]]:
        """Window and parameters of each layer."""
        return zip(self.config.layer_windows, unstack(self.get_variable("params", "blocks")), strict=True)


class Trace(_Opened):
    """`GPT` with the attention weights of all layers as its result."""

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """(L, B, N, T, S), float32; row t has weights for tokens 0 to t that sum to 1."""
        c = self.config
        x_BTD, place = self.start(tokens_BT)
        norm, weights = make_norm(c, None), []
        for window, params in self.layers():
            y_BTD = norm.apply({"params": params["attention_norm"]}, x_BTD) if c.norm_position != "post" else x_BTD
            layer = AttentionWeights(c, window, parent=None).apply({"params": params["attention"]}, y_BTD, place)
            weights.append(layer.astype(jnp.float32).transpose(0, 2, 1, 3))
            x_BTD, _ = Block(c, window, parent=None).apply({"params": params}, x_BTD, place)
        return jnp.stack(weights)


class Stream(_Opened):
    """`GPT` with its residual stream as its result."""

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """(1 + L, B, T, D): as it enters the first block, and as it leaves each."""
        x_BTD, place = self.start(tokens_BT)
        stream = [x_BTD]
        for window, params in self.layers():
            x_BTD, _ = Block(self.config, window, parent=None).apply({"params": params}, x_BTD, place)
            stream.append(x_BTD)
        return jnp.stack(stream)
