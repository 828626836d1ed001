"""Prompts go through the model in chunks, each prompt once, and their tokens' log-probabilities come with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.model.cache import empty_cache, key_positions, resize, ring_slots
from gptjax.model.gpt import GPT
from gptjax.sampling import rows as rows_module
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.sampling.decode import decode_n_tokens, decoding_params, prefill, row_keys, start_decoding
from gptjax.sampling.rows import generate_tokens, stop_array

RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(0, 256, n).tolist() for n in (30, 3, 17)]
LOCAL = {"attention_pattern": ("local", "dense"), "positions": "rope"}


def padded(prompts: list[list[int]], width: int) -> tuple[jax.Array, jax.Array]:
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


def log_softmax(model, tokens: jax.Array) -> np.ndarray:
    """By the training forward: (B, T, V)."""
    config, params = model
    logits, _ = jax.jit(lambda: GPT(config).apply({"params": params}, tokens))()
    return np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1))


@pytest.mark.parametrize("switches", [{}, LOCAL, {"num_kv_heads": 2, "positions": "rope"}], ids=str)
def test_chunks_do_not_matter(make_model, switches):
    """Logits after each prompt, its log-probabilities, and what is drawn next, from one chunk or from five."""
    config, params = model = make_model(**switches)
    tokens, lengths = padded(PROMPTS, 32)
    results = []
    for chunk in (32, 7):
        found = prefill(config, params, tokens, lengths, 48, chunk_tokens=chunk, with_logprobs=True)
        state = start_decoding(found, jnp.arange(3), jnp.full(3, 48), jnp.zeros((3, 384), bool), row_keys(0, 3))
        drawn, _ = decode_n_tokens(
            config, decoding_params(config, params), state, {}, stop_array(()), 12, with_logprobs=True
        )
        results.append((found.logits_BV, found.logprobs_BT, drawn.logprobs_BN, drawn.tokens_BN))
    for one, five in zip(*results, strict=True):
        np.testing.assert_allclose(one, five, atol=2e-5)
    expected = log_softmax(model, tokens)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(
            jax.nn.log_softmax(results[0][0][row, :257]), expected[row, len(prompt) - 1, :257], atol=2e-5
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.125)])
def test_log_probabilities_are_those_of_training(make_model, dtype, tolerance):
    """Of given and of drawn tokens, against one forward over the whole text; alignment stands on this.

    In bfloat16 logits of 8 to 16 are 1/16 apart: two such steps.
    """
    config, params = model = make_model(compute_dtype=dtype, **LOCAL)
    tokens, lengths = padded(PROMPTS, 32)
    found = prefill(config, params, tokens, lengths, 48, with_logprobs=True)
    state = start_decoding(found, jnp.arange(3), jnp.full(3, 48), jnp.zeros((3, 384), bool), row_keys(0, 3))
    settings = {"temperature": 0.7, "top_p": 0.9}  # what is drawn from is not what log-probabilities are of
    drawn, _ = decode_n_tokens(config, params, state, settings, stop_array(()), 10, with_logprobs=True)
    texts = [p + drawn.tokens_BN[row].tolist() for row, p in enumerate(PROMPTS)]
    expected = log_softmax(model, padded(texts, 48)[0])
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        by_training = [expected[row, t - 1, text[t]] for t in range(1, len(text))]
        ours = [*found.logprobs_BT[row, 1 : len(prompt)], *drawn.logprobs_BN[row]]
        np.testing.assert_allclose(ours, by_training, atol=tolerance)
        assert found.logprobs_BT[row, 0] == 0
        assert not np.any(found.logprobs_BT[row, len(prompt) :])


def test_equal_prompts_are_prefilled_once(model, monkeypatch):
    """Samples of one prompt, with their own draws, among others; as many rows go through the model as are distinct."""
    seen = []

    def spy(config, params, tokens, lengths, *rest, **more):
        seen.append(tokens.shape)
        return prefill(config, params, tokens, lengths, *rest, **more)

    monkeypatch.setattr(rows_module, "prefill", spy)
    prompts = [PROMPTS[0], PROMPTS[1], *[PROMPTS[0]] * 3]
    sampling = SamplingConfig(max_tokens=8, temperature=1.5)
    rows = [list(row) for row in zip(*generate_tokens(*model, prompts, sampling, (), 8), strict=True)]
    assert seen == [(2, 32)]
    assert len({tuple(row[0].token_ids) for row in rows}) == 5
    alone = next(generate_tokens(*model, [PROMPTS[0]], sampling, (), 8))
    assert alone == rows[0]


def test_a_growing_cache_draws_the_same(make_model, monkeypatch):
    """One that starts with the least it needs, and one that is whole from the start."""
    model = make_model(**LOCAL)
    monkeypatch.setattr(rows_module, "SMALLEST_GROWING", 1)
    sampling = SamplingConfig(max_tokens=40, temperature=1)
    texts = []
    for elements in (10**9, 0):
        monkeypatch.setattr(rows_module, "cache_elements", lambda *_, elements=elements: elements)
        texts.append(list(generate_tokens(*model, [PROMPTS[1]] * 2, sampling, (), 8)))
    assert texts[0] == texts[1]


def test_windows_keep_only_their_window(make_model):
    """A ring of the window's slots, whatever the context; while a prompt comes in chunks, one chunk more."""
    config, params = make_model(**LOCAL)
    assert [layer.k_PSH.shape[1] for layer in empty_cache(config, 1, 48).layers] == [5, 48]
    assert [layer.k_PSH.shape[1] for layer in empty_cache(config, 1, 48, call_tokens=7).layers] == [11, 48]
    found = prefill(config, params, *padded(PROMPTS, 32), 48, chunk_tokens=8)
    assert [layer.k_PSH.shape[1] for layer in found.cache.layers] == [5, 48]
    assert ring_slots(5, 3, 1) == 3


