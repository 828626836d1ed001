"""The GPT: one definition for every family, stage and form of computation.

Parameters of the blocks are stacked along a leading layer dimension, whether the layers are looped
over or unrolled: a checkpoint has one form, and how layers are run is decided at run time.

Shape suffixes: B batch, T tokens, D model, V padded vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model import remat
from gptjax.model.attention import Attention, Placement
from gptjax.model.cache import Cache, LayerCache
from gptjax.model.int8 import Int8
from gptjax.model.layers import (
    FeedForward,
    Norm,
    add_bias,
    constant,
    dropout,
    look_up,
    matmul,
    normal,
    parameter,
    scaled,
    softcap,
)
from gptjax.model.positions import sinusoid
from gptjax.parallel import sharding
from gptjax.parallel.precision import compute_dtype, precision
from gptjax.parametrization import multipliers

Params = Any
"""A plain dictionary of arrays: `embedding`, `positions`, `blocks`, `final_norm`, `head`, as the switches ask."""


VALUE_HEAD = ("value_head", "value_bias")
"""Names of the parameters that a reward model or a critic has beside a language model's."""


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection and norms before it, after it, or both."""

    config: ModelConfig
    window: int | None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        place: Placement,
        cache: LayerCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        c, scale = self.config, multipliers(self.config)
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)

        attention = Attention(c, self.window, name="attention")
        feed_forward = FeedForward(
            ffn_dim=c.resolved_ffn_dim,
            activation=c.feed_forward,
            gated=c.gated,
            bias=c.resolved_ffn_bias,
            init_std=c.initializer_std * scale.hidden_std,
            residual_std=c.initializer_std * scale.hidden_std * scale.ending_std * (2 * c.num_layers) ** -0.5,
            fp8=c.fp8,
            name="feed_forward",
        )
        attention_norm = make_norm(c, "attention_norm")
        feed_forward_norm = make_norm(c, "feed_forward_norm")
        if c.norm_position != "post":

            def added(y_BTD: jax.Array, norm: str, key: jax.Array | None) -> jax.Array:
                if c.norm_position == "both":
                    y_BTD = make_norm(c, norm)(y_BTD)
                return scaled(dropout(y_BTD, c.residual_dropout, key), scale.sublayer)

            y, cache = attention(attention_norm(x_BTD), place, cache, keys[0])
            after_BTD = x_BTD + added(y, "attention_post_norm", keys[1])
            y = feed_forward(feed_forward_norm(x_BTD if c.parallel_residual else after_BTD))
            return after_BTD + added(y, "feed_forward_post_norm", keys[2]), cache
        y, cache = attention(x_BTD, place, cache, keys[0])
        x_BTD = attention_norm(x_BTD + dropout(y, c.residual_dropout, keys[1]))
        return feed_forward_norm(x_BTD + dropout(feed_forward(x_BTD), c.residual_dropout, keys[2])), cache


def make_norm(config: ModelConfig, name: str) -> Norm:
    return Norm(config.norm, config.norm_epsilon, config.norm_bias, zero_centered=config.norm_zero_centered, name=name)


class Head(NamedTuple):
    """The parameters that make logits of the last hidden states."""

    w_VD: jax.Array | Int8
    """The token embedding, where the two are tied."""
    bias_V: jax.Array | None


def head_logits(config: ModelConfig, head: Head, x_BTD: jax.Array) -> jax.Array:
    """(B, T, V) in x's type; those of the vocabulary's padding are numbers like any other."""
    return finish_logits(config, head.bias_V, matmul(x_BTD, head.w_VD, ("vocab", "embed"), order="fd"))


def finish_logits(config: ModelConfig, bias_V: jax.Array | None, logits_BTV: jax.Array) -> jax.Array:
    """What follows the head's product, element by element."""
    if bias_V is not None:
        logits_BTV = add_bias(logits_BTV, bias_V)
    return softcap(logits_BTV, config.logit_softcap)


