"""Who says what answers are worth, and what a model makes of each of their tokens; all on the current mesh.

Shape suffixes: B answers, T tokens of prompt and answer.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from gptjax.config import Config, ModelConfig
from gptjax.data.forms import Task
from gptjax.errors import UserError
from gptjax.evaluation.rewards import find_reward, judge
from gptjax.model.gpt import GPT, Params
from gptjax.parallel import distributed, sharding
from gptjax.stages import chats
from gptjax.stages.reward import read_reward
from gptjax.text.chat import ChatFormat
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.load import load_run
from gptjax.training.losses import text_order
from gptjax.training.policy_losses import judge_tokens, judge_values
from gptjax.training.preference_losses import scores

Judge = Callable[[Sequence[Task], Sequence[str], np.ndarray, np.ndarray], np.ndarray]
"""The reward of each answer, from its task and text, and from its row and its place there (both (B, T))."""


def make_judge(config: Config, tokenizer: Tokenizer, form: ChatFormat, row_tokens: int) -> Judge:
    """What `rl.reward` names, under the current mesh.

    Args:
        row_tokens: of the longest prompt and answer together.

    Raises:
        UserError: it names nothing, or a reward model that knows other tokens or another layout.
    """
    function = find_reward(config.rl.reward)
    if function is not None:
        # Process 0 alone asks it: it may take its time, and may answer otherwise another time.
        return lambda tasks, answers, tokens_BT, ends_BT: np.array(
            distributed.from_first(lambda: judge(function, tasks, answers))
        )
    run = load_run(config.rl.reward)
    normal = read_reward(run.directory)
    if run.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the reward model {config.rl.reward} has another tokenizer ({run.tokenizer.vocab_size} tokens) than the "
            f"policy ({tokenizer.vocab_size}): train it with --model.init-from of the policy's own family"
        )
    if chats.layout_of_run(run.directory, run.tokenizer).template != form.template:
        raise UserError(f"the reward model {config.rl.reward} has learned another chat template than the policy's")
    if run.config.model.positions == "learned" and run.config.model.context_length < row_tokens:
        raise UserError(
            f"the reward model {config.rl.reward} has a context of {run.config.model.context_length} tokens, but "
            f"prompt and answer take {row_tokens}"
        )
    score = jax.jit(lambda params, batch: sharding.reshard(scores(run.model, params, batch), "stack"))

    def judged(tasks: Sequence[Task], answers: Sequence[str], tokens_BT: np.ndarray, ends_BT: np.ndarray) -> np.ndarray:
        found = in_batches(config, {"tokens": tokens_BT, "ends": ends_BT}, lambda batch: score(run.params, batch))
        return np.asarray(found, np.float64) - normal["mean"]

    return judged


def in_batches(
    config: Config, rows: Mapping[str, np.ndarray], function: Callable[[Mapping[str, jax.Array]], jax.Array]
) -> np.ndarray:
    """`function` of micro-batches of rows, one result a row, put together on the host."""
    size, total = config.training.resolved_micro_batch_size, len(next(iter(rows.values())))
    mine, found = sharding.local_rows(size), []
    for first in range(0, total, size):
        numbers = np.minimum(np.arange(first, first + size), total - 1)[mine]
        batch = {name: sharding.put_batch(values[numbers], size, lead=0) for name, values in rows.items()}
        found.append(function(batch))
    return np.concatenate([np.asarray(part) for part in found])[:total]


TokenJudge = Callable[[Params, np.ndarray, np.ndarray], np.ndarray]
"""A number for each token of rows, from parameters, the rows, and the mask outside of which it is 0; all (B, T)."""


def token_judge(config: Config, model: ModelConfig) -> TokenJudge:
    """Log-probabilities of an answer's tokens at the rollouts' temperature."""
    gpt, how = GPT(model), {"chunk_tokens": config.training.loss_chunk_tokens}
    return _of_tokens(
        config, lambda params, batch: judge_tokens(gpt, params, batch, config.rl.temperature, **how).logprobs_BT
    )


def value_judge(config: Config, model: ModelConfig) -> TokenJudge:
    """A critic's values of what stands before each token of an answer."""
    critic = GPT(model)
    return _of_tokens(config, lambda params, batch: judge_values(critic, params, batch))


def _of_tokens(config: Config, of_labels: Callable[[Params, Mapping[str, jax.Array]], jax.Array]) -> TokenJudge:
    """From a number for each label of a batch, as the model has them laid out."""
    of_batch = jax.jit(lambda params, batch: text_order(of_labels(params, batch)))

    def judged(params: Params, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        found = in_batches(config, {"tokens": tokens_BT}, lambda batch: of_batch(params, batch))
        return np.where(mask_BT, np.pad(found, [(0, 0), (1, 0)]), 0.0).astype(np.float32)

    return judged
