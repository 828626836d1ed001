"""Cross-entropy against the log-softmax as it is written, and what the language model's loss adds up."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptjax.config import ModelConfig
from gptjax.model.gpt import GPT, Head
from gptjax.parallel import sharding
from gptjax.training.losses import cross_entropy, language_model_loss, separate_documents

B, T, V, PADDED = 8, 3, 5, 8
RANDOM = np.random.default_rng(0)
LOGITS = np.where(np.arange(PADDED) < V, 4 * RANDOM.normal(size=(B, T, PADDED)), -np.inf).astype(np.float32)
LABELS = RANDOM.integers(0, V, (B, T)).astype(np.int32)
D_NLL, D_LOG_Z = RANDOM.normal(size=(2, B, T)).astype(np.float32)


def reference(logits, labels):
    """(nll, log Z, gradient along D_NLL and D_LOG_Z), in float64."""
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    one_hot = np.arange(logits.shape[-1]) == labels[..., None]
    nll = log_z - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    probability = np.exp(logits - log_z[..., None])
    return nll, log_z, probability * (D_NLL + D_LOG_Z)[..., None] - one_hot * D_NLL[..., None]


def value_and_gradient(logits, labels, d_nll, d_log_z):
    (nll, log_z), vjp = jax.vjp(lambda logits: cross_entropy(logits, labels), logits)
    return nll, log_z, vjp((d_nll, d_log_z))[0]


def test_against_log_softmax():
    """Value and gradient are those of the naive formula; columns at -inf have no weight and no gradient."""
    results = jax.jit(value_and_gradient)(LOGITS, LABELS, D_NLL, D_LOG_Z)
    for got, expected in zip(results, reference(LOGITS, LABELS), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(results[2][..., V:], 0)


def test_sharded_vocabulary(mesh):
    """Split over `tensor`, the vocabulary is never gathered: the gradient stays as split as the logits."""
    logits = sharding.reshard(LOGITS, "batch", "sequence", "vocab")
    labels, d_nll, d_log_z = (sharding.reshard(x, "batch", "sequence") for x in (LABELS, D_NLL, D_LOG_Z))
    program = jax.jit(value_and_gradient).lower(logits, labels, d_nll, d_log_z).compile()
    assert "all-gather" not in program.as_text()
    nll, log_z, gradient = program(logits, labels, d_nll, d_log_z)
    assert gradient.sharding.spec == P(("data", "fsdp"), "context", "tensor")
    for got, expected in zip((nll, log_z, gradient), reference(LOGITS, LABELS), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_logits():
    """The sums are float32, and the gradient has the logits' type, so that no float32 copy of them is kept."""
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    nll, log_z, gradient = value_and_gradient(logits, LABELS, D_NLL, D_LOG_Z)
    assert (nll.dtype, log_z.dtype, gradient.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    expected = reference(logits.astype(jnp.float32), LABELS)
    np.testing.assert_allclose(nll, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected[2], rtol=2**-7, atol=1e-6)


def test_large_logits_do_not_overflow():
    nll, log_z = cross_entropy(jnp.asarray([[[1e4, 0.0]]]), jnp.asarray([[1]]))
    assert (float(nll[0, 0]), float(log_z[0, 0])) == (1e4, 1e4)


def model_with(logits):
    """A model that answers with these logits, those of padding any number, and remembers what it was asked."""
    asked = {}

    def apply(variables, tokens, output, **arguments):
        asked.update(arguments, tokens=tokens)
        finite = jnp.where(jnp.isfinite(logits), logits, 7.0)
        return output(Head(jnp.eye(PADDED), None), variables["params"] + finite), None

    return SimpleNamespace(apply=apply, asked=asked, config=ModelConfig(model_dim=PADDED, num_heads=1, vocab_size=V))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_language_model_loss(z_loss, masked):
    """The sum is over the tokens whose mask is 1, of nll + z_loss · log²Z; `nll` is without the latter. The gradient
    of the z-loss is 2 · z_loss · log Z · softmax."""
    tokens = np.concatenate([np.zeros((B, 1), np.int32), LABELS], axis=1)
    mask = (RANDOM.random((B, T + 1)) < 0.5).astype(np.float32) if masked else np.ones((B, T + 1), np.float32)
    batch = {"tokens": tokens} | ({"loss_mask": mask} if masked else {})
    loss = language_model_loss(model_with(LOGITS), z_loss)
    (total, sums), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.zeros_like(LOGITS), batch, None)
    nll, log_z, _ = reference(LOGITS, LABELS)
    weight = mask[:, 1:]
    assert float(sums["weight"]) == weight.sum()
    assert float(sums["loss"]) == pytest.approx((nll * weight).sum(), rel=1e-5)
    assert float(total) == pytest.approx(((nll + z_loss * log_z**2) * weight).sum(), rel=1e-5)
    probability = np.exp(LOGITS - log_z[..., None])
    one_hot = np.arange(PADDED) == LABELS[..., None]
    expected = probability - one_hot + 2 * z_loss * log_z[..., None] * probability
    np.testing.assert_allclose(gradient, expected * weight[..., None], rtol=1e-4, atol=1e-5)


