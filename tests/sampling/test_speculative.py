"""Guesses change the speed and nothing else: greedy texts are equal, and drawn ones have the model's distribution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptjax.config import MeshConfig
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.sampling import memory, speculative
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.sampling.decode import decoding_params, prefill, row_keys, start_decoding
from gptjax.sampling.filters import filter_settings
from gptjax.sampling.rows import Draft, generate_tokens, stop_array

PROMPTS = [[7, 3, 250, 3, 9, 7, 3, 250], [1], [*range(20, 31)]]
GREEDY = SamplingConfig(max_tokens=24, temperature=0)
PENALIZED = dataclasses.replace(GREEDY, repetition_penalty=1.3)
ALL_FILTERS = SamplingConfig(max_tokens=24, temperature=1.5, top_k=200, top_p=0.9, min_p=0.001, repetition_penalty=1.2)
PLAIN, THREE = DecodingConfig(), DecodingConfig(draft_tokens=3)


def new_tokens(model, prompts, sampling, decoding, draft=None, end=(), chunk_tokens=10) -> list[list[int]]:
    chunks = generate_tokens(*model, prompts, sampling, end, chunk_tokens, None, decoding, draft)
    return [[token for chunk in row for token in chunk.token_ids] for row in zip(*chunks, strict=True)]


@pytest.fixture(scope="session")
def draft(make_model):
    """Half the layers of another model: it guesses right now and then."""
    return Draft(*make_model(num_layers=1))


@pytest.mark.parametrize(
    ("switches", "guesser", "sampling"),
    [
        ({}, "draft", GREEDY),
        ({}, "draft", PENALIZED),
        ({}, "text", PENALIZED),
        ({"attention_pattern": ("local", "dense"), "positions": "rope", "num_kv_heads": 2}, "text", GREEDY),
        ({"attention_pattern": ("local",), "num_layers": 1}, "itself", GREEDY),
    ],
    ids=["draft", "draft-penalty", "text-penalty", "text-windows", "itself-windows"],
)
def test_greedy_texts_are_equal(make_model, draft, switches, guesser, sampling):
    """Of unequal prompts in a batch. What guesses itself is right always, and has to read its own last guess."""
    model = make_model(**switches)
    guesser = {"draft": draft, "text": None, "itself": model}[guesser]
    assert new_tokens(model, PROMPTS, sampling, THREE, guesser) == new_tokens(model, PROMPTS, sampling, PLAIN)


def start(model, prompt, new, guesses, draft, rows):
    """A `SpeculativeState` of as many samples of a prompt."""
    tokens, lengths = jnp.asarray([prompt + [0] * (16 - len(prompt))]), jnp.asarray([len(prompt)])
    which = jnp.zeros(rows, jnp.int32)

    def prefilled(config, params):
        found = prefill(config, params, tokens, lengths, 32, call_tokens=guesses + 2)
        seen = jnp.zeros((rows, config.padded_vocab_size), bool).at[:, jnp.asarray(prompt)].set(True)
        return start_decoding(found, which, lengths[which] + new, seen, row_keys(0, rows))

    if draft is None:
        return speculative.start_speculating(prefilled(*model), None, jnp.pad(tokens, [(0, 0), (0, 16)])[which])
    return speculative.start_speculating(prefilled(*model), prefilled(*draft).cache, None)


def run(model, state, settings, rounds, guesses, draft, **more):
    """Texts of all rows with what else there is of each token, and the state after."""
    config, params = model
    if draft is not None:
        more |= {"draft_config": draft.config, "draft_params": decoding_params(*draft)}
    found, state = speculative.decode_n_rounds(
        config, decoding_params(config, params), state, settings, stop_array(()), rounds, guesses, **more
    )
    counts_BR = np.asarray(found.counts_BR)
    counts = np.arange(guesses + 1) < counts_BR[..., None]
    texts = [np.asarray(found.tokens_BRN)[b][counts[b]].tolist() for b in range(len(counts))]
    logprobs = found.logprobs_BRN
    given = None if logprobs is None else [np.asarray(logprobs)[b][counts[b]] for b in range(len(counts))]
    return texts, counts_BR, given, state


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, texts_BT):
    """Logits without a cache, and without those of the vocabulary's padding."""
    return GPT(config).apply({"params": params}, texts_BT)[0][..., : config.vocab_size]


