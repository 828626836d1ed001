"""Policy gradients: PPO and GRPO, their advantages and the penalties around them.

Token t of a row is judged at t: its log-probability, its advantage and the value of what stands before it all have its
index. Shape suffixes: B answers, T tokens, P prompts, G answers of a prompt.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.model.gpt import GPT, Params
from gptjax.training.losses import Batch, Loss, inputs_and_labels, lay_out, loss_of_labels
from gptjax.training.preference_losses import rows_of
from gptjax.tuning_config import RlConfig


def generalized_advantages(
    rewards_BT: np.ndarray, values_BT: np.ndarray, mask_BT: np.ndarray, discount: float, decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """GAE (Schulman et al. 2016, equation 16) and the returns that it makes of the values, both (B, T).

    Args:
        rewards_BT: for each token of the answer; 0 elsewhere.
        mask_BT: true at the tokens of the answer, which stand together; the value after its last one is 0.
        decay: their λ.
    """
    advantages_BT, later_B, next_B = np.zeros_like(rewards_BT), 0.0, 0.0
    for t in reversed(range(rewards_BT.shape[1])):
        error_B = rewards_BT[:, t] + discount * next_B - values_BT[:, t]
        later_B = np.where(mask_BT[:, t], error_B + discount * decay * later_B, 0.0)
        next_B = np.where(mask_BT[:, t], values_BT[:, t], 0.0)
        advantages_BT[:, t] = later_B
    return advantages_BT, np.where(mask_BT, advantages_BT + values_BT, 0.0)


def whiten(values_BT: np.ndarray, mask_BT: np.ndarray, keep_mean: bool = False) -> np.ndarray:
    """Values of the masked tokens scaled to deviation 1, and to mean 0 unless that is kept; 0 elsewhere."""
    found = values_BT[mask_BT]
    white_BT = (values_BT - found.mean()) / (found.std() + 1e-8) + (found.mean() if keep_mean else 0.0)
    return np.where(mask_BT, white_BT, 0.0)


def all_alike(rewards_PG: np.ndarray) -> np.ndarray:
    """(P,) whether the rewards of a group are all equal. A mean is rounded, so that their deviation need not be 0."""
    return rewards_PG.max(axis=1) == rewards_PG.min(axis=1)


def group_advantages(rewards_PG: np.ndarray, divide_by_deviation: bool) -> np.ndarray:
    """Each answer's reward less its group's mean (GRPO, Shao et al. 2024, section 4.1.2), over its deviation or not.

    Without the division prompts that are nearly always, or nearly never, answered well count no more than others (Dr.
    GRPO, Liu et al. 2025). A group whose rewards are all equal has advantage 0.
    """
    centered_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    centered_PG = np.where(all_alike(rewards_PG)[:, None], 0.0, centered_PG)
    return centered_PG / (rewards_PG.std(axis=1, keepdims=True) + 1e-6) if divide_by_deviation else centered_PG


def clipped_objective(
    logprobs_BT: jax.Array, old_BT: jax.Array, advantages_BT: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7) as a loss for each token; and whether it is clipped.

    Args:
        low: by how much the ratio of new to old probability may fall below 1 before it is clipped.
        high: by how much it may rise above; more of it keeps unlikely tokens alive (DAPO, Yu et al. 2025).
    """
    ratio_BT = jnp.exp(logprobs_BT - old_BT)
    free_BT = ratio_BT * advantages_BT
    bound_BT = jnp.clip(ratio_BT, 1 - low, 1 + high) * advantages_BT
    return -jnp.minimum(free_BT, bound_BT), bound_BT < free_BT


def clipped_value_loss(values_BT: jax.Array, old_BT: jax.Array, returns_BT: jax.Array, clip: float) -> jax.Array:
    """Half the squared error of each value, no better for leaving the old one by more than `clip`."""
    held_BT = old_BT + jnp.clip(values_BT - old_BT, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values_BT - returns_BT), jnp.square(held_BT - returns_BT))


def divergence(logprobs_BT: jax.Array, reference_BT: jax.Array) -> jax.Array:
    """An estimate of KL(policy, reference) at each token that is never negative (GRPO's equation 4; Schulman's k3).

    Its mean is the KL where the policy has drawn the tokens.
    """
    lead_BT = reference_BT - logprobs_BT
    return jnp.exp(lead_BT) - lead_BT - 1


class Tokens(NamedTuple):
    """What a policy makes of each token of a row, (B, T)."""

    logprobs_BT: jax.Array
    entropy_BT: jax.Array
    """Of what it might have written there, in nats; without a gradient."""


