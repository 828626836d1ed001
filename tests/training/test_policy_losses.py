"""Policy gradients against a transcription of their papers' formulas in NumPy, float64, with derivatives by hand.

Shape suffixes: B answers, T tokens, P prompts, G answers of a prompt.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.model.gpt import GPT
from gptjax.parallel import sharding
from gptjax.training.losses import language_model_loss
from gptjax.training.policy_losses import (
    adapted_coefficient,
    all_alike,
    clipped_objective,
    clipped_value_loss,
    divergence,
    generalized_advantages,
    group_advantages,
    judge_tokens,
    policy_loss,
    whiten,
)
from gptjax.training.state import init_params
from gptjax.tuning_config import RlConfig

B, T = 6, 9


def answers(draw):
    """Masks of answers that begin and end anywhere."""
    mask_BT = np.zeros((B, T), bool)
    for row in range(B):
        start = draw.integers(0, T - 1)
        mask_BT[row, start : draw.integers(start + 1, T + 1)] = True
    return mask_BT


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)])
def test_generalized_advantages_are_discounted_sums_of_errors(discount, decay):
    """Equation 16 of Schulman et al. 2016 as it stands: Σ (γλ)^l (r + γ V' - V), written out as a double sum."""
    draw = np.random.default_rng(0)
    mask_BT = answers(draw)
    rewards_BT = np.where(mask_BT, draw.normal(size=(B, T)), 0.0)
    values_BT = np.where(mask_BT, draw.normal(size=(B, T)), 0.0)
    advantages_BT, returns_BT = generalized_advantages(rewards_BT, values_BT, mask_BT, discount, decay)
    for b in range(B):
        (places,) = np.nonzero(mask_BT[b])
        for t in places:
            later = places[places >= t]
            errors = [
                rewards_BT[b, s] + discount * (values_BT[b, s + 1] if s + 1 in places else 0.0) - values_BT[b, s]
                for s in later
            ]
            expected = sum((discount * decay) ** n * error for n, error in enumerate(errors))
            np.testing.assert_allclose(advantages_BT[b, t], expected, rtol=1e-6, atol=1e-12)
            np.testing.assert_allclose(returns_BT[b, t], expected + values_BT[b, t], rtol=1e-6, atol=1e-12)
    assert not advantages_BT[~mask_BT].any()
    assert not returns_BT[~mask_BT].any()


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.4)])
def test_clipped_objective(low, high):
    """Equation 7 of Schulman et al. 2017: the gradient is A · ratio, and 0 where the ratio has gone too far with A."""
    draw = np.random.default_rng(1)
    new, old, advantages = draw.normal(size=(3, B, T)) * [[[0.4]], [[0.4]], [[1.0]]]
    with jax.enable_x64(True):
        losses, clipped = clipped_objective(*map(jnp.asarray, (new, old, advantages)), low, high)
        gradient = jax.grad(
            lambda x: clipped_objective(x, jnp.asarray(old), jnp.asarray(advantages), low, high)[0].sum()
        )(jnp.asarray(new))
    ratio = np.exp(new - old)
    expected = -np.minimum(ratio * advantages, np.minimum(np.maximum(ratio, 1 - low), 1 + high) * advantages)
    too_far = np.where(advantages > 0, ratio > 1 + high, ratio < 1 - low)
    assert 0.05 < too_far.mean() < 0.6
    np.testing.assert_array_equal(clipped, too_far)
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(gradient, np.where(too_far, 0.0, -ratio * advantages), rtol=1e-6, atol=1e-12)


