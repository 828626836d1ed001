"""What is learned from answers of which one is better: rewards (Bradley–Terry), and policies without them.

All in float32, a row each; means over rows are the train step's. Shape suffixes: B prompts or pairs, K answers of a
prompt, T tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.model.gpt import GPT, Params
from gptjax.parallel import sharding
from gptjax.training.losses import Batch, Loss, inputs_and_labels, lay_out, loss_of_labels
from gptjax.tuning_config import PreferenceConfig


class Comparisons(NamedTuple):
    """What a reward model makes of each prompt's pairs of answers."""

    loss_B: jax.Array
    """Mean over the pairs of -log σ(score of the better - score of the worse); 0 where there is no pair."""
    pairs_B: jax.Array
    """Pairs that are no tie."""
    right_B: jax.Array
    """Of these, those whose better answer has the higher score."""


def compare(scores_BK: jax.Array, ranks_BK: jax.Array) -> Comparisons:
    """All pairs of each prompt's answers (Ouyang et al. 2022, equation 1; ties are left out).

    Args:
        ranks_BK: less is better, equal a tie; negative: there is no such answer.
    """
    lead_BKK = scores_BK[:, :, None] - scores_BK[:, None, :]
    there_BK = ranks_BK >= 0
    is_pair_BKK = (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & there_BK[:, :, None] & there_BK[:, None, :]
    pairs_B = is_pair_BKK.sum(axis=(1, 2)).astype(jnp.float32)
    losses_BKK = jnp.where(is_pair_BKK, jax.nn.softplus(-lead_BKK), 0.0)
    right_B = (is_pair_BKK & (lead_BKK > 0)).sum(axis=(1, 2)).astype(jnp.float32)
    return Comparisons(losses_BKK.sum(axis=(1, 2)) / jnp.maximum(pairs_B, 1.0), pairs_B, right_B)


def preference_loss(
    config: PreferenceConfig, policy_B2: jax.Array, reference_B2: jax.Array, lengths_B2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss of each pair, and by how much the chosen answer leads in implicit reward; both (B,).

    With d = log π(chosen) - log π(rejected), less the same of the reference:
    dpo: -log σ(β d), or its mean with the pair the other way round (Rafailov et al. 2023, equation 7; conservative DPO,
    Mitchell 2023). ipo: (d - 1/(2β))² of mean log-probabilities a token, as its authors advise (Azar et al. 2023,
    equation 17). simpo: -log σ(β d - margin) of means, without a reference (Meng et al. 2024, equation 6).

    Args:
        policy_B2: log-probability of the chosen and the rejected answer, summed over their tokens.
        reference_B2: the reference's; of no use to simpo.
        lengths_B2: tokens of the answers.
    """
    ratio_B2 = policy_B2 if config.loss == "simpo" else policy_B2 - reference_B2
    if config.loss != "dpo":
        ratio_B2 = ratio_B2 / jnp.maximum(lengths_B2, 1.0)
    lead_B = ratio_B2[:, 0] - ratio_B2[:, 1]
    reward_B = config.beta * lead_B
    match config.loss:
        case "dpo":
            wrong = config.label_smoothing
            loss_B = (1 - wrong) * jax.nn.softplus(-reward_B) + wrong * jax.nn.softplus(reward_B)
        case "ipo":
            loss_B = jnp.square(lead_B - 1 / (2 * config.beta))
        case "simpo":
            loss_B = jax.nn.softplus(config.margin - reward_B)
    return loss_B, reward_B


def scores(model: GPT, params: Params, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
    """(R,) float32: the value head's number at the end of each row.

    Args:
        batch: `tokens` (R, T) and `ends` (R, T), 1 at the last token of each.
    """
    inputs_RT, places = lay_out(batch["tokens"]), {}
    if sharding.num_shards("sequence") > 1:
        counted = jnp.broadcast_to(jnp.arange(batch["tokens"].shape[1]), batch["tokens"].shape)
        places["positions"] = lay_out(sharding.reshard(counted, "batch", "keys"))
    values_RT, _ = model.apply({"params": params}, inputs_RT, **places, dropout_key=dropout_key, values=True)
    return (values_RT * lay_out(batch["ends"])).sum(axis=1)


def log_probabilities(
    model: GPT, params: Params, batch: Batch, dropout_key: jax.Array | None = None, chunk_tokens: int = 0
) -> jax.Array:
    """(R,) float32: the sum over each row's labels that `loss_mask` counts."""
    inputs_RT, labels_RT, places = inputs_and_labels(batch)
    output = loss_of_labels(model.config, labels_RT, chunk_tokens)
    (nll_RT, _), _ = model.apply({"params": params}, inputs_RT, **places, dropout_key=dropout_key, output=output)
    return -(nll_RT * lay_out(batch["loss_mask"][:, 1:])).sum(axis=1)


def rows_of(x_BK: jax.Array) -> jax.Array:
    """(B, K, ...) as rows (B · K, ...), which stay on the devices that have them."""
    (B, K), rest = x_BK.shape[:2], x_BK.shape[2:]
    return jnp.reshape(x_BK, (B * K, *rest), out_sharding=sharding.spec("batch", *["keys"] * len(rest)))


def groups_of(x_R: jax.Array, size: int) -> jax.Array:
    """The reverse, of one number a row: (B, K)."""
    return jnp.reshape(x_R, (len(x_R) // size, size), out_sharding=sharding.spec("batch", "keys"))


def reward_loss(model: GPT) -> Loss:
    """`compare` of a value head's scores; every prompt weighs the same, however many answers it has.

    The batch has `tokens` and `ends`, both (B, K, T), and `ranks` (B, K).
    """

    def loss(params: Params, batch: Batch, dropout_key: jax.Array | None):
        rows = {name: rows_of(batch[name]) for name in ("tokens", "ends")}
        scores_BK = groups_of(scores(model, params, rows, dropout_key), batch["ranks"].shape[1])
        found = compare(scores_BK, batch["ranks"])
        counts_B = (found.pairs_B > 0).astype(jnp.float32)
        accuracy_B = found.right_B / jnp.maximum(found.pairs_B, 1.0)
        total = found.loss_B.sum()
        return total, {"weight": counts_B.sum(), "loss": total, "accuracy": accuracy_B.sum()}

    return loss


def pair_loss(model: GPT, config: PreferenceConfig, chunk_tokens: int = 0) -> Loss:
    """`preference_loss` of a batch of pairs.

    The batch has `tokens` and `loss_mask`, both (B, 2, T+1), and `reference` (B, 2). Metrics are `accuracy` (pairs in
    which the chosen answer leads), `margin` (by how much, in implicit reward) and both log-probabilities.
    """

    def loss(params: Params, batch: Batch, dropout_key: jax.Array | None):
        rows = {name: rows_of(batch[name]) for name in ("tokens", "loss_mask")}
        policy_B2 = groups_of(log_probabilities(model, params, rows, dropout_key, chunk_tokens), 2)
        lengths_B2 = batch["loss_mask"][:, :, 1:].sum(axis=2)
        loss_B, reward_B = preference_loss(config, policy_B2, batch["reference"], lengths_B2)
        total = loss_B.sum()
        return total, {
            "weight": jnp.asarray(len(loss_B), jnp.float32),
            "loss": total,
            "accuracy": (reward_B > 0).astype(jnp.float32).sum(),
            "margin": reward_B.sum(),
            "chosen_logprob": policy_B2[:, 0].sum(),
            "rejected_logprob": policy_B2[:, 1].sum(),
        }

    return loss
