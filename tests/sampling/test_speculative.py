"""Guesses change the speed and nothing else: greedy texts are equal, and drawn ones have the model's distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptjax.config import MeshConfig
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.sampling import speculative
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.sampling.decode import decoding_params, prefill, row_keys, start_decoding
from gptjax.sampling.filters import filter_settings
from gptjax.sampling.rows import Draft, generate_tokens

PROMPTS = [[7, 3, 250, 3, 9, 7, 3, 250], [1], [*range(20, 31)]]
GREEDY = SamplingConfig(max_tokens=24, temperature=0)
THREE = DecodingConfig(draft_tokens=3)


def new_tokens(model, prompts, sampling, decoding, draft=None, end=-1, chunk_tokens=10) -> list[list[int]]:
    chunks = generate_tokens(*model, prompts, sampling, end, chunk_tokens, None, decoding, draft)
    return [[token for chunk in row for token in chunk.token_ids] for row in zip(*chunks, strict=True)]


@pytest.fixture(scope="session")
def draft(make_model):
    """Half the layers of another model: it guesses right now and then."""
    return Draft(*make_model(num_layers=1))


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"attention_pattern": ("local", "dense"), "positions": "rope", "num_kv_heads": 2},
        {"attention_pattern": ("local",), "tie_embeddings": True},
    ],
    ids=["gpt2", "windows", "tied"],
)
def test_greedy_texts_are_equal(make_model, draft, switches):
    """Of unequal prompts in a batch, with the guesses of a model, of the text, and of the model itself."""
    model = make_model(**switches)
    expected = new_tokens(model, PROMPTS, GREEDY, DecodingConfig())
    for guesser in (draft, None, Draft(*model)):
        assert new_tokens(model, PROMPTS, GREEDY, THREE, guesser) == expected
    penalized = dataclasses.replace(GREEDY, repetition_penalty=1.3)
    assert new_tokens(model, PROMPTS, penalized, THREE, draft) == new_tokens(
        model, PROMPTS, penalized, DecodingConfig()
    )


def state_of(model, prompts, new, guesses, draft, rows):
    """A `SpeculativeState` of `rows` samples of each prompt."""
    config, params = model
    tokens = jnp.asarray([p + [0] * (16 - len(p)) for p in prompts], jnp.int32)
    lengths = jnp.asarray([len(p) for p in prompts])
    which = jnp.repeat(jnp.arange(len(prompts)), rows)

    def start(config, params):
        found = prefill(config, params, tokens, lengths, 64, call_tokens=guesses + 2)
        seen = jnp.zeros((len(which), config.padded_vocab_size), bool)
        return start_decoding(found, which, lengths[which] + new, seen, row_keys(0, len(which)))

    if draft is None:
        text = jnp.pad(tokens, [(0, 0), (0, 48)])[which]
        return speculative.start_speculating(start(config, params), None, text)
    return speculative.start_speculating(start(config, params), start(*draft).cache, None)


def joint_of_two(model, prompt, settings) -> np.ndarray:
    """Probabilities of all pairs of next tokens, by forward passes without a cache."""
    config, params = model
    V = config.vocab_size
    seen = jnp.zeros((1, config.padded_vocab_size), bool)

    def after(text):
        logits, _ = GPT(config).apply({"params": params}, jnp.asarray([text]))
        found = speculative._distribution(logits[:, -1].astype(jnp.float32), seen, settings)
        return np.asarray(found, np.float64)[0, :V]

    first = after(prompt)
    return np.stack([first[t] * after([*prompt, t]) for t in range(V)])


def p_value(model, draft, sampling, rows=4000, guesses=2) -> float:
    """Chi-square of the first two tokens of many samples against the exact distribution."""
    config, params = model
    settings, prompt = filter_settings(sampling), [1, 2, 3, 1, 2]
    state = state_of(model, [prompt], 2, guesses, draft, rows)
    more = {} if draft is None else {"draft_config": draft.config, "draft_params": decoding_params(*draft)}
    found, _ = speculative.decode_n_rounds(
        config, decoding_params(config, params), state, settings, -1, 2, guesses, **more
    )
    tokens, counts = np.asarray(found.tokens_BRN), np.asarray(found.counts_BR)
    assert np.all(counts.sum(axis=1) == 2)
    pairs = [np.concatenate([t[:n] for t, n in zip(*row, strict=True)]) for row in zip(tokens, counts, strict=True)]
    expected = rows * joint_of_two(model, prompt, settings).ravel()
    observed = np.bincount([a * config.vocab_size + b for a, b in pairs], minlength=len(expected))
    assert np.all(observed[expected == 0] == 0), "a token that a filter removes"
    enough = expected >= 5
    grouped = [np.append(x[enough], x[~enough].sum()) for x in (observed, expected)]
    grouped = [x[: len(x) - (grouped[1][-1] < 1e-9)] for x in grouped]
    return stats.chisquare(grouped[0], grouped[1] * rows / grouped[1].sum()).pvalue


SMALL = {"vocab_size": 6, "num_heads": 2, "model_dim": 8, "ffn_dim": 8, "positions": "rope"}
FILTERED = SamplingConfig(temperature=1.3, top_k=5, top_p=0.95)


@pytest.fixture(scope="session")
def small(make_model):
    return make_model(**SMALL)


@pytest.fixture(scope="session")
def small_draft(make_model):
    return Draft(*make_model(**SMALL | {"num_layers": 1}))


@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=1), FILTERED], ids=["all", "filtered"])
@pytest.mark.parametrize("guesser", ["model", "text"])
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
        assert p_value(small, small_draft, SamplingConfig(temperature=1)) < 1e-6
    finally:
        speculative.decode_n_rounds.clear_cache()


def test_guesses_are_counted(small, small_draft):
    """The model itself guesses right always; of another model, what stays is what was drawn beside the certain ones."""
    config, params = small
    own = Draft(config, params)
    for draft in (own, small_draft):
        state = state_of(small, [[1, 2, 3]], 32, 3, draft, 64)
        more = {"draft_config": draft.config, "draft_params": decoding_params(*draft)}
        found, state = speculative.decode_n_rounds(
            config, decoding_params(config, params), state, {"temperature": 1.0}, -1, 4, 3, **more
        )
        counts = np.asarray(found.counts_BR)
        assert int(state.guessed) == 64 * 4 * 3
        assert int(state.kept) == counts.sum() - 64 * 4
        assert (counts.min() == 4) == (draft is own)
    assert 0.1 < int(state.kept) / int(state.guessed) < 0.95


def test_log_probabilities(small, small_draft):
    """Of every token that counts, by the model alone."""
    config, params = small
    state = state_of(small, [[1, 2, 3]], 9, 3, small_draft, 2)
    more = {"draft_config": small_draft.config, "draft_params": decoding_params(*small_draft)}
    found, _ = speculative.decode_n_rounds(
        *(config, decoding_params(config, params), state, {"temperature": 1.2}, -1, 9, 3), **more, with_logprobs=True
    )
    for tokens, counts, logprobs in zip(found.tokens_BRN, found.counts_BR, found.logprobs_BRN, strict=True):
        text, given = (np.concatenate([row[:n] for row, n in zip(x, counts, strict=True)]) for x in (tokens, logprobs))
        whole = [1, 2, 3, *text.astype(int).tolist()]
        logits, _ = GPT(config).apply({"params": params}, jnp.asarray([whole]))
        expected = jax.nn.log_softmax(logits[0].astype(jnp.float32))
        np.testing.assert_allclose(given, [expected[2 + i, t] for i, t in enumerate(whole[3:])], atol=1e-5)
        assert len(text) == 9


def test_ends_and_chunks(model, draft):
    """A row ends with the end-of-text token, guessed or not, and after as many tokens as were asked for; how many are
    drawn between two looks changes nothing."""
    free = new_tokens(model, PROMPTS, GREEDY, DecodingConfig())
    end = next(token for token in free[0][3:] if token not in free[0][:3])
    for guesser, most in ((draft, 24), (Draft(*model), 7)):
        sampling = dataclasses.replace(GREEDY, max_tokens=most)
        ended = new_tokens(model, PROMPTS, sampling, THREE, guesser, end)
        assert ended == new_tokens(model, PROMPTS, sampling, DecodingConfig(), None, end)
    drawn = SamplingConfig(max_tokens=20, temperature=1.5)
    few, many = (new_tokens(model, PROMPTS, drawn, THREE, draft, chunk_tokens=n) for n in (4, 10))
    assert few == many
    assert new_tokens(model, PROMPTS, dataclasses.replace(drawn, seed=1), THREE, draft) != many


def test_up_to_the_end_of_the_context(model, draft):
    """Guesses beyond the last position are computed, and none of them counts."""
    whole = SamplingConfig(max_tokens=1000, temperature=0)
    expected = new_tokens(model, PROMPTS, whole, DecodingConfig())
    assert new_tokens(model, PROMPTS, whole, THREE, draft) == expected
    assert [len(row) + len(p) for row, p in zip(expected, PROMPTS, strict=True)] == [64] * 3


def test_the_text_is_continued_as_before():
    """The longest match wins, then the latest; what is beyond the text's end repeats."""
    text = jnp.asarray([[1, 2, 3, 9, 2, 3, 8, 1, 2, 3, 0, 0], [5, 6, 5, 6, 5, 0, 0, 0, 0, 0, 0, 0], [4] + [0] * 11])
    guesses = speculative._look_up(text, jnp.asarray([10, 5, 1]), 3)
    assert guesses[0].tolist() == [9, 2, 3]
    assert guesses[1].tolist() == [6, 5, 6]


