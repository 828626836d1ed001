"""What is minimized. Every stage's loss has one form: `loss(params, batch, dropout_key) -> (sum, sums)`.

`sum` is summed over the batch and `sums["weight"]` says over how much, so that micro-batches of unequal
weight add up to exactly the large batch. `sums["loss"]` is what is reported as the loss, also summed, and whatever
else there is becomes a metric of its name, divided by the weight.

Shape suffixes: B batch, T tokens, V padded vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.gpt import GPT, Head, Params, finish_logits, head_logits
from gptjax.model.layers import matmul, weight_gradient
from gptjax.parallel import sharding
from gptjax.parallel.precision import precision

Batch = Mapping[str, jax.Array]
"""`tokens` (B, T+1) int32: inputs and, shifted by one, labels. Optional: `loss_mask` (B, T+1), 1 where a token
is to be predicted; `segment_ids` (B, T+1), the document of each token; `positions` (B, T+1) within it."""

Loss = Callable[[Params, Batch, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(
    logits_BTV: jax.Array, labels_BT: jax.Array, vocab_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the labels and the log-partition log Z, both (B, T) float32, in nats.

    The gradient has the type of the logits, so that no float32 copy of them outlives a fusion.

    Args:
        vocab_size: columns that count; None: all, or padding has -inf. Told here it costs no array of its own.
    """
    return _cross_entropy_forward(logits_BTV, labels_BT, vocab_size)[0]


def _columns(logits_BTV: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=jax.typeof(logits_BTV).sharding)


def _in_float32(logits_BTV: jax.Array, vocab_size: int | None) -> jax.Array:
    logits = logits_BTV.astype(jnp.float32)
    padded = vocab_size is not None and vocab_size < logits.shape[-1]
    return jnp.where(_columns(logits_BTV) < vocab_size, logits, -jnp.inf) if padded else logits


def _cross_entropy_forward(logits_BTV, labels_BT, vocab_size):
    logits = _in_float32(logits_BTV, vocab_size)
    top_BT1 = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    log_z_BT = jnp.log(jnp.exp(logits - top_BT1).sum(axis=-1)) + top_BT1[:, :, 0]
    # Not by comparing every column with the label: that would read all logits once more.
    label_logit_BT = sharding.pick(logits_BTV, labels_BT).astype(jnp.float32)
    return (log_z_BT - label_logit_BT, log_z_BT), (logits_BTV, labels_BT, log_z_BT)


def _cross_entropy_backward(vocab_size, residuals, gradients):
    logits_BTV, labels_BT, log_z_BT = residuals
    d_nll_BT, d_log_z_BT = gradients
    probability_BTV = jnp.exp(_in_float32(logits_BTV, vocab_size) - log_z_BT[:, :, None])
    d_logits = probability_BTV * (d_nll_BT + d_log_z_BT)[:, :, None]
    d_logits -= jnp.where(_columns(logits_BTV) == labels_BT[:, :, None], d_nll_BT[:, :, None], 0.0)
    return d_logits.astype(logits_BTV.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def tempered(logits_BTV: jax.Array, temperature: float) -> jax.Array:
    """Logits over a temperature, in float32, as `apply_filters` divides what tokens are drawn from."""
    return logits_BTV if temperature == 1.0 else logits_BTV.astype(jnp.float32) / temperature


def _of_logits(
    logits_BTV: jax.Array, labels_BT: jax.Array, vocab_size: int, with_entropy: bool
) -> tuple[jax.Array, ...]:
    """What `loss_of_labels` gives."""
    nll_BT, log_z_BT = cross_entropy(logits_BTV, labels_BT, vocab_size)
    if not with_entropy:
        return nll_BT, log_z_BT
    logits, log_z = map(jax.lax.stop_gradient, (_in_float32(logits_BTV, vocab_size), log_z_BT))
    probability_BTV = jnp.exp(logits - log_z[:, :, None])
    return nll_BT, log_z_BT, log_z - jnp.where(probability_BTV > 0, probability_BTV * logits, 0.0).sum(axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 5, 6))
