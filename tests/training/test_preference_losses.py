"""Preference losses against a transcription of their papers' formulas in NumPy, float64, with derivatives by hand.

Shape suffixes: B prompts or pairs, K answers.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.model.gpt import GPT
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.training.preference_losses import compare, log_probabilities, pair_loss, preference_loss, reward_loss
from gptjax.training.state import init_params
from gptjax.tuning_config import PreferenceConfig

B, K = 7, 5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bradley_terry(scores_BK, ranks_BK):
    """InstructGPT's equation 1, a pair at a time: the losses, and their derivative by the scores."""
    losses, gradient = np.zeros(len(scores_BK)), np.zeros_like(scores_BK)
    for b, (scores, ranks) in enumerate(zip(scores_BK, ranks_BK, strict=True)):
        pairs = [(w, l) for w, l in itertools.permutations(range(K), 2) if 0 <= ranks[w] < ranks[l]]
        for winner, loser in pairs:
            lead = scores[winner] - scores[loser]
            losses[b] += -np.log(sigmoid(lead)) / len(pairs)
            slope = (sigmoid(lead) - 1) / len(pairs)
            gradient[b, winner] += slope
            gradient[b, loser] -= slope
    return losses, gradient


def test_all_pairs_of_ranked_answers():
    draw = np.random.default_rng(0)
    scores_BK = draw.normal(size=(B, K)) * 2
    ranks_BK = draw.integers(-1, 3, (B, K))
    ranks_BK[0], ranks_BK[1] = 2, -1  # nothing but ties, and nothing at all
    with jax.enable_x64(True):
        found = compare(jnp.asarray(scores_BK), jnp.asarray(ranks_BK))
        gradient = jax.grad(lambda s: compare(s, jnp.asarray(ranks_BK)).loss_B.sum())(jnp.asarray(scores_BK))
    losses, expected = bradley_terry(scores_BK, ranks_BK)
    np.testing.assert_allclose(found.loss_B, losses, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-12)
    assert found.pairs_B[0] == found.pairs_B[1] == 0
    for b in range(B):
        pairs = [(w, l) for w, l in itertools.permutations(range(K), 2) if 0 <= ranks_BK[b, w] < ranks_BK[b, l]]
        assert found.right_B[b] == sum(scores_BK[b, w] > scores_BK[b, l] for w, l in pairs)


def by_hand(config, policy_B2, reference_B2, lengths_B2):
    """Losses of pairs, implicit rewards' lead, and the derivative by the policy's log-probabilities."""
    beta, slopes = config.beta, np.array([1.0, -1.0])
    if config.loss == "dpo":
        x = beta * ((policy_B2 - reference_B2) @ slopes)
        eps = config.label_smoothing
        losses = -(1 - eps) * np.log(sigmoid(x)) - eps * np.log(sigmoid(-x))
        outer = beta * ((1 - eps) * (sigmoid(x) - 1) + eps * sigmoid(x))
        return losses, x, outer[:, None] * slopes
    if config.loss == "ipo":
        h = ((policy_B2 - reference_B2) / lengths_B2) @ slopes
        return (h - 1 / (2 * beta)) ** 2, beta * h, (2 * (h - 1 / (2 * beta)))[:, None] * slopes / lengths_B2
    x = beta * ((policy_B2 / lengths_B2) @ slopes) - config.margin
    outer = beta * (sigmoid(x) - 1)
    return -np.log(sigmoid(x)), x + config.margin, outer[:, None] * slopes / lengths_B2