def filtered(logits: np.ndarray, seen: list[int], sampling: SamplingConfig) -> np.ndarray:
    """The distribution that is sampled, as the definitions of the filters have it; no two tokens are as likely."""
    x = logits.astype(np.float64)
    for token in set(seen):
        x[token] = x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
    order = np.argsort(-x)
    kept = order[: sampling.top_k or None]
    p = np.exp((x[kept] - x.max()) / sampling.temperature)
    p /= p.sum()
    nucleus = np.cumsum(p) - p < sampling.top_p
    p = np.where(nucleus & (p >= sampling.min_p * p[0]), p, 0)
    found = np.zeros(len(x))
    found[kept] = p / p.sum()
    return found


def joint_of_three(model, prompt, sampling) -> np.ndarray:
    """Probability of each three tokens, from one forward pass over all that the first two may be."""
    config, params = model
    V, n = config.vocab_size, len(prompt)
    texts = [[*prompt, a, b] for a in range(V) for b in range(V)]
    logits = np.asarray(forward(config, params, jnp.asarray(texts))).reshape(V, V, n + 2, V)
    first = filtered(logits[0, 0, n - 1], prompt, sampling)
    joint = np.zeros((V, V, V))
    for a in range(V):
        second = filtered(logits[a, 0, n], [*prompt, a], sampling)
        for b in range(V):
            joint[a, b] = first[a] * second[b] * filtered(logits[a, b, n + 1], [*prompt, a, b], sampling)
    return joint.ravel()


def p_value(model, draft, sampling, rows=6000, guesses=2) -> float:
    """Chi-square of the first three tokens of many samples against the exact distribution."""
    V, prompt = model[0].vocab_size, [1, 2, 3, 1, 2]
    state = start(model, prompt, 3, guesses, draft, rows)
    texts, _, _, _ = run(model, state, filter_settings(sampling), 3, guesses, draft)
    assert {len(text) for text in texts} == {3}
    expected = rows * joint_of_three(model, prompt, sampling)
    observed = np.bincount(np.asarray(texts) @ [V * V, V, 1], minlength=len(expected))
    assert np.all(observed[expected == 0] == 0), "a token that a filter removes"
    enough = expected >= 5
    observed, expected = (np.append(x[enough], x[~enough].sum()) for x in (observed, expected))
    used = slice(None) if expected[-1] >= 5 else slice(-1)
    assert len(expected[used]) > 20
    return stats.chisquare(observed[used], expected[used] * observed[used].sum() / expected[used].sum()).pvalue


SMALL = {"vocab_size": 6, "num_heads": 2, "model_dim": 8, "ffn_dim": 8, "positions": "rope"}


@pytest.fixture(scope="session")
def small(make_model):
    return make_model(**SMALL)


@pytest.fixture(scope="session")
def small_draft(make_model):
    return Draft(*make_model(**SMALL | {"num_layers": 1}))


UNFILTERED = SamplingConfig(temperature=1)
FILTERED = SamplingConfig(temperature=1.3, top_k=5, top_p=0.95, min_p=0.02, repetition_penalty=1.3)


@pytest.mark.parametrize(
    ("guesser", "sampling"),
    [("model", UNFILTERED), ("model", FILTERED), ("text", FILTERED)],
    ids=["model", "model-filtered", "text-filtered"],
)
def test_the_distribution_is_the_model_s(small, small_draft, guesser, sampling):
    assert p_value(small, small_draft if guesser == "model" else None, sampling) > 1e-3


@pytest.mark.parametrize("wrong", ["every guess stays", "never less than half", "nothing is ruled out"])
def test_a_wrong_rule_is_found(small, small_draft, monkeypatch, wrong):
    """The same test fails where guesses stay that should not, or where the draw after a loss forgets the loss."""
    if wrong == "every guess stays":
        monkeypatch.setattr(speculative, "accepts", lambda p, q, u: u < 2)
    elif wrong == "never less than half":
        monkeypatch.setattr(speculative, "accepts", lambda p, q, u: u * q < jnp.maximum(p, 0.5 * q))
    else:
        monkeypatch.setattr(speculative, "_remainder", lambda p, state: p)
    speculative.decode_n_rounds.clear_cache()
    try:
        assert p_value(small, small_draft, UNFILTERED) < 1e-6
    finally:
        speculative.decode_n_rounds.clear_cache()


def test_guesses_and_log_probabilities(small, small_draft):
    """The model itself guesses right always; of another model, what stays is what was drawn beside the certain ones.
    The log-probability of each token is that of the model alone."""
    prompt, shares = [1, 2, 3], []
    for guesser in (Draft(*small), small_draft):
        state = start(small, prompt, 20, 3, guesser, 64)
        texts, counts_BR, given, state = run(small, state, {"temperature": 1.2}, 4, 3, guesser, with_logprobs=True)
        assert int(state.guessed) == 64 * 4 * 3
        assert int(state.kept) == counts_BR.sum() - 64 * 4
        shares.append(int(state.kept) / int(state.guessed))
    assert shares[0] == 1
    assert 0.1 < shares[1] < 0.95
    whole = np.asarray([prompt + text + [0] * (16 - len(text)) for text in texts])
    expected = np.asarray(jax.nn.log_softmax(forward(*small, whole)))
    for row, text in enumerate(texts):
        found = expected[row, 2 : 2 + len(text)][np.arange(len(text)), text]
        np.testing.assert_allclose(given[row], found, atol=1e-5)