def chunked_cross_entropy(
    config: ModelConfig,
    chunk_tokens: int,
    head: Head,
    x_BTD: jax.Array,
    labels_BT: jax.Array,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[jax.Array, ...]:
    """`cross_entropy` of the head's logits, of which only those of one chunk exist at any time.

    The backward pass computes each chunk's logits anew: one more product with the head, 9 % of the step's operations
    at GPT-2's smallest size and 1.6 % at its largest. The head is gathered once a pass, and its gradient added up in
    float32 on each device before devices add theirs up, as without chunks.

    Args:
        head: in float32 where its gradient is asked for.
        chunk_tokens: most tokens of a chunk over all devices, but at least one of each sequence on each device.
        x_BTD: the last hidden states.
        temperature: as `tempered` takes it.
        with_entropy: as `loss_of_labels` takes it.
    """
    return _chunked_forward(config, chunk_tokens, head, x_BTD, labels_BT, temperature, with_entropy)[0]


def _chunked_forward(config, chunk_tokens, head, x_BTD, labels_BT, temperature, with_entropy):
    head = Head(head.w_VD.astype(x_BTD.dtype), head.bias_V)
    whole = _gathered(head)
    to_chunks, from_chunks = _chunks(labels_BT.shape, chunk_tokens)

    def step(_, chunk):
        x_BTD, labels_BT = chunk
        logits_BTV = tempered(head_logits(config, whole, x_BTD), temperature)
        return None, _of_logits(logits_BTV, labels_BT, config.vocab_size, with_entropy)

    _, results = jax.lax.scan(step, None, (to_chunks(x_BTD), to_chunks(labels_BT)))
    results = tuple(map(from_chunks, results))
    return results, (head, x_BTD, labels_BT, results[1])


def _chunked_backward(config, chunk_tokens, temperature, with_entropy, residuals, gradients):
    head, x_BTD, labels_BT, log_z_BT = residuals
    w_VD, bias_V = _gathered(head)
    to_chunks, from_chunks = _chunks(labels_BT.shape, chunk_tokens)

    def finish(bias_V: jax.Array | None, raw_BTV: jax.Array) -> jax.Array:
        return tempered(finish_logits(config, bias_V, raw_BTV), temperature)

    def step(sums, chunk):
        x_BTD, labels_BT, log_z_BT, gradients = chunk
        raw_BTV, through_product = jax.vjp(lambda x_BTD: matmul(x_BTD, w_VD, GATHERED, order="fd"), x_BTD)
        logits_BTV, through_finish = jax.vjp(finish, bias_V, raw_BTV)
        d_logits_BTV, _ = _cross_entropy_backward(config.vocab_size, (logits_BTV, labels_BT, log_z_BT), gradients)
        d_bias_V, d_raw_BTV = through_finish(d_logits_BTV)
        (dx_BTD,) = through_product(d_raw_BTV)
        d_head = Head(weight_gradient(x_BTD, d_raw_BTV, GATHERED, "fd", precision(x_BTD)), d_bias_V)
        return jax.tree.map(jnp.add, sums, d_head), dx_BTD

    zeros_VD = sharding.reshard(jnp.zeros(w_VD.shape, jnp.float32), *GATHERED)
    sums = Head(sharding.as_partial_sums(zeros_VD, *GATHERED), None if bias_V is None else jnp.zeros_like(bias_V))
    chunks = jax.tree.map(to_chunks, (x_BTD, labels_BT, log_z_BT, gradients[:2]))
    d_head, dx = jax.lax.scan(step, sums, chunks)
    return Head(sharding.reshard(d_head.w_VD, "vocab", "embed"), d_head.bias_V), from_chunks(dx), None


chunked_cross_entropy.defvjp(_chunked_forward, _chunked_backward)

GATHERED = ("vocab", "features")
"""Axes of the head when it has been gathered for all chunks of a pass."""


def _gathered(head: Head) -> Head:
    return Head(sharding.gather(head.w_VD, "vocab", "embed"), head.bias_V)


def _chunks(shape: tuple[int, int], chunk_tokens: int) -> tuple[Callable, Callable]:
    """Functions that cut (B, T, ...) into chunks (C, B, T/C, ...) and put them together again.

    Each device cuts its own rows and its own part of each sequence, of which every chunk has as many tokens; what they
    do not divide is filled up with zeros.
    """
    (B, T), S = shape, sharding.num_shards("sequence")
    held = T // S
    C = -(-held // max(1, chunk_tokens // (B * S)))
    size = -(-held // C)

    def laid_out(x: jax.Array, shape: tuple[int, ...], *axes: str) -> jax.Array:
        return jnp.reshape(x, shape, out_sharding=sharding.spec(*axes))

    def to_chunks(x: jax.Array) -> jax.Array:
        rest = ("features",) * (x.ndim - 2)
        x = laid_out(x, (B, S, held, *x.shape[2:]), "batch", "sequence", "keys", *rest)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, C * size - held), *[(0, 0)] * len(rest)])
        x = laid_out(x, (B, S, C, size, *x.shape[3:]), "batch", "sequence", "stack", "keys", *rest)
        x = jnp.moveaxis(x, 2, 0)
        return laid_out(x, (C, B, S * size, *x.shape[4:]), "stack", "batch", "sequence", *rest)

    def from_chunks(x: jax.Array) -> jax.Array:
        rest = ("features",) * (x.ndim - 3)
        x = laid_out(x, (C, B, S, size, *x.shape[3:]), "stack", "batch", "sequence", "keys", *rest)
        x = jnp.moveaxis(x, 0, 2)
        x = laid_out(x, (B, S, C * size, *x.shape[4:]), "batch", "sequence", "keys", *rest)[:, :, :held]
        return laid_out(x, (B, T, *x.shape[3:]), "batch", "sequence", *rest)

    return to_chunks, from_chunks