def judge_tokens(
    model: GPT,
    params: Params,
    batch: Batch,
    temperature: float,
    dropout_key: jax.Array | None = None,
    chunk_tokens: int = 0,
) -> Tokens:
    """The training forward pass over whole rows, (B, T+1) of `batch["tokens"]`, at the rollouts' temperature.

    Args:
        chunk_tokens: as `loss_of_labels` takes it.
    """
    inputs_BT, labels_BT, places = inputs_and_labels(batch)
    output = loss_of_labels(model.config, labels_BT, chunk_tokens, temperature, with_entropy=True)
    (nll_BT, _, entropy_BT), _ = model.apply(
        {"params": params}, inputs_BT, **places, dropout_key=dropout_key, output=output
    )
    return Tokens(-nll_BT, entropy_BT)


def judge_values(model: GPT, params: Params, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
    """(B, T): a critic's value of what stands before each label."""
    inputs_BT, _, places = inputs_and_labels(batch)
    values_BT, _ = model.apply({"params": params}, inputs_BT, **places, dropout_key=dropout_key, values=True)
    return values_BT


def policy_loss(
    model: GPT,
    rl: RlConfig,
    *,
    clip_high: float,
    kl_coefficient: float = 0.0,
    critic: GPT | None = None,
    value_clip: float = 0.2,
    policy_of: Callable[[Params], Params] = lambda params: params,
    text_loss: Loss | None = None,
    text_coefficient: float = 0.0,
    chunk_tokens: int = 0,
) -> Loss:
    """The loss of answers that were drawn: of PPO with a critic, of GRPO without.

    The batch has `tokens`, `loss_mask` (1 at an answer's tokens), `old_logprobs`, `advantages` and `token_weight`, all
    (B, T+1), and `row_weight` (B,), over whose sum the loss is a mean; with a penalty or to be reported
    `reference_logprobs`; with a critic `old_values` and `returns`; with `text_loss` `pretraining` (B, X, T'+1).

    Args:
        clip_high: as `clipped_objective` takes it; the low one is `rl.clip`.
        kl_coefficient: weight of `divergence` from the reference in the loss. PPO's penalty is in its rewards instead.
        critic: its parameters are `params["critic"]`.
        policy_of: the policy's parameters among those that are trained.
        text_loss: of pretraining text that is learned with the answers; None: there is none.
        text_coefficient: weight of its mean (InstructGPT's γ).
        chunk_tokens: as `loss_of_labels` takes it.
    """

    def loss(params: Params, batch: Batch, dropout_key: jax.Array | None):
        found = judge_tokens(model, policy_of(params), batch, rl.temperature, dropout_key, chunk_tokens)

        def of(name: str) -> jax.Array:
            return lay_out(batch[name][:, 1:])

        weight_BT, mask_BT = of("token_weight"), of("loss_mask")
        old_BT = of("old_logprobs")
        row_weight = batch["row_weight"].sum()
        num_tokens = jnp.maximum(mask_BT.sum(), 1.0)

        def mean(values_BT: jax.Array) -> jax.Array:
            """Over the answers' tokens, in the units in which sums are divided by the weight."""
            return (values_BT * mask_BT).sum() / num_tokens * row_weight

        losses_BT, clipped_BT = clipped_objective(found.logprobs_BT, old_BT, of("advantages"), rl.clip, clip_high)
        total = (losses_BT * weight_BT).sum()
        sums = {
            "policy_loss": total,
            "entropy": mean(found.entropy_BT),
            "clip_fraction": mean(clipped_BT.astype(jnp.float32)),
            "kl_old": mean(divergence(old_BT, found.logprobs_BT)),  # the old policy has drawn the tokens
        }
        if "reference_logprobs" in batch:
            apart_BT = divergence(found.logprobs_BT, of("reference_logprobs"))
            sums["kl_reference"] = mean(apart_BT)
            total += kl_coefficient * (apart_BT * weight_BT).sum()
        if critic is not None:
            values_BT = judge_values(critic, params["critic"], batch, dropout_key)
            losses_BT = clipped_value_loss(values_BT, of("old_values"), of("returns"), value_clip)
            sums["value_loss"] = (losses_BT * weight_BT).sum()
            total += sums["value_loss"]
        if text_loss is not None:
            text = {"tokens": rows_of(batch["pretraining"])}
            of_text, text_sums = text_loss(policy_of(params), text, dropout_key)
            share = row_weight / text_sums["weight"]
            sums["pretraining_loss"] = text_sums["loss"] * share
            total += text_coefficient * of_text * share
        return total, sums | {"weight": row_weight, "loss": total}

    return loss


def adapted_coefficient(coefficient: float, kl: float, target: float, answers: int, horizon_answers: float) -> float:
    """The penalty's weight after so many answers, `kl` nats from the reference each (Ziegler et al. 2019, equation 4).

    They are counted once, however often they are learned from.
    """
    return coefficient * (1 + min(max(kl / target - 1, -0.2), 0.2) * answers / horizon_answers)