def test_value_loss_and_divergence():
    draw = np.random.default_rng(2)
    values, old, returns = draw.normal(size=(3, B, T))
    with jax.enable_x64(True):
        found = clipped_value_loss(*map(jnp.asarray, (values, old, returns)), 0.2)
        gradient = jax.grad(lambda v: clipped_value_loss(v, jnp.asarray(old), jnp.asarray(returns), 0.2).sum())(
            jnp.asarray(values)
        )
        apart, slope = jax.value_and_grad(lambda x: divergence(x, jnp.asarray(old)).sum())(jnp.asarray(values))
    held = np.minimum(np.maximum(values, old - 0.2), old + 0.2)
    free, bound = (values - returns) ** 2, (held - returns) ** 2
    np.testing.assert_allclose(found, np.maximum(free, bound) / 2, rtol=1e-6)
    inside = np.abs(values - old) < 0.2
    expected = np.where(inside | (free > bound), values - returns, 0.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-12)
    lead = old - values
    np.testing.assert_allclose(apart, (np.exp(lead) - lead - 1).sum(), rtol=1e-6)
    np.testing.assert_allclose(slope, 1 - np.exp(lead), rtol=1e-6, atol=1e-12)
    assert (np.exp(lead) - lead - 1 >= 0).all()


def test_the_divergence_from_what_drew_the_tokens_is_the_kl():
    """Over all tokens, each as often as its policy draws it."""
    policy, other = np.array([0.5, 0.3, 0.2]), np.array([0.9, 0.04, 0.06])
    expected = (policy * np.log(policy / other)).sum()
    found = (policy * np.asarray(divergence(jnp.log(policy), jnp.log(other)))).sum()
    assert found == pytest.approx(expected, rel=1e-5)


def test_group_advantages():
    rewards_PG = np.array([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 3.0]])
    whole = group_advantages(rewards_PG, True)
    np.testing.assert_allclose(whole[0], np.array([-1, 1, 1, -1]), rtol=1e-5)
    np.testing.assert_allclose(whole[2], np.array([-1, -1, -1, 3]) / np.sqrt(3), rtol=1e-5)
    assert not whole[1].any()
    np.testing.assert_allclose(group_advantages(rewards_PG, False)[2], [-0.75, -0.75, -0.75, 2.25])


def test_whitened_values():
    draw = np.random.default_rng(3)
    mask_BT, values_BT = answers(draw), draw.normal(3.0, 2.0, (B, T))
    for keep_mean in (False, True):
        white = whiten(values_BT, mask_BT, keep_mean)
        assert white[mask_BT].std() == pytest.approx(1.0)
        assert white[mask_BT].mean() == pytest.approx(values_BT[mask_BT].mean() if keep_mean else 0.0, abs=1e-9)
        assert not white[~mask_BT].any()


def test_the_penalty_is_steered_to_its_target():
    for kl, factor in ((3.0, 1 - 0.2 / 50), (6.3, 1 + 0.05 / 50), (12.0, 1 + 0.2 / 50)):
        assert adapted_coefficient(0.2, kl, 6.0, 64, 3200.0) == pytest.approx(0.2 * factor)


