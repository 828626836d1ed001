"""Proximal policy optimization against a reward, with pretraining text mixed in.

The third of InstructGPT's steps (Ouyang et al. 2022, after Schulman et al. 2017, Ziegler et al. 2019 and Stiennon et
al. 2020): every token pays for leaving the model that the run starts from, a critic with a network of its own says what
is to be expected, and an average of the policy over steps is what is used in the end.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.data.loader import RowStream
from gptjax.data.prepare import prepare
from gptjax.errors import UserError
from gptjax.model.gpt import GPT, Params
from gptjax.parametrization import multipliers
from gptjax.stages import callbacks, iterations, pretrain, rl, start
from gptjax.stages.judges import token_judge, value_judge
from gptjax.stages.stage import Data, Stage
from gptjax.stages.weights import Weights, weights_of
from gptjax.text.files import load_tokenizer
from gptjax.text.templates import TEMPLATE_FILE
from gptjax.training.losses import Batch, Loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.policy_losses import adapted_coefficient, generalized_advantages, policy_loss, whiten
from gptjax.training.state import TrainState, abstract, state_of
from gptjax.training.step import Metrics

load_data, example_rows = rl.load_data, rl.example_rows


def configure(config: Config) -> Config:
    """As `iterations.configure`.

    Raises:
        UserError: as there; or there is no run to start from.
    """
    if not config.model.init_from:
        raise UserError("PPO holds the policy to the run it starts from: give --model.init-from RUN")
    if not config.optimizer.peak_learning_rate:
        raise UserError("optimizer.peak_learning_rate is 0; ppo.value_learning_rate is reached as a multiple of it")
    return iterations.configure(config)


def open_stage(config: Config, data: Data, directory: Path, log: Callable[[str], None]) -> Stage:
    """The stage under the current mesh.

    Raises:
        UserError: there is no reward, or the critic's start has another tokenizer.
    """
    ppo, used = config.ppo, callbacks.as_used(config.model)
    source, critic_config = _critic(config, data)
    model, critic = GPT(config.model), GPT(critic_config)
    optimizer = _optimizer(config, critic_config)
    reward = rl.reward_of(config, data)
    policy, value = weights_of(config, model, log), weights_of(source, critic, log)
    # Adapters leave what they adapt as it is.
    reference = start.start_params(config, model, lambda line: None) if policy.frozen is None else policy.frozen
    judge_reference, judge_values = token_judge(config, used), value_judge(config, critic_config)
    text = _pretraining_rows(config, data, log)

    def rows_of(drawn: rl.Drawn, state: TrainState, iteration: int) -> tuple[rl.Batch, dict[str, float]]:
        reference_BT = judge_reference(reference, drawn.tokens_BT, drawn.mask_BT)
        values_BT = judge_values(value.whole(state.params["critic"]), drawn.tokens_BT, drawn.mask_BT)
        mask_BT = drawn.mask_BT
        over_BT = np.where(mask_BT, drawn.old_logprobs_BT - reference_BT, 0.0)
        coefficient = float(state.extra["kl_coefficient"])
        rewards_BT = -coefficient * over_BT
        last_B = mask_BT.shape[1] - 1 - mask_BT[:, ::-1].argmax(axis=1)
        rewards_BT[np.arange(len(last_B)), last_B] += drawn.rewards_B
        if ppo.whiten_rewards:
            rewards_BT = whiten(rewards_BT, mask_BT, keep_mean=True)
        advantages_BT, returns_BT = generalized_advantages(rewards_BT, values_BT, mask_BT, ppo.discount, ppo.gae_decay)
        rows = rl.shared_rows(drawn, whiten(advantages_BT, mask_BT), "token", config.rl.answer_tokens)
        rows |= {
            "reference_logprobs": reference_BT,
            "old_values": values_BT,
            "returns": returns_BT.astype(np.float32),
        }
        kl = float(over_BT.sum(axis=1).mean())
        if ppo.kl_target:
            after = adapted_coefficient(coefficient, kl, ppo.kl_target, len(last_B), ppo.kl_horizon_answers)
            rows["next_kl_coefficient"] = np.full(len(last_B), after, np.float32)
        if text is not None:
            rows["pretraining"] = text(iteration)
        explained = 1 - (returns_BT - values_BT)[mask_BT].var() / (returns_BT[mask_BT].var() + 1e-8)
        return rows, {
            "kl": kl,
            "kl_coefficient": coefficient,
            "explained_variance": float(explained),
        }

    def after(extra: dict, params: Params, means: Metrics) -> dict:
        """The penalty's weight and the average of the policy after a step."""
        extra = dict(extra)
        if ppo.kl_target:  # the same in every step of an iteration, of which one may be skipped
            extra["kl_coefficient"] = means["next_kl_coefficient"]
        if ppo.ema_decay:
            extra["average"] = jax.tree.map(
                lambda a, p: ppo.ema_decay * a + (1 - ppo.ema_decay) * p, extra["average"], params["policy"]
            )
        return extra

    def extra_of(params: Params) -> dict:
        average = {"average": jax.tree.map(jnp.copy, params["policy"])} if ppo.ema_decay else {}
        return {"kl_coefficient": jnp.asarray(ppo.kl_coefficient, jnp.float32)} | average

    def new_state() -> TrainState:
        return state_of({"policy": policy.new(), "critic": value.new()}, optimizer, extra_of)

    def drawn_state(key: jax.Array) -> TrainState:
        return state_of({"policy": policy.draw(key), "critic": value.draw(key)}, optimizer, extra_of)

    def in_use(state: TrainState) -> Params:
        return policy.whole(state.extra["average"] if ppo.ema_decay else state.params["policy"])

    frozen = None if policy.frozen is None else {"policy": policy.frozen, "critic": value.frozen}

    return Stage(
        loss=_joined(
            policy_loss(
                model,
                config.rl,
                clip_high=config.rl.clip,
                critic=critic,
                value_clip=ppo.value_clip,
                policy_of=lambda params: params["policy"],
                text_loss=None if text is None else callbacks.text_loss(config, model, data.tokenizer),
                text_coefficient=ppo.pretraining_coefficient,
                chunk_tokens=config.training.loss_chunk_tokens,
            ),
            policy,
            value,
        ),
        optimizer=optimizer,
        new_state=new_state,
        abstract_state=abstract(drawn_state),
        frozen=frozen,
        stream=lambda position: rl.AnswerStream(
            config, data, reward, lambda state: policy.whole(state.params["policy"]), rows_of, position
        ),
        evaluate=rl.evaluator(config, data, reward, in_use),
        sample=rl.sampler(config, directory, data, in_use, log),
        description=lambda progress: [
            *rl.describe(config, data),
            f"critic: starts as {source.model.init_from}, {critic_config.num_layers} layers",
        ],
        after=after,
        files={TEMPLATE_FILE: data.content.form.template},
    )


