"""Decoding with a cache draws what the uncached forward would, whatever else is in the batch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.model.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.decode import decode_n_tokens, decoding_params, prefill, row_keys, start_decoding
from gptjax.sampling.rows import generate_tokens, stop_array

PROMPTS = [[7, 3, 250, 3, 9], [1], [*range(20, 31)]]
END_OF_TEXT = 256
GREEDY = SamplingConfig(max_tokens=20, temperature=0)
DRAWN = SamplingConfig(max_tokens=20, temperature=1.5, top_k=200, top_p=0.9, min_p=0.001, repetition_penalty=1.2)


def new_tokens(model, prompts, sampling, stop_ids=(), chunk_tokens=10) -> list[list[int]]:
    """All tokens of each row; by default no token ends one."""
    chunks = generate_tokens(*model, prompts, sampling, stop_ids, chunk_tokens)
    return [[token for chunk in row for token in chunk.token_ids] for row in zip(*chunks, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens_BT):
    return GPT(config).apply({"params": params}, tokens_BT)[0]


def uncached_logits(model, prompts, tokens) -> list[np.ndarray]:
    """For each row the logits before each new token, from one forward over the whole text.

    Causality makes this equal to a forward over each growing prefix, and right padding invisible.
    """
    config, params = model
    texts = np.zeros((len(prompts), config.context_length), np.int32)
    for row, text in enumerate(p + t for p, t in zip(prompts, tokens, strict=True)):
        texts[row, : len(text)] = text
    logits = np.asarray(forward(config, params, texts))
    return [logits[b, len(p) - 1 : len(p) - 1 + len(t)] for b, (p, t) in enumerate(zip(prompts, tokens, strict=True))]


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"norm": "rmsnorm", "bias": False, "feed_forward": "swiglu", "positions": "rope"},
        {"norm_position": "post", "positions": "sinusoidal", "feed_forward": "relu", "scale_embedding": True},
        {"positions": "none", "feed_forward": "geglu", "norm_bias": False},
        {"positions": "rope", "rope_fraction": 0.5, "feed_forward": "gelu", "qk_norm": True, "ffn_bias": False},
        {"num_kv_heads": 2, "positions": "rope", "feed_forward": "relu2"},
        {"num_kv_heads": 1, "head_dim": 6},
        {"tie_embeddings": True},
        {"num_layers": 3, "attention_pattern": ("dense", "local"), "positions": "rope", "rope_scaling": "yarn"},
        {"attention_pattern": ("local",), "scan_layers": True},
        {"attention_softcap": 1.0, "logit_softcap": 3.0, "head_bias": True},
    ],
    ids=lambda switches: ",".join(f"{k}={v}" for k, v in switches.items()) or "gpt2",
)
def test_greedy_equals_uncached_argmax(make_model, switches):
    """For every switch, and for prompts of unequal length in one batch."""
    model = make_model(**switches)
    tokens = new_tokens(model, PROMPTS, GREEDY)
    for row, logits in zip(tokens, uncached_logits(model, PROMPTS, tokens), strict=True):
        assert row == logits.argmax(axis=-1).tolist()
        assert len(row) == 20
    assert len(set().union(*tokens)) > 5  # no model so dull that any cache would do


def test_penalized_greedy_equals_uncached(model):
    tokens = new_tokens(model, PROMPTS, SamplingConfig(max_tokens=20, temperature=0, repetition_penalty=1.5))
    for prompt, row, logits in zip(PROMPTS, tokens, uncached_logits(model, PROMPTS, tokens), strict=True):
        for i, x in enumerate(logits):
            seen = np.isin(np.arange(x.size), prompt + row[:i])
            assert row[i] == np.where(seen, np.where(x > 0, x / 1.5, x * 1.5), x).argmax()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_batch_equals_one_by_one(model, sampling):
    batch = new_tokens(model, PROMPTS, sampling)
    for prompt, row in zip(PROMPTS, batch, strict=True):
        alone = new_tokens(model, [prompt], sampling)[0]
        # A row's draws depend on seed and row number; here every prompt alone is row 0.
        assert (alone == row) == (sampling is GREEDY or prompt is PROMPTS[0])


def test_only_top_k_is_drawn(model):
    tokens = new_tokens(model, PROMPTS, SamplingConfig(max_tokens=20, temperature=9.0, top_k=3))
    ranks = []
    for row, logits in zip(tokens, uncached_logits(model, PROMPTS, tokens), strict=True):
        ranks += [int((x > x[token]).sum()) for x, token in zip(logits, row, strict=True)]
    assert set(ranks) == {0, 1, 2}


def test_drawn_frequencies(model):
    """The first token of many rows follows the model's distribution: at most 5 standard deviations off."""
    n = 512
    tokens = new_tokens(model, [PROMPTS[0]] * n, SamplingConfig(max_tokens=1, temperature=1), chunk_tokens=1)
    x = uncached_logits(model, PROMPTS[:1], [[0]])[0][0]
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    counts = np.bincount(np.ravel(tokens), minlength=p.size)
    assert np.all(np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1)
    assert np.count_nonzero(counts) > 10


