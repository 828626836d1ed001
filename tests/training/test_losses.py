"""Cross-entropy against the log-softmax as it is written, and what the language model's loss adds up."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptjax.parallel import sharding
from gptjax.training.losses import cross_entropy, language_model_loss

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
    assert gradient.sharding.spec == P(("data", "fsdp"), None, "tensor")
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
    """A model that answers with these logits, and remembers what it was asked."""
    asked = {}

    def apply(variables, tokens, **arguments):
        asked.update(arguments, tokens=tokens)
        return variables["params"] + logits, None

    return SimpleNamespace(apply=apply, asked=asked)


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
    assert float(sums["nll"]) == pytest.approx((nll * weight).sum(), rel=1e-5)
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