def test_inputs_and_labels_are_shifted_by_one():
    """The model reads all tokens but the last, and the documents of just those; the key is passed on."""
    tokens = np.arange(B * (T + 1)).reshape(B, T + 1) % V
    model, key = model_with(LOGITS), jax.random.key(0)
    language_model_loss(model)(jnp.zeros_like(LOGITS), {"tokens": tokens, "segment_ids": tokens // 2}, key)
    np.testing.assert_array_equal(model.asked["tokens"], tokens[:, :-1])
    np.testing.assert_array_equal(model.asked["segment_ids"], tokens[:, :-1] // 2)
    assert model.asked["dropout_key"] is key


SEPARATOR = 3


def packed(documents):
    return np.concatenate([[SEPARATOR, *document] for document in documents]).astype(np.int32)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_separate_documents_are_as_if_alone(tiny, positions, mesh):
    """Tokens of a row that packs documents have the logits that each document has by itself, from its separator on,
    and no gradient reaches another document; split over eight devices, too."""
    config = dataclasses.replace(tiny, positions=positions, attention_pattern=("local", "dense"), attention_window=3)
    model = GPT(config)
    documents = [[5, 6, 7], [], [8, 9, 10, 11, 12], [7, 6]]
    row = packed(documents)  # 14 tokens
    params = jax.jit(model.init)(jax.random.key(0), sharding.put_batch(np.zeros((4, 4), np.int32)))["params"]
    params = jax.tree.map(lambda p: 5 * p, params)

    @jax.jit
    def logits_of(tokens, places):
        return model.apply({"params": params}, tokens, **places)[0]

    tokens = sharding.put_batch(np.stack([row] * 4))
    got = np.asarray(logits_of(tokens, jax.jit(separate_documents, static_argnums=1)(tokens, SEPARATOR)))[0]
    start = 0
    for document in documents:
        alone = np.zeros((4, len(row)), np.int32)  # one shape, so that it compiles once
        alone[:, : 1 + len(document)] = packed([document])
        stop = start + 1 + len(document)
        alone = sharding.put_batch(alone)
        expected = np.asarray(logits_of(alone, {}))[0, : stop - start]
        np.testing.assert_allclose(got[start:stop], expected, atol=1e-4)
        start = stop
    assert not np.allclose(got, np.asarray(logits_of(tokens, {}))[0], atol=0.1), "without it documents see each other"


def test_a_separator_in_the_loss(tiny):
    """With a separator the loss is that of the batch whose documents are told apart by hand."""
    model = GPT(tiny)
    tokens = np.stack([packed([[5, 6], [7, 8, 9], [4]])] * 2)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    by_hand = {
        "tokens": tokens,
        "segment_ids": np.cumsum(tokens == SEPARATOR, axis=1),
        "positions": np.stack([[0, 1, 2, 0, 1, 2, 3, 0, 1]] * 2),
    }
    total, _ = jax.jit(language_model_loss(model, separator=SEPARATOR))(params, {"tokens": tokens}, None)
    expected, _ = jax.jit(language_model_loss(model))(params, by_hand, None)
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
