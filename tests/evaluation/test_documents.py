"""Sliding windows against a model asked for one token at a time."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import ModelConfig, TokenizerConfig
from gptjax.data.formats import Document
from gptjax.errors import UserError
from gptjax.evaluation import documents
from gptjax.evaluation.documents import (
    TokenizedDocument,
    evaluate_documents,
    split_documents,
    tokenize,
    windows,
)
from gptjax.evaluation.perplexity import evaluate
from gptjax.model.gpt import GPT
from gptjax.text.tokenizer_training import train_tokenizer
from gptjax.training import losses
from gptjax.training.state import draw_params

SEPARATOR, CONTEXT = 0, 16  # the tiny model's
RANDOM = np.random.default_rng(0)
DOCUMENTS = [
    TokenizedDocument(f"d{length}", RANDOM.integers(1, 61, length).astype(np.int32), 2 * length)
    for length in (40, 1, 16, 17, 5)
]


@pytest.fixture(scope="module")
def made():
    config = ModelConfig(
        num_layers=2, model_dim=32, num_heads=4, context_length=CONTEXT, vocab_size=61, compute_dtype="float32"
    )
    params = jax.jit(GPT(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return config, jax.tree.map(lambda p: 5 * p, params)


@given(num_tokens=st.integers(1, 100), length=st.integers(1, 30), data=st.data())
def test_every_token_is_scored_once_with_what_context_there_is(num_tokens, length, data):
    stride = data.draw(st.integers(1, length))
    found = list(windows(num_tokens, length, stride))
    scored = [t for window in found for t in range(window.scored, window.stop)]
    assert scored == list(range(num_tokens))
    for number, window in enumerate(found):
        assert window.start == number * stride
        assert window.stop - window.start <= length
        if number:
            assert window.scored - window.start >= length - stride


def by_hand(config, params, document, stride, nats_T, opens):
    """Each token predicted alone, from the window that the rule gives it: no batching, no masks, no sums. Adds to
    `nats_T` by the number of tokens that were there to predict it from."""
    tokens = [SEPARATOR, *document.token_ids]
    logits_of = jax.jit(lambda row: GPT(config).apply({"params": params}, row)[0])
    losses = []
    for window in windows(len(document.token_ids), CONTEXT, stride):
        padded = np.zeros((1, CONTEXT), np.int32)
        inputs = tokens[window.start : window.stop]
        inputs[0] = SEPARATOR if opens else inputs[0]
        padded[0, : len(inputs)] = inputs
        log_probability = np.asarray(jax.nn.log_softmax(logits_of(padded)[0]), np.float64)
        for t in range(window.scored, window.stop):
            losses.append(-log_probability[t - window.start, tokens[t + 1]])
            before = len(inputs[: t + 1 - window.start])
            nats_T[before] += losses[-1]
    return losses


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize(("batch_size", "opens"), [(3, False), (8, False), (3, True)])
def test_sums_are_those_of_tokens_predicted_one_by_one(made, stride, batch_size, opens):
    """With a token before every window, as models have it that know BOS, and before documents alone."""
    config, params = made
    found = evaluate_documents(config, params, DOCUMENTS, SEPARATOR, opens=opens, stride=stride, batch_size=batch_size)
    nats_T = np.zeros(CONTEXT + 1)
    expected = [by_hand(config, params, document, stride, nats_T, opens) for document in DOCUMENTS]
    for document, nats, given_ in zip(found.documents, expected, DOCUMENTS, strict=True):
        assert document.nats == pytest.approx(sum(nats), rel=1e-5)
        assert (document.origin, document.num_tokens) == (given_.origin, len(nats))
    total = found.total
    assert total.num_tokens == sum(map(len, expected)) == found.tokens_T.sum()
    assert total.num_bytes == 2 * total.num_tokens
    assert total.nats_per_token == pytest.approx(sum(map(sum, expected)) / total.num_tokens, rel=1e-5)
    np.testing.assert_allclose(found.nats_T, nats_T, rtol=1e-5)
    assert found.nats_T[0] == found.tokens_T[0] == 0, "even the first token has the end of the text before it"


def test_logits_come_in_chunks(made, monkeypatch):
    """However long a window and wide the vocabulary: the sums are the same, and no array has all logits."""
    config = dataclasses.replace(made[0], ffn_dim=64)  # narrower than the vocabulary
    params = draw_params(GPT(config), 0)
    whole = evaluate_documents(config, params, DOCUMENTS, SEPARATOR, batch_size=2)
    jax.clear_caches()
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 128 * 9)
    chunked = evaluate_documents(config, params, DOCUMENTS, SEPARATOR, batch_size=2)
    np.testing.assert_allclose(chunked.nats_T, whole.nats_T, rtol=1e-5)
    rows = [(np.stack([np.arange(CONTEXT + 1, dtype=np.int32)] * 2), 2)]
    in_training = evaluate(config, params, rows, np.ones(61, np.int32)).nats_per_token
    tokens_BT = jnp.zeros((2, CONTEXT + 1), jnp.int32)
    text = jax.jit(documents._token_losses, static_argnums=0).lower(config, params, tokens_BT).as_text()
    jax.clear_caches()
    assert f"tensor<2x{CONTEXT}x128x" not in text
    monkeypatch.undo()
    assert in_training == pytest.approx(evaluate(config, params, rows, np.ones(61, np.int32)).nats_per_token, rel=1e-6)
    text = jax.jit(documents._token_losses, static_argnums=0).lower(config, params, tokens_BT).as_text()
    assert f"tensor<2x{CONTEXT}x128x" in text
    jax.clear_caches()


def test_whole_windows_are_the_evaluation_of_training(made):
    """With windows as far apart as they are long, one document is evaluated as a run evaluates its rows."""
    config, params = made
    tokens = RANDOM.integers(1, 61, 4 * CONTEXT).astype(np.int32)
    found = evaluate_documents(config, params, [TokenizedDocument("", tokens, 1)], SEPARATOR, stride=CONTEXT)
    stream = np.concatenate([[SEPARATOR], tokens])
    rows = np.stack([stream[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(4)])
    expected = evaluate(config, params, [(rows, 4)], np.ones(61, np.int32))
    assert found.total.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-6)
    np.testing.assert_array_equal(found.tokens_T, [0, *[4] * CONTEXT])


def test_a_model_that_knows_nothing_has_the_logarithm_of_the_vocabulary(made):
    config, params = made
    zero = jax.tree.map(jnp.zeros_like, params)
    found = evaluate_documents(config, zero, DOCUMENTS, SEPARATOR)
    assert found.total.nats_per_token == pytest.approx(math.log(61), rel=1e-6)
    assert found.total.perplexity == pytest.approx(61, rel=1e-5)


@pytest.mark.parametrize("block_tokens", [1, 7, 2**20])
def test_documents_from_text_and_from_shards_are_the_same(block_tokens, monkeypatch):
    """Pieces are joined, ends of text are left out, and the bytes are those of the text, in whatever blocks it is."""
    monkeypatch.setattr(documents, "BLOCK_TOKENS", block_tokens)
    texts = ["first döcument", "second", "第三"]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=300))
    pieces = [Document("first ", "0", last=False), Document("döcument", "0", first=False), *texts[1:]]
    pieces = [p if isinstance(p, Document) else Document(p, "") for p in pieces]
    from_text = list(tokenize(pieces, tokenizer))
    assert [d.num_bytes for d in from_text] == [len(text.encode()) for text in texts]
    stream = np.concatenate([[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in texts])
    for tokens in (stream, stream[:-1]):
        from_shards = list(split_documents(tokens, tokenizer))
        assert [d.num_bytes for d in from_shards] == [d.num_bytes for d in from_text]
        assert [tokenizer.decode(d.token_ids) for d in from_shards] == texts
    assert [tokenizer.decode(d.token_ids) for d in from_text] == texts


def test_text_that_the_tokenizer_loses_is_refused():
    char = train_tokenizer(["abc"], TokenizerConfig(kind="char"))
    with pytest.raises(UserError, match="never seen 'd'"):
        list(tokenize([Document("abcd", "")], char))


def test_many_pieces_take_time_in_proportion():
    """A piece's tokens are added to the others, not the others to it: each token is copied a few times at most."""

    class CountingTokenizer:
        def encode(self, text):
            return CountedList([1] * len(text))

        def require_lossless(self, text, ids):
            pass

    class CountedList(list):
        def __radd__(self, other):
            raise AssertionError("a list of all tokens so far was made anew")

    pieces = [Document("abc", "0", first=number == 0, last=number == 9) for number in range(10)]
    (document,) = tokenize(pieces, CountingTokenizer())
    assert list(document.token_ids) == [1] * 30
