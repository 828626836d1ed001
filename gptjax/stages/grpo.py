"""Group-relative policy optimization: answers to a prompt are compared with each other, without a critic.

Shao et al. 2024 (DeepSeekMath), with the corrections of Dr. GRPO (Liu et al. 2025) and DAPO (Yu et al. 2025) as
switches; for rewards that can be verified, and for reward models.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.parametrization import multipliers
from gptjax.stages import callbacks, iterations, rl, start
from gptjax.stages.judges import token_judge
from gptjax.stages.stage import Data, Stage
from gptjax.stages.weights import weights_of
from gptjax.text.templates import TEMPLATE_FILE
from gptjax.training.optimizer import make_optimizer
from gptjax.training.policy_losses import all_alike, group_advantages, policy_loss
from gptjax.training.state import TrainState

configure, load_data, example_rows = iterations.configure, rl.load_data, rl.example_rows


def open_stage(config: Config, data: Data, directory: Path, log: Callable[[str], None]) -> Stage:
    """The stage under the current mesh.

    Raises:
        UserError: there is no reward, or a penalty for leaving a reference that there is not.
    """
    grpo, group = config.grpo, config.grpo.group_size
    if grpo.kl_coefficient and not config.model.init_from:
        raise UserError(
            f"grpo.kl_coefficient {grpo.kl_coefficient:g} holds the policy to the run it starts from: give "
            "--model.init-from RUN, or 0"
        )
    model, optimizer = GPT(config.model), make_optimizer(config.optimizer, multipliers(config.model))
    weights = weights_of(config, model, log)
    reward, judge_reference = rl.reward_of(config, data), token_judge(config, callbacks.as_used(config.model))
    reference = None
    if grpo.kl_coefficient:  # adapters leave what they adapt as it is
        reference = start.start_params(config, model, log) if weights.frozen is None else weights.frozen

    def rows_of(drawn: rl.Drawn, state: TrainState, iteration: int) -> tuple[rl.Batch, dict[str, float]]:
        rewards_PG = drawn.rewards_B.reshape(-1, group)
        advantages_B = group_advantages(rewards_PG, grpo.divide_by_deviation).ravel()
        rows = rl.shared_rows(drawn, drawn.mask_BT * advantages_B[:, None], grpo.aggregate, config.rl.answer_tokens)
        alike_P = all_alike(rewards_PG)
        if grpo.dynamic_sampling:
            counts_B = np.repeat(~alike_P, group)
            rows["token_weight"] = rows["token_weight"] * counts_B[:, None]
            rows["row_weight"] = rows["row_weight"] * counts_B
        if reference is not None:
            rows["reference_logprobs"] = judge_reference(reference, drawn.tokens_BT, drawn.mask_BT)
        return rows, {"groups_alike": float(alike_P.mean())}

    def policy_of(state: TrainState):
        return weights.whole(state.params)

    return Stage(
        loss=weights.loss(
            policy_loss(
                model,
                config.rl,
                clip_high=grpo.clip_high or config.rl.clip,
                kl_coefficient=grpo.kl_coefficient,
                chunk_tokens=config.training.loss_chunk_tokens,
            )
        ),
        optimizer=optimizer,
        new_state=lambda: weights.new_state(optimizer),
        abstract_state=weights.abstract_state(optimizer),
        frozen=weights.frozen,
        stream=lambda position: rl.AnswerStream(config, data, reward, policy_of, rows_of, position),
        evaluate=rl.evaluator(config, data, reward, policy_of),
        sample=rl.sampler(config, directory, data, policy_of, log),
        description=lambda progress: rl.describe(config, data),
        files={TEMPLATE_FILE: data.content.form.template},
    )