def test_sharded(model, draft):
    """Rows, heads and vocabulary on four devices: the tokens of one."""
    sampling = SamplingConfig(max_tokens=12, temperature=1.2, top_p=0.9)
    cases = [(sampling, draft), (GREEDY, None)]
    expected = [new_tokens(model, PROMPTS, sampling, THREE, guesser) for sampling, guesser in cases]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])

    def laid_out(config, params):
        shapes = jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), jnp.zeros((4, 8), jnp.int32))["params"])
        put = jax.tree.map(
            lambda x, like: jax.device_put(x, jax.NamedSharding(mesh, like.sharding.spec)), params, shapes
        )
        return Draft(config, put)

    with jax.set_mesh(mesh):
        sharded, guesser = laid_out(*model), laid_out(*draft)
        for (sampling, guessing), tokens in zip(cases, expected, strict=True):
            assert new_tokens(sharded, PROMPTS, sampling, THREE, guessing and guesser) == tokens


def test_a_draft_that_does_not_fit(make_model, model):
    for field, value in (("vocab_size", 100), ("context_length", 32)):
        other = Draft(*make_model(**{field: value}))
        with pytest.raises(UserError, match=f"the draft's model.{field} is {value}, and the model's"):
            generate_tokens(*model, PROMPTS, GREEDY, -1, 8, None, THREE, other)
