"""Rollouts: what the sampling loop says of its tokens is what the training forward pass says of them."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.rollout import rollout
from gptjax.training.losses import text_order
from gptjax.training.policy_losses import judge_tokens
from gptjax.training.state import init_params

PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5, 3], [7]]
END = 60


def sharp(config, seed=0):
    """A model whose answers end now and then, and are sure enough for errors to be seen."""
    params = init_params(GPT(config), jax.random.key(seed))
    return jax.tree.map(lambda w: 6 * w if w.ndim > 1 else w, params)


def drawn(config, params, temperature=1.0, tokens=8, seed=0, end=END, **options):
    sampling = SamplingConfig(max_tokens=tokens, temperature=temperature)
    return rollout(config, params, PROMPTS, 2, sampling, (end,), jax.random.key(seed), prompt_tokens=8, **options)


def judged(config, params, found, temperature=1.0, shift=0):
    """The same tokens through the training forward pass, at the rollout's places."""
    B, N = found.tokens_BN.shape
    tokens, mask = np.zeros((B, 9 + N), np.int32), np.zeros((B, 9 + N), bool)
    for row in range(B):
        prompt, length = PROMPTS[row // 2], found.lengths_B[row]
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : len(prompt) + length] = found.tokens_BN[row, :length]
        mask[row, len(prompt) : len(prompt) + length] = True
    batch = {"tokens": tokens}
    if shift:
        batch["positions"] = np.tile(np.arange(9 + N, dtype=np.int32) + shift, (B, 1))
    put = {name: sharding.put_batch(values) for name, values in batch.items()}
    each = jax.jit(lambda p, b: text_order(judge_tokens(GPT(config), p, b, temperature).logprobs_BT))(params, put)
    result = np.zeros((B, N))
    for row in range(B):
        length = found.lengths_B[row]
        result[row, :length] = np.pad(np.asarray(each)[row], (1, 0))[mask[row]]
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("family", ["tiny", "switched_on"])
def test_log_probabilities_are_those_of_training(family, temperature, request):
    config = dataclasses.replace(request.getfixturevalue(family), embedding_dropout=0.0)
    params = sharp(config)
    found = drawn(config, params, temperature)
    assert not found.ended_B.all(), "some answers are cut"
    np.testing.assert_allclose(judged(config, params, found, temperature), found.logprobs_BN, atol=1e-5, rtol=1e-5)


def test_what_is_treated_otherwise_shows(tiny):
    """At another temperature, at other positions, or after another mask the two differ: the test above sees it."""
    params = sharp(tiny)
    found = drawn(tiny, params, 0.8)
    assert np.abs(judged(tiny, params, found, 1.0) - found.logprobs_BN).max() > 1e-2
    assert np.abs(judged(tiny, params, found, 0.8, shift=1) - found.logprobs_BN).max() > 1e-2
    local = dataclasses.replace(tiny, attention_pattern=("local",), attention_window=2)
    assert np.abs(judged(local, params, found, 0.8) - found.logprobs_BN).max() > 1e-2


def test_in_bfloat16_they_are_close(tiny):
    """Both round to eight bits, at other places: within 0.05 nats."""
    config = dataclasses.replace(tiny, compute_dtype="bfloat16")
    params = init_params(GPT(config), jax.random.key(0))
    found = drawn(config, params)
    assert np.abs(judged(config, params, found) - found.logprobs_BN).max() < 0.05


def test_int8_is_another_policy(tiny):
    params = sharp(tiny)
    found = drawn(tiny, params, in_int8=True)
    assert np.abs(judged(tiny, params, found) - found.logprobs_BN).max() > 1e-4


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}, {"data": 4, "context": 2}])
def test_a_mesh_draws_the_same(switched_on, axes):
    """Whatever the mesh, the answers and what is thought of them are those of one device."""
    config = dataclasses.replace(switched_on, embedding_dropout=0.0)
    params = jax.device_get(sharp(config))
    alone = drawn(config, params, 0.9)
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | axes))):
        shapes = jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))
        mesh = jax.sharding.get_mesh()
        laid_out = jax.tree.map(
            lambda x, like: jax.device_put(x, jax.NamedSharding(mesh, like.sharding.spec)), params, shapes
        )
        together = drawn(config, laid_out, 0.9)
        np.testing.assert_array_equal(together.tokens_BN, alone.tokens_BN)
        np.testing.assert_allclose(together.logprobs_BN, alone.logprobs_BN, atol=1e-4)
        np.testing.assert_allclose(judged(config, laid_out, together, 0.9), together.logprobs_BN, atol=1e-4)


def test_answers_end_where_they_end(tiny):
    params = sharp(tiny)
    end = int(drawn(tiny, params, 2.0).tokens_BN[3, 4])  # one that comes
    found = drawn(tiny, params, 2.0, end=end)
    for tokens, length, ended in zip(found.tokens_BN, found.lengths_B, found.ended_B, strict=True):
        assert end not in tokens[: length - 1]
        assert (tokens[length - 1] == end) == ended
        assert ended or length == 8
    assert found.ended_B.any()
    assert not found.logprobs_BN[np.arange(8) >= found.lengths_B[:, None]].any()
    greedy = drawn(tiny, params, 0.0)
    np.testing.assert_array_equal(greedy.tokens_BN[::2], greedy.tokens_BN[1::2])


def test_the_key_decides(tiny):
    params = sharp(tiny)
    first, again, other = drawn(tiny, params, seed=1), drawn(tiny, params, seed=1), drawn(tiny, params, seed=2)
    np.testing.assert_array_equal(first.tokens_BN, again.tokens_BN)
    assert not np.array_equal(first.tokens_BN, other.tokens_BN)


def test_what_does_not_fit_is_refused(tiny):
    params = sharp(tiny)
    with pytest.raises(UserError, match="prompts of 8 tokens and answers of 9 do not fit the context of 16"):
        drawn(tiny, params, tokens=9)
    filtered = SamplingConfig(max_tokens=4, top_p=0.9)
    with pytest.raises(UserError, match="temperature alone, not by top_p"):
        rollout(tiny, params, PROMPTS, 1, filtered, (END,), jax.random.key(0), prompt_tokens=8)