@pytest.mark.parametrize("reward", [0.1, 0.3, 1 / 3, -1.1, 1e9 + 0.1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_groups_of_equal_rewards_are_known(reward, dtype):
    """However many and of whatever size they are, though the mean of equal numbers is often another one."""
    for size in range(2, 40):
        equal = np.full((2, size), reward, dtype)
        equal[1, -1] = np.nextafter(equal[1, -1], dtype(0))
        assert all_alike(equal).tolist() == [True, False]
        assert not group_advantages(equal, True)[0].any()
        assert not group_advantages(equal, False)[0].any()


def rows(config, params, model, seed=0):
    draw = np.random.default_rng(seed)
    T = config.context_length
    tokens = draw.integers(0, config.vocab_size, (8, T + 1)).astype(np.int32)
    mask = np.zeros((8, T + 1), np.float32)
    for row in range(8):
        start = draw.integers(2, 6)
        mask[row, start : start + draw.integers(2, 9)] = 1
    batch = {"tokens": tokens, "loss_mask": mask}
    now = np.pad(judge_tokens(model, params, batch, 0.8).logprobs_BT, [(0, 0), (1, 0)])
    noise = draw.normal(size=(3, 8, T + 1)).astype(np.float32)
    return batch | {
        "old_logprobs": now + 0.2 * noise[0],
        "reference_logprobs": now + 0.3 * noise[1],
        "advantages": noise[2] * mask,
        "token_weight": mask / mask.sum(axis=1, keepdims=True),
        "row_weight": np.ones(8, np.float32),
    }


def test_the_whole_loss_is_the_sum_of_its_formulas(tiny):
    """GRPO's equation 3 with its penalty, mean over each answer, on a model's own log-probabilities at temperature 0.8;
    and its gradient is that of Σ (dL/d log π) · log π with the derivative taken by hand."""
    model = GPT(tiny)
    params = init_params(model, jax.random.key(0))
    batch, rl = rows(tiny, params, model), RlConfig(temperature=0.8, clip=0.2)
    loss = policy_loss(model, rl, clip_high=0.28, kl_coefficient=0.1)
    (total, sums), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, None)

    def logprobs(params):
        logits, _ = model.apply({"params": params}, batch["tokens"][:, :-1])
        each = jax.nn.log_softmax(logits[:, :, : tiny.vocab_size] / 0.8)
        return jnp.take_along_axis(each, batch["tokens"][:, 1:, None], axis=2)[:, :, 0]

    new = np.asarray(logprobs(params), np.float64)
    old, reference, advantages, weight, mask = (
        batch[name][:, 1:].astype(np.float64)
        for name in ("old_logprobs", "reference_logprobs", "advantages", "token_weight", "loss_mask")
    )
    ratio, lead = np.exp(new - old), reference - new
    surrogate = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.28) * advantages)
    penalty = np.exp(lead) - lead - 1
    np.testing.assert_allclose(total, ((-surrogate + 0.1 * penalty) * weight).sum(), rtol=1e-4)
    drift = np.exp(new - old) - (new - old) - 1  # of tokens that the old policy has drawn
    np.testing.assert_allclose(sums["kl_old"], (drift * mask).sum() / mask.sum() * 8, rtol=1e-3)
    np.testing.assert_allclose(sums["kl_reference"], (penalty * mask).sum() / mask.sum() * 8, rtol=1e-3)
    too_far = np.where(advantages > 0, ratio > 1.28, ratio < 0.8)
    slope = (np.where(too_far, 0.0, -ratio * advantages) + 0.1 * (1 - np.exp(lead))) * weight
    expected = jax.grad(lambda p: (logprobs(p) * slope.astype(np.float32)).sum())(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), gradient, expected)


def test_pretraining_text_is_mixed_in(tiny):
    """InstructGPT's objective: the text's mean negative log-likelihood times its coefficient, whatever the batch."""
    model = GPT(tiny)
    params = init_params(model, jax.random.key(0))
    batch = rows(tiny, params, model)
    text = np.random.default_rng(1).integers(0, 61, (8, 3, 13)).astype(np.int32)
    plain, _ = policy_loss(model, RlConfig(), clip_high=0.2)(params, batch, None)
    options = {"text_loss": language_model_loss(model), "text_coefficient": 2.5}
    mixed, sums = policy_loss(model, RlConfig(), clip_high=0.2, **options)(params, batch | {"pretraining": text}, None)
    _, of_text = language_model_loss(model)(params, {"tokens": text.reshape(24, 13)}, None)
    mean = float(of_text["loss"] / of_text["weight"])
    assert float(mixed - plain) / 8 == pytest.approx(2.5 * mean, rel=1e-4)
    assert float(sums["pretraining_loss"]) / 8 == pytest.approx(mean, rel=1e-4)


def test_entropy_is_that_of_what_might_be_written(tiny):
    model = GPT(tiny)
    params = init_params(model, jax.random.key(0))
    batch = rows(tiny, params, model)
    logits, _ = model.apply({"params": params}, batch["tokens"][:, :-1])
    p = np.asarray(jax.nn.softmax(logits[:, :, : tiny.vocab_size] / 0.7), np.float64)
    found = judge_tokens(model, params, batch, 0.7)
    np.testing.assert_allclose(found.entropy_BT, -(p * np.log(p)).sum(axis=-1), rtol=1e-4)