def final_logits(config: ModelConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
    """(B, T, V): what a model makes of a residual stream after its blocks, those of padding columns -inf."""
    if config.norm_position != "post":
        x_BTD = make_norm(config, "").apply({"params": params["final_norm"]}, x_BTD)
    head = Head(params["embedding" if config.tie_embeddings else "head"], params.get("head_bias"))
    logits_BTV = head_logits(config, head, scaled(x_BTD, multipliers(config).logits))
    return mask_padding(logits_BTV, config.vocab_size)


class GPT(nn.Module):
    """The causal Transformer.

    Example:
        params = GPT(config).init(key, tokens_BT)["params"]
        logits_BTV, _ = GPT(config).apply({"params": params}, tokens_BT)
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        in_order: bool = False,
        cache: Cache | None = None,
        dropout_key: jax.Array | None = None,
        select_B: jax.Array | None = None,
        output: Callable[[Head, jax.Array], Any] | None = None,
        values: bool = False,
    ) -> tuple[Any, Cache | None]:
        """Logits of the token after each token.

        Args:
            tokens_BT: token ids, int32.
            positions: (B, T) position of each token; counted from 0 by default. With a cache they are counted from
                its lengths, and cannot be given.
            segment_ids: (B, T) document of each token; tokens see only their own. Not with a cache.
            in_order: promises of the positions given what `attention` asks of them, for the kernels that know none;
                those counted here are so. With a cache, that it is empty.
            cache: keys and values of earlier tokens, which are seen, too; this call's are written after them.
            dropout_key: draws the dropout; without one there is none.
            select_B: one index into T per row: logits of just that token, as a prefill needs.
            output: computes what is returned instead of logits from the head and the last hidden states, (B, T, D) in
                the compute type: a loss that does not want all logits at once.
            values: return instead what `value_head` makes of the last hidden states, (B, T) in float32.

        Raises:
            UserError: more tokens than learned positions; or `model.attention_kernel` cannot run this.

        Returns:
            Logits in the compute type, (B, T, V) or (B, 1, V), those of padding columns -inf; and the cache with all
            T tokens of this call in each row. Who padded rows takes that back by their lengths.
        """
        c = self.config
        if self.is_initializing():  # parameters do not depend on the kernel, and are made with tokens of any number
            c = dataclasses.replace(c, attention_kernel="auto")
        if c.positions == "learned" and tokens_BT.shape[1] > c.context_length:
            raise UserError(
                f"{tokens_BT.shape[1]} tokens are more than the {c.context_length} learned positions of "
                "model.context_length"
            )
        dtype = compute_dtype(c)
        if positions is None:
            in_order = in_order or cache is None
            positions = jax.lax.broadcasted_iota(
                jnp.int32, tokens_BT.shape, 1, out_sharding=sharding.spec("batch", "sequence")
            )
            if cache is not None:
                positions = positions + cache.lengths_B[:, None]
        positions = sharding.reshard(positions, "batch", "sequence")
        if segment_ids is not None:
            segment_ids = sharding.reshard(segment_ids, "batch", "sequence")
        shape = c.padded_vocab_size, c.model_dim
        embedding_VD = parameter(self, "embedding", normal(c.initializer_std, "vocab", "embed"), shape)
        x_BTD = self._embed(embedding_VD, tokens_BT, positions).astype(dtype)
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x_BTD = dropout(x_BTD, c.embedding_dropout, keys[0])

        if self.has_variable("params", "blocks"):  # may come unstacked, which `self.param` would refuse
            blocks = self.get_variable("params", "blocks")
        else:
            blocks = self.param("blocks", self._init_blocks, c, x_BTD, Placement(positions, positions))
        if cache is None:
            place = Placement(positions, positions, segment_ids, in_order=in_order)
            x_BTD = apply_blocks(c, blocks, x_BTD, place, keys[1])
        else:
            x_BTD, cache = apply_blocks_to_cache(c, blocks, x_BTD, positions, cache, in_order)
        if c.norm_position != "post":
            x_BTD = make_norm(c, "final_norm")(x_BTD)
        x_BTD = scaled(x_BTD, multipliers(c).logits)  # before the head: fewer numbers than the logits
        if select_B is not None:
            x_BTD = jnp.take_along_axis(x_BTD, select_B[:, None, None], axis=1)

        if c.value_head:
            std = (c.model_dim + 1) ** -0.5  # Stiennon et al. 2020
            w_D = self.param("value_head", normal(std, "embed"), (c.model_dim,))
            bias = self.param("value_bias", constant(0.0), ())
            if values:
                x_BTD, w_D = x_BTD.astype(jnp.float32), sharding.gather(w_D, "embed")
                return jnp.einsum("btd,d->bt", x_BTD, w_D, precision=precision(x_BTD)) + bias, cache
        head_VD = embedding_VD
        if not c.tie_embeddings:
            head_VD = parameter(self, "head", normal(c.initializer_std, "vocab", "embed"), shape)
        bias_V = None
        if c.head_bias:
            bias_V = self.param("head_bias", constant(0.0, "vocab"), (c.padded_vocab_size,))
        head = Head(head_VD, bias_V)
        if output is not None:
            return output(head, x_BTD), cache
        return mask_padding(head_logits(c, head, x_BTD), c.vocab_size), cache

    def _embed(self, embedding_VD: jax.Array | Int8, tokens_BT: jax.Array, positions: jax.Array) -> jax.Array:
        # Rows are looked up in float32, so that their gradient is summed in float32: bfloat16 would
        # lose the small contributions to frequent tokens, and is 20 times slower on GPUs (xla#26371).
        c = self.config
        out_sharding = sharding.spec("batch", "sequence", "features")
        x_BTD = look_up(embedding_VD, tokens_BT)
        if c.scale_embedding:
            x_BTD = x_BTD * c.model_dim**0.5
        if c.positions == "learned":
            table_TD = self.param(
                "positions", normal(c.initializer_std, "positions", "embed"), (c.context_length, c.model_dim)
            )
            table_TD = sharding.gather(table_TD, "positions", "embed")
            x_BTD = x_BTD + table_TD.at[positions].get(out_sharding=out_sharding, mode="clip")
        elif c.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoid(positions, c.model_dim)
        return x_BTD

    def _init_blocks(self, key: jax.Array, config: ModelConfig, x_BTD: jax.Array, place: Placement) -> Params:
        block = Block(config, window=None, parent=None)

        def init(key: jax.Array) -> Params:
            return block.init(key, x_BTD, place)["params"]

        return jax.lax.map(init, jax.random.split(key, config.num_layers))


def apply_blocks(
    config: ModelConfig, blocks: Params, x_BTD: jax.Array, place: Placement, dropout_key: jax.Array | None
) -> jax.Array:
    """Run all blocks, unrolled or by scanning over groups of one period of the window pattern."""
    windows, L = config.layer_windows, config.num_layers
    keys_L = None if dropout_key is None else jax.random.split(dropout_key, L)

    def block(window: int | None) -> Callable[..., jax.Array]:
        def apply(x_BTD: jax.Array, params: Params, key: jax.Array | None) -> jax.Array:
            x_BTD = checkpoint_name(x_BTD, remat.BLOCK_INPUT)
            return Block(config, window, parent=None).apply({"params": params}, x_BTD, place, dropout_key=key)[0]

        if config.remat == "none" and sharding.num_shards("embed") == 1:
            return apply
        # Inside a scan nothing can be merged across iterations, so the barrier against it only costs.
        return jax.checkpoint(apply, policy=remat.POLICIES[config.remat], prevent_cse=not config.scan_layers)

    period = len(config.attention_pattern)
    scanned = L // period * period if config.scan_layers else 0
    if scanned:

        def group(x_BTD, layers):
            params, keys = layers
            for i in range(period):
                x_BTD = block(windows[i])(x_BTD, layer(params, i), None if keys is None else keys[i])
            return x_BTD, None

        def grouped(w: jax.Array) -> jax.Array:
            return w[:scanned].reshape(scanned // period, period, *w.shape[1:])

        x_BTD, _ = jax.lax.scan(group, x_BTD, jax.tree.map(grouped, (blocks, keys_L)))
    if scanned < L:
        unrolled = unstack(blocks)
        for i in range(scanned, L):
            x_BTD = block(windows[i])(x_BTD, unrolled[i], None if keys_L is None else keys_L[i])
    return x_BTD


def apply_blocks_to_cache(
    config: ModelConfig, blocks: Params, x_BTD: jax.Array, positions: jax.Array, cache: Cache, was_empty: bool
) -> tuple[jax.Array, Cache]:
    """Run all blocks, each on its layer's cache; always unrolled, so that each cache is updated in place."""
    place = Placement(positions, positions, starts=cache.lengths_B, in_order=was_empty)
    layers = []
    for window, params, layer_cache in zip(config.layer_windows, unstack(blocks), cache.layers, strict=True):
        x_BTD, layer_cache = Block(config, window, parent=None).apply({"params": params}, x_BTD, place, layer_cache)
        layers.append(layer_cache)
    return x_BTD, Cache(tuple(layers), cache.lengths_B + positions.shape[1])


def layer(blocks: Params, index: int) -> Params:
    """Parameters of one layer out of the stack."""
    return jax.tree.map(lambda w: w[index], blocks)


def unstack(blocks: Params) -> list[Params]:
    """Parameters of each layer out of the stack; the gradient is one concatenation, not L additions.

    What is unstacked stays so: a decoding loop does this once, before the loop.
    """
    if isinstance(blocks, list):
        return blocks
    leaves, tree = jax.tree.flatten(blocks)
    return [jax.tree.unflatten(tree, layer_leaves) for layer_leaves in zip(*map(jnp.unstack, leaves), strict=True)]


def mask_padding(logits_BTV: jax.Array, vocab_size: int) -> jax.Array:
    """Logits with those of the padding columns at -inf: never sampled, and without weight in the loss."""
    if vocab_size == logits_BTV.shape[-1]:
        return logits_BTV
    column = jax.lax.broadcasted_iota(
        jnp.int32, logits_BTV.shape, logits_BTV.ndim - 1, out_sharding=jax.typeof(logits_BTV).sharding
    )
    return jnp.where(column < vocab_size, logits_BTV, -jnp.inf)
