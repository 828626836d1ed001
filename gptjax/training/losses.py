"""What is minimized. Every stage's loss has one form: `loss(params, batch, dropout_key) -> (sum, sums)`.

`sum` is summed over the batch and `sums["weight"]` says over how much, so that micro-batches of unequal
weight add up to exactly the large batch.

Shape suffixes: B batch, T tokens, V padded vocabulary.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from gptjax.model.gpt import GPT, Params

Batch = Mapping[str, jax.Array]
"""`tokens` (B, T+1) int32: inputs and, shifted by one, labels. Optional: `loss_mask` (B, T+1), 1 where a token
is to be predicted; `segment_ids` (B, T+1), the document of each token."""

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


def language_model_loss(model: GPT, z_loss: float = 0.0) -> Loss:
    """Next-token cross-entropy plus `z_loss` · log²Z (PaLM, Chowdhery et al. 2022).

    The sums are `weight` (predicted tokens) and `nll` (cross-entropy alone, in nats).
    """

    def loss(params: Params, batch: Batch, dropout_key: jax.Array | None):
        inputs_BT, labels_BT = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        segment_ids = batch["segment_ids"][:, :-1] if "segment_ids" in batch else None
        logits_BTV, _ = model.apply({"params": params}, inputs_BT, segment_ids=segment_ids, dropout_key=dropout_key)
        nll_BT, log_z_BT = cross_entropy(logits_BTV, labels_BT)
        mask_BT = batch["loss_mask"][:, 1:] if "loss_mask" in batch else jnp.ones_like(nll_BT)
        total = ((nll_BT + z_loss * jnp.square(log_z_BT)) * mask_BT).sum()
        return total, {"weight": mask_BT.sum(dtype=jnp.float32), "nll": (nll_BT * mask_BT).sum()}

    return loss