@pytest.mark.parametrize(
    "config",
    [
        PreferenceConfig(),
        PreferenceConfig(beta=0.5, label_smoothing=0.2),
        PreferenceConfig("ipo", beta=0.2),
        PreferenceConfig("simpo", beta=2.0, margin=1.3),
    ],
    ids=lambda c: f"{c.loss}-{c.label_smoothing}",
)
def test_losses_of_pairs(config):
    draw = np.random.default_rng(1)
    policy_B2, reference_B2 = -draw.gamma(9, 3, (2, B, 2))
    lengths_B2 = draw.integers(1, 40, (B, 2)).astype(float)
    with jax.enable_x64(True):
        arguments = tuple(map(jnp.asarray, (policy_B2, reference_B2, lengths_B2)))
        losses_B, rewards_B = preference_loss(config, *arguments)
        gradient_B2 = jax.grad(lambda p: preference_loss(config, p, *arguments[1:])[0].sum())(arguments[0])
    expected = by_hand(config, policy_B2, reference_B2, lengths_B2)
    for found, wanted in zip((losses_B, rewards_B, gradient_B2), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-12)


def pairs(config, num_pairs=8, seed=0):
    draw = np.random.default_rng(seed)
    T = config.context_length
    mask = np.zeros((num_pairs, 2, T + 1), np.float32)
    for pair, side in itertools.product(range(num_pairs), range(2)):
        start = draw.integers(1, T - 4)
        mask[pair, side, start : start + draw.integers(1, 5)] = 1
    return {
        "tokens": draw.integers(0, config.vocab_size, (num_pairs, 2, T + 1)).astype(np.int32),
        "loss_mask": mask,
        "reference": -draw.gamma(9, 3, (num_pairs, 2)).astype(np.float32),
    }


def test_log_probabilities_are_the_models(tiny):
    """Of the answers' tokens alone, each after all before it."""
    model, batch = GPT(tiny), pairs(tiny)
    params = init_params(model, jax.random.key(0))
    rows = {name: batch[name].reshape(16, -1) for name in ("tokens", "loss_mask")}
    found = jax.jit(lambda p: log_probabilities(model, p, rows))(params)
    logits, _ = model.apply({"params": params}, rows["tokens"][:, :-1])
    each = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), rows["tokens"][:, 1:, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(found, (each * rows["loss_mask"][:, 1:]).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "context": 2, "tensor": 2}])
def test_meshes_agree(switched_on, axes):
    """Losses and gradients of pairs and of comparisons are those of one device, where sequences are split, too."""
    import dataclasses

    config = dataclasses.replace(switched_on, value_head=True, embedding_dropout=0.0)
    model = GPT(config)
    batch = pairs(config)
    ends = np.zeros(batch["tokens"].shape, np.float32)
    ends[:, :, 7] = 1
    compared = {"tokens": batch["tokens"][:, :, :-1], "ends": ends[:, :, :-1], "ranks": np.tile(np.arange(2), (8, 1))}
    cases = ((pair_loss(model, PreferenceConfig()), batch), (reward_loss(model), compared))

    def run(laid_out):
        params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
        found = []
        for loss, rows in cases:
            put = {name: laid_out(values) for name, values in rows.items()}
            (value, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, put, None)
            norm = sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads))
            found.append([float(value), norm, *map(float, sums.values())])
        return found

    alone = run(jnp.asarray)
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | axes))):
        together = run(lambda values: sharding.put_batch(values, lead=0))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-4, atol=1e-5)


def test_each_prompt_weighs_the_same(tiny):
    """A reward model's loss is a mean over prompts, whatever their number of answers; one without a pair is none."""
    import dataclasses

    config = dataclasses.replace(tiny, value_head=True)
    model = GPT(config)
    params = init_params(model, jax.random.key(0))
    draw = np.random.default_rng(0)
    batch = {
        "tokens": draw.integers(0, 61, (3, 3, 16)).astype(np.int32),
        "ends": np.eye(16, dtype=np.float32)[np.full((3, 3), 9)],
        "ranks": np.array([[0, 1, 2], [0, 1, -1], [1, 1, -1]]),
    }
    _, sums = reward_loss(model)(params, batch, None)
    alone = [reward_loss(model)(params, {k: v[i : i + 1] for k, v in batch.items()}, None)[1] for i in range(3)]
    assert float(sums["weight"]) == 2
    assert float(alone[2]["loss"]) == 0
    np.testing.assert_allclose(sums["loss"], alone[0]["loss"] + alone[1]["loss"], rtol=1e-5)