def separate_documents(tokens_BT: jax.Array, separator: int) -> dict[str, jax.Array]:
    """`segment_ids` and `positions`, both (B, T), with which packed documents do not see each other.

    A separator belongs to the document it precedes, at position 0: the end of a document is predicted from that
    document, and the first token of the next from the separator alone, just as text is generated from nothing.
    """
    starts_BT = tokens_BT == separator
    index_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1, out_sharding=jax.typeof(tokens_BT).sharding)
    # They are sorted as they are; but the result of a sort is written down, where XLA:CPU would repeat the sums' last
    # step for every logit of every layer, which took 7 % of a step.
    segment_ids_BT = jax.lax.sort(jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32), dimension=1)
    return {
        "segment_ids": segment_ids_BT,
        "positions": index_BT - jax.lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1),
    }


def lay_out(x_BT: jax.Array) -> jax.Array:
    """One value a token, whole along the sequence, in the order and the shards in which a model gets its tokens."""
    return sharding.reshard(sharding.balance(x_BT), "batch", "sequence")


def text_order(x_BT: jax.Array) -> jax.Array:
    """The reverse of `lay_out`: in the order of the text, and whole on every device, for the host to read."""
    return sharding.unbalance(sharding.reshard(x_BT, "stack", "stack"))


def inputs_and_labels(
    batch: Batch, separator: int | None = None, packed: bool = False
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """A model's tokens, the tokens after them, both (B, T), and where the first stand as the model takes it.

    Args:
        separator: the token between documents that are not to see each other, if rows do not say where those are.
        packed: promises of the batch's positions that each document counts its own from 0.
    """
    inputs_BT, labels_BT = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    places = {name: batch[name][:, :-1] for name in ("segment_ids", "positions") if name in batch}
    if separator is not None:
        places = jax.tree.map(lay_out, separate_documents(inputs_BT, separator))
        return lay_out(inputs_BT), lay_out(labels_BT), places | {"in_order": True}
    if "positions" not in places and sharding.num_shards("sequence") > 1:  # the order is another, the places are not
        whole = jax.typeof(inputs_BT).sharding
        places["positions"] = jax.lax.broadcasted_iota(jnp.int32, inputs_BT.shape, 1, out_sharding=whole)
    return (
        lay_out(inputs_BT),
        lay_out(labels_BT),
        jax.tree.map(lay_out, places) | ({"in_order": True} if packed else {}),
    )


def loss_of_labels(
    config: ModelConfig,
    labels_BT: jax.Array,
    chunk_tokens: int = 0,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> Callable[[Head, jax.Array], tuple[jax.Array, ...]]:
    """What `GPT` takes as `output` to give the labels' cross-entropy and log Z in place of logits.

    Args:
        chunk_tokens: as `chunked_cross_entropy` takes it; 0: all at once.
        temperature: as `tempered` takes it.
        with_entropy: gives also the entropy of what might have stood there, (B, T), in nats and without a gradient.
    """

    def output(head: Head, x_BTD: jax.Array) -> tuple[jax.Array, ...]:
        if chunk_tokens:
            return chunked_cross_entropy(config, chunk_tokens, head, x_BTD, labels_BT, temperature, with_entropy)
        logits_BTV = tempered(head_logits(config, head, x_BTD), temperature)
        return _of_logits(logits_BTV, labels_BT, config.vocab_size, with_entropy)

    return output


CHUNK_BYTES = 2**28
"""What the float32 logits of a forward pass may take at once, where nobody says how many tokens a chunk has."""


def bounded_chunk(config: ModelConfig, num_tokens: int) -> int:
    """Tokens whose logits a forward pass holds at once; 0: all."""
    most = CHUNK_BYTES // (4 * config.padded_vocab_size)
    return 0 if num_tokens <= most else max(1, most)


def language_model_loss(
    model: GPT,
    z_loss: float = 0.0,
    separator: int | None = None,
    chunk_tokens: int = 0,
    packed: bool = False,
    opening: int | None = None,
) -> Loss:
    """Next-token cross-entropy plus `z_loss` · log²Z (PaLM, Chowdhery et al. 2022).

    The sums are `weight` (predicted tokens) and `loss` (cross-entropy alone, in nats).

    Args:
        separator: the token between documents that are not to see each other; None: a row is one text, or the
            batch says which documents it holds.
        chunk_tokens: as `loss_of_labels` takes it.
        packed: as `inputs_and_labels` takes it.
        opening: the token that stands before every document, which nothing predicts; None: there is none.
    """

    def loss(params: Params, batch: Batch, dropout_key: jax.Array | None):
        inputs_BT, labels_BT, places = inputs_and_labels(batch, separator, packed)
        output = loss_of_labels(model.config, labels_BT, chunk_tokens)
        (nll_BT, log_z_BT), _ = model.apply(
            {"params": params}, inputs_BT, **places, dropout_key=dropout_key, output=output
        )
        mask_BT = lay_out(batch["loss_mask"][:, 1:]) if "loss_mask" in batch else jnp.ones_like(nll_BT)
        if opening is not None:
            mask_BT = jnp.where(labels_BT == opening, 0.0, mask_BT)
        total = ((nll_BT + z_loss * jnp.square(log_z_BT)) * mask_BT).sum()
        return total, {"weight": mask_BT.sum(dtype=jnp.float32), "loss": (nll_BT * mask_BT).sum()}

    return loss