@pytest.mark.parametrize(("temperature", "chunk_tokens"), [(0.8, 24), (0.8, 1)])
def test_chunks_of_logits_make_no_difference(switched_on, mesh, temperature, chunk_tokens):
    """On a mesh that splits rows, parameters and vocabulary: the loss with everything on, its metrics and its gradient
    are those of whole logits, and so is what a policy is judged by, at the rollouts' temperature."""
    config = dataclasses.replace(switched_on, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    model = GPT(config)
    params = jax.tree.map(lambda p: 3 * p, jax.jit(lambda: init_params(model, jax.random.key(0)))())
    draw = np.random.default_rng(0)
    made = {name: draw.normal(size=(8, 17)).astype(np.float32) for name in ("advantages", "token_weight")}
    made |= {
        name: draw.normal(-3.0, 0.3, (8, 17)).astype(np.float32) for name in ("old_logprobs", "reference_logprobs")
    }
    made |= {"tokens": draw.integers(0, 61, (8, 17)).astype(np.int32), "row_weight": np.ones(8, np.float32)}
    made |= {"loss_mask": draw.integers(0, 2, (8, 17)).astype(np.float32)}
    made |= {"pretraining": draw.integers(0, 61, (8, 2, 13)).astype(np.int32)}
    batch = {name: sharding.put_batch(values, lead=0) for name, values in made.items()}

    def run(chunk_tokens):
        options = {"kl_coefficient": 0.1, "text_coefficient": 2.0, "chunk_tokens": chunk_tokens}
        options["text_loss"] = language_model_loss(model, chunk_tokens=chunk_tokens)
        loss = policy_loss(model, RlConfig(temperature=temperature), clip_high=0.28, **options)
        judge = jax.jit(lambda p, b: judge_tokens(model, p, b, temperature, chunk_tokens=chunk_tokens))
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, None), judge(params, batch)

    whole, found = run(0), run(chunk_tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, whole)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(whole[0][1])) > 1e-2, "there is a gradient"


def test_no_logits_of_all_tokens_are_made_in_chunks(tiny, equations):
    """Of answers, of pretraining text, and where a reference judges: in the passes both ways no array is as large as
    the logits of all tokens; without chunks there are such."""
    config = dataclasses.replace(tiny, vocab_size=1500, compute_dtype="bfloat16")
    model, B, T, X = GPT(config), 8, 16, 2
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    of_tokens = ("loss_mask", "old_logprobs", "reference_logprobs", "advantages", "token_weight")
    batch = {name: jax.ShapeDtypeStruct((B, T + 1), jnp.float32) for name in of_tokens}
    batch |= {
        "tokens": jax.ShapeDtypeStruct((B, T + 1), jnp.int32),
        "row_weight": jax.ShapeDtypeStruct((B,), jnp.float32),
    }
    batch |= {"pretraining": jax.ShapeDtypeStruct((B, X, T + 1), jnp.int32)}

    def largest(chunk_tokens, temperature):
        options = {"kl_coefficient": 0.1, "text_coefficient": 2.0, "chunk_tokens": chunk_tokens}
        options["text_loss"] = language_model_loss(model, chunk_tokens=chunk_tokens)
        loss = policy_loss(model, RlConfig(temperature=temperature), clip_high=0.28, **options)

        def judge(params, batch):
            return judge_tokens(model, params, batch, temperature, chunk_tokens=chunk_tokens)

        programs = (
            jax.make_jaxpr(jax.grad(lambda p, b: loss(p, b, None)[0]))(params, batch),
            jax.make_jaxpr(judge)(params, batch),
        )
        return [
            max(variable.aval.size for one in equations(program.jaxpr) for variable in one.outvars)
            for program in programs
        ]

    for temperature in (1.0, 0.8):
        assert max(largest(16, temperature)) < B * T * 1500 / 2
        assert min(largest(0, temperature)) >= B * T * 1500