def test_ends_and_chunks(model, draft):
    """A row ends with the end-of-text token, guessed or not, and after as many tokens as were asked for; how many are
    drawn between two looks changes nothing."""
    free = new_tokens(model, PROMPTS, GREEDY, PLAIN)
    end = next(token for token in free[0][3:] if token not in free[0][:3])
    for guesser, most in ((draft, 24), (None, 24), (draft, 9)):
        sampling = dataclasses.replace(GREEDY, max_tokens=most)
        ended = new_tokens(model, PROMPTS, sampling, THREE, guesser, (end,))
        assert ended == new_tokens(model, PROMPTS, sampling, PLAIN, None, (end,))
    few, many = (new_tokens(model, PROMPTS, ALL_FILTERS, THREE, draft, chunk_tokens=n) for n in (4, 10))
    assert few == many
    assert new_tokens(model, PROMPTS, dataclasses.replace(ALL_FILTERS, seed=1), THREE, draft) != many


def test_up_to_the_end_of_the_context(model, draft):
    """Guesses beyond the last position are computed, and none of them counts."""
    whole = dataclasses.replace(GREEDY, max_tokens=1000)
    expected = new_tokens(model, PROMPTS, whole, PLAIN)
    assert new_tokens(model, PROMPTS, whole, THREE, draft) == expected
    assert [len(row) + len(p) for row, p in zip(expected, PROMPTS, strict=True)] == [64] * 3


def test_the_text_is_continued_as_before():
    """The longest match wins, then the latest; what is beyond the text's end repeats."""
    text = jnp.asarray([[1, 2, 3, 9, 2, 3, 8, 1, 2, 3, 0, 0], [5, 6, 5, 6, 5, 0, 0, 0, 0, 0, 0, 0], [4] + [0] * 11])
    guesses = speculative._look_up(text, jnp.asarray([10, 5, 1]), 3)
    assert guesses[0].tolist() == [9, 2, 3]
    assert guesses[1].tolist() == [6, 5, 6]


def test_sharded(model, draft):
    """Rows, heads and vocabulary on four devices, with all filters: the tokens of one."""
    expected = [new_tokens(model, PROMPTS, ALL_FILTERS, THREE, guesser) for guesser in (draft, None)]
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])

    def laid_out(config, params):
        shapes = jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), jnp.zeros((4, 8), jnp.int32))["params"])
        put = jax.tree.map(
            lambda x, like: jax.device_put(x, jax.NamedSharding(mesh, like.sharding.spec)), params, shapes
        )
        return Draft(config, put)

    with jax.set_mesh(mesh):
        sharded, guesser = laid_out(*model), laid_out(*draft)
        assert [new_tokens(sharded, PROMPTS, ALL_FILTERS, THREE, g) for g in (guesser, None)] == expected


def test_a_shorter_context_of_the_draft(make_model, model):
    """Is enough for the texts that it is, and refused for longer ones before anything runs."""
    short = Draft(*make_model(num_layers=1, context_length=35))
    assert new_tokens(model, PROMPTS, GREEDY, THREE, short) == new_tokens(model, PROMPTS, GREEDY, PLAIN)
    with pytest.raises(
        UserError, match="context_length is 35, but the longest text may have 36 tokens; ask for 1 fewer"
    ):
        generate_tokens(*model, PROMPTS, dataclasses.replace(GREEDY, max_tokens=25), (), 8, None, THREE, short)


def test_a_draft_that_does_not_fit(make_model, model, draft, monkeypatch):
    """Other tokens, nothing to guess, or no memory for its weights beside the model's."""

    def refused(decoding, draft):
        with pytest.raises(UserError) as said:
            generate_tokens(*model, PROMPTS, GREEDY, (), 8, None, decoding, draft)
        return str(said.value)

    assert "the draft's model.vocab_size is 100, and the model's 257" in refused(THREE, make_model(vocab_size=100))
    assert "draft_tokens is 0" in refused(PLAIN, draft)
    large = make_model(model_dim=64)
    monkeypatch.setattr(memory, "_memory_bytes", lambda device: 200_000)
    generate_tokens(*model, PROMPTS, GREEDY, (), 8, None, THREE, draft)
    assert "do not fit" in refused(THREE, large)
