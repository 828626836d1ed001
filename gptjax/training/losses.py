"""What is minimized. Every stage's loss has one form: `loss(params, batch, dropout_key) -> (sum, sums)`.

`sum` is summed over the batch and `sums["weight"]` says over how much, so that micro-batches of unequal
weight add up to exactly the large batch.

Shape suffixes: B batch, T tokens, V padded vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.model.gpt import GPT, Params
from gptjax.parallel import sharding

Batch = Mapping[str, jax.Array]
"""`tokens` (B, T+1) int32: inputs and, shifted by one, labels. Optional: `loss_mask` (B, T+1), 1 where a token
is to be predicted; `segment_ids` (B, T+1), the document of each token; `positions` (B, T+1) within it."""

Loss = Callable[[Params, Batch, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


@jax.custom_vjp
def cross_entropy(logits_BTV: jax.Array, labels_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the labels and the log-partition log Z, both (B, T) float32, in nats.

    The vocabulary may be sharded: the label's logit is picked by comparison, not by a gather. The
    gradient has the type of the logits, so that no float32 copy of them outlives a fusion.
    """
    return _cross_entropy_forward(logits_BTV, labels_BT)[0]


def _is_label(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    sharding = jax.typeof(logits_BTV).sharding
    column = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=sharding)
    return column == labels_BT[:, :, None]


def _cross_entropy_forward(logits_BTV, labels_BT):
    logits = logits_BTV.astype(jnp.float32)
    top_BT1 = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    log_z_BT = jnp.log(jnp.exp(logits - top_BT1).sum(axis=-1)) + top_BT1[:, :, 0]
    label_logit_BT = jnp.where(_is_label(logits_BTV, labels_BT), logits, 0.0).sum(axis=-1)
    return (log_z_BT - label_logit_BT, log_z_BT), (logits_BTV, labels_BT, log_z_BT)


def _cross_entropy_backward(residuals, gradients):
    logits_BTV, labels_BT, log_z_BT = residuals
    d_nll_BT, d_log_z_BT = gradients
    probability_BTV = jnp.exp(logits_BTV.astype(jnp.float32) - log_z_BT[:, :, None])
    d_logits = probability_BTV * (d_nll_BT + d_log_z_BT)[:, :, None]
    d_logits -= jnp.where(_is_label(logits_BTV, labels_BT), d_nll_BT[:, :, None], 0.0)
    return d_logits.astype(logits_BTV.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def separate_documents(tokens_BT: jax.Array, separator: int) -> dict[str, jax.Array]:
    """`segment_ids` and `positions`, both (B, T), with which packed documents do not see each other.

    A separator belongs to the document it precedes, at position 0: the end of a document is predicted from that
    document, and the first token of the next from the separator alone, just as text is generated from nothing.
    """
    starts_BT = tokens_BT == separator
    index_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1, out_sharding=jax.typeof(tokens_BT).sharding)
    return {
        "segment_ids": jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32),
        "positions": index_BT - jax.lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1),
    }


def lay_out(x_BT: jax.Array) -> jax.Array:
    """One value a token, whole along the sequence, in the order and the shards in which a model gets its tokens."""
    return sharding.reshard(sharding.balance(x_BT), "batch", "sequence")


def inputs_and_labels(batch: Batch, separator: int | None) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """A model's tokens, the tokens after them, both (B, T), and where the first stand as the model takes it."""
    inputs_BT, labels_BT = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    places = {name: batch[name][:, :-1] for name in ("segment_ids", "positions") if name in batch}
    if separator is not None:
        places = jax.tree.map(lay_out, separate_documents(inputs_BT, separator))
        return lay_out(inputs_BT), lay_out(labels_BT), places | {"in_order": True}
    if "positions" not in places and sharding.num_shards("sequence") > 1:  # the order is another, the places are not
        whole = jax.typeof(inputs_BT).sharding
        places["positions"] = jax.lax.broadcasted_iota(jnp.int32, inputs_BT.shape, 1, out_sharding=whole)
    return lay_out(inputs_BT), lay_out(labels_BT), jax.tree.map(lay_out, places)


def language_model_loss(model: GPT, z_loss: float = 0.0, separator: int | None = None) -> Loss:
    """Next-token cross-entropy plus `z_loss` · log²Z (PaLM, Chowdhery et al. 2022).

    The sums are `weight` (predicted tokens) and `nll` (cross-entropy alone, in nats).

    Args:
        separator: the token between documents that are not to see each other; None: a row is one text, or the
            batch says which documents it holds.
    """

    def loss(params: Params, batch: Batch, dropout_key: jax.Array | None):
        inputs_BT, labels_BT, places = inputs_and_labels(batch, separator)
        logits_BTV, _ = model.apply({"params": params}, inputs_BT, **places, dropout_key=dropout_key)
        nll_BT, log_z_BT = cross_entropy(logits_BTV, labels_BT)
        mask_BT = lay_out(batch["loss_mask"][:, 1:]) if "loss_mask" in batch else jnp.ones_like(nll_BT)
        total = ((nll_BT + z_loss * jnp.square(log_z_BT)) * mask_BT).sum()
        return total, {"weight": mask_BT.sum(dtype=jnp.float32), "nll": (nll_BT * mask_BT).sum()}

    return loss