def _joined(loss: Loss, policy: Weights, value: Weights) -> Loss:
    """The loss of what is trained; it hands on what the penalty weighs after the iteration."""

    def joined(params: Params, batch: Batch, dropout_key: jax.Array | None):
        if policy.frozen is not None:
            trained, frozen = params
            params = {
                "policy": policy.join(trained["policy"], frozen["policy"]),
                "critic": value.join(trained["critic"], frozen["critic"]),
            }
        total, sums = loss(params, batch, dropout_key)
        if "next_kl_coefficient" in batch:
            sums = sums | {"next_kl_coefficient": batch["next_kl_coefficient"].mean() * sums["weight"]}
        return total, sums

    return joined


def _critic(config: Config, data: Data) -> tuple[Config, ModelConfig]:
    """What the critic starts from, as a configuration, and its model.

    Raises:
        UserError: it has another tokenizer.
    """
    model = start.critic_model(config)
    folder = model.init_from
    if load_tokenizer(Path(folder)).with_vocab_size(model.vocab_size).fingerprint != data.tokenizer.fingerprint:
        raise UserError(f"the critic's start {folder} has another tokenizer than the policy's; ppo.critic_from another")
    return dataclasses.replace(config, model=model), model


def _optimizer(config: Config, critic: ModelConfig) -> optax.GradientTransformation:
    """Of policy and critic, each clipped on its own; the critic's rate is a multiple of the policy's."""
    ratio = config.ppo.value_learning_rate / config.optimizer.peak_learning_rate
    kinds = {
        "policy": make_optimizer(config.optimizer, multipliers(config.model)),
        "critic": optax.chain(make_optimizer(config.optimizer, multipliers(critic)), optax.scale(ratio)),
    }
    return optax.partition(kinds, lambda params: {name: name for name in params})


def _pretraining_rows(config: Config, data: Data, log: Callable[[str], None]) -> Callable[[int], np.ndarray] | None:
    """Rows of text for each answer of an iteration, (B, X, T+1); None where none is mixed in."""
    ppo = config.ppo
    if not ppo.pretraining_path:
        return None
    of_text = DataConfig(path=ppo.pretraining_path, prepared_dir=config.data.prepared_dir)
    prepared = prepare(of_text, data.tokenizer, log=log)
    sources = pretrain.training_rows(prepared, dataclasses.replace(config, data=of_text))
    per_iteration = config.rl.answers * ppo.pretraining_rows

    def rows(iteration: int) -> np.ndarray:
        stream = RowStream([*sources.values()], config.training.seed, iteration * per_iteration)
        try:
            tokens = stream.take(per_iteration)
        finally:
            stream.close()
        return tokens.reshape(config.rl.answers, ppo.pretraining_rows, -1)

    return rows