def test_resized_rings_keep_what_is_seen(make_model):
    """Each slot of the new ring holds the key that the old one had at that position."""
    config, _ = make_model(attention_pattern=("local",), num_layers=1)
    old = empty_cache(config, 2, 64, call_tokens=9)  # 13 slots
    lengths = jnp.array([3, 29])
    positions = key_positions(lengths, 13)
    old_layer = old.layers[0]._replace(k_PSH=jnp.repeat(positions, 4, axis=0)[..., None].astype(jnp.float32))
    new = resize(config, old._replace(layers=(old_layer,), lengths_B=lengths), 64).layers[0]
    wanted = np.repeat(np.asarray(key_positions(lengths, 5)), 4, axis=0)
    held = wanted < 64
    np.testing.assert_array_equal(np.asarray(new.k_PSH[..., 0])[held], wanted[held])
    assert held.sum() == 4 * (3 + 5)


def test_rounded_keys_and_values(make_model):
    """An int8 cache has a quarter of the bytes and nearly the same log-probabilities."""
    config, params = make_model(**LOCAL)
    tokens, lengths = padded(PROMPTS, 32)
    found = [
        prefill(config, params, tokens, lengths, 48, chunk_tokens=4, with_logprobs=True, in_int8=in_int8)
        for in_int8 in (False, True)
    ]
    whole, rounded = (sum(x.nbytes for x in jax.tree.leaves(f.cache.layers)) for f in found)
    assert rounded < 0.55 * whole  # heads of 4 numbers with a scale each; of 64 it would be 0.27
    np.testing.assert_allclose(*(f.logprobs_BT for f in found), atol=0.5)
    np.testing.assert_allclose(*(f.logprobs_BT.sum() for f in found), rtol=2e-2)
    sampling = SamplingConfig(max_tokens=12, temperature=0)
    rows = [
        list(generate_tokens(config, params, PROMPTS, sampling, (), 12, None, DecodingConfig(kv_cache=kind)))
        for kind in ("full", "int8")
    ]
    assert [r.token_ids[:1] for r in rows[0][0]] == [r.token_ids[:1] for r in rows[1][0]]