def test_seeds_and_rows(model):
    prompts = [PROMPTS[2]] * 3
    rows = new_tokens(model, prompts, DRAWN)
    assert rows[0] != rows[1] != rows[2] != rows[0]
    assert new_tokens(model, prompts, DRAWN) == rows
    assert new_tokens(model, prompts, dataclasses.replace(DRAWN, seed=1)) != rows


def test_chunks_do_not_matter(model):
    assert new_tokens(model, PROMPTS, DRAWN, chunk_tokens=3) == new_tokens(model, PROMPTS, DRAWN, chunk_tokens=10)


def test_padding_columns_are_never_drawn(make_model):
    model = make_model(vocab_size=61)
    tokens = new_tokens(model, [[1]] * 4, SamplingConfig(max_tokens=40, temperature=1e4))
    assert max(map(max, tokens)) == 60


def test_finished_rows_draw_nothing_else(model):
    """A row that drew the end-of-text token repeats it, and the other rows do not notice."""
    config, params = model
    free = new_tokens(model, PROMPTS, GREEDY)
    end = next(token for token in free[0][3:] if token not in free[1])
    lengths = [len(p) for p in PROMPTS]
    tokens_BT = jnp.asarray([p + [0] * (16 - len(p)) for p in PROMPTS], jnp.int32)
    prefilled = prefill(config, params, tokens_BT, jnp.asarray(lengths), 48)
    seen = jnp.zeros(prefilled.logits_BV.shape, bool)
    ends = jnp.full(3, 48)
    state = start_decoding(prefilled, jnp.arange(3), ends, seen, row_keys(0, 3))
    (tokens, _), state = decode_n_tokens(config, params, state, {}, stop_array([end]), 20)
    cut = free[0].index(end)
    assert tokens[0].tolist() == free[0][:cut] + [end] * (20 - cut)
    assert tokens[1].tolist() == free[1]
    assert state.done_B.tolist()[:2] == [True, False]


def test_settings_and_seed_compile_nothing(model):
    new_tokens(model, PROMPTS, DRAWN)
    before = prefill._cache_size(), decode_n_tokens._cache_size()
    other = SamplingConfig(
        max_tokens=15, temperature=1, top_k=150, top_p=0.8, min_p=0.1, repetition_penalty=1.1, seed=5
    )
    new_tokens(model, [p[:4] for p in PROMPTS], other)
    assert (prefill._cache_size(), decode_n_tokens._cache_size()) == before


def test_decoding_params(make_model):
    """Matrices are cast, norms and biases are not; layers are unstacked, and in float32 nothing else changes."""
    config, params = make_model(compute_dtype="bfloat16", tie_embeddings=False)
    copy = decoding_params(config, params)
    assert len(copy["blocks"]) == config.num_layers
    block = copy["blocks"][0]
    assert {copy["embedding"].dtype, copy["head"].dtype, block["attention"]["q"]["w"].dtype} == {jnp.dtype("bfloat16")}
    assert {block["attention"]["q"]["b"].dtype, block["attention_norm"]["scale"].dtype} == {jnp.dtype("float32")}
    config, params = make_model()
    copy = decoding_params(config, params)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *copy["blocks"])
    jax.tree.map(np.testing.assert_array_equal, copy | {"blocks": stacked}, params)


@pytest.mark.parametrize("axes", [{"data": 2}, {"data": 2, "fsdp": 2}, {"data": 1, "context": 2}])
def test_sharded(model, axes):
    """Three rows on two or four batch shards, or on devices that would split a sequence in training and do not here,
    heads and vocabulary split: the tokens of one device."""
    config, params = model
    unordered = dataclasses.replace(DRAWN, top_k=0)
    # Without top-k draws take another way through the vocabulary; once is enough.
    samplings = (DRAWN, unordered, GREEDY) if axes == {"data": 2} else (DRAWN,)
    expected = [new_tokens(model, PROMPTS, sampling) for sampling in samplings]
    mesh = make_mesh(MeshConfig(**axes, tensor=2), jax.devices()[: 2 * math.prod(axes.values())])
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), jnp.zeros((4, 8), jnp.int32))["params"])
        sharded = jax.tree.map(
            lambda x, like: jax.device_put(x, jax.NamedSharding(mesh, like.sharding.spec)), params, shapes
        )
        for sampling, tokens in zip(samplings, expected, strict=True):
            assert new_tokens((config, sharded), PROMPTS, sampling) == tokens
