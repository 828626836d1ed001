"""What PPO and GRPO share: answers that the policy draws, what they are worth, and rows to learn from.

In an iteration (`iterations.py`) answers are drawn with the parameters as they are, judged, and learned from.

Legend: B answers, P prompts, G answers of a prompt, T tokens of prompt and answer, N tokens of an answer.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from gptjax.checks import require
from gptjax.config import Config
from gptjax.data.conversations import SPLIT_BY, fingerprint, left_out, read_items, split_items
from gptjax.data.forms import Task, require_right_answer, task_of
from gptjax.data.loader import evenly_spaced
from gptjax.data.rankings import rounded
from gptjax.data.records import Record
from gptjax.data.tasks import Prompt, PromptOrder, encode_prompts, padded_tokens
from gptjax.errors import UserError
from gptjax.evaluation.rewards import JUDGED_BY_ANSWER, find_reward
from gptjax.model.gpt import Params
from gptjax.model.workload import Rows
from gptjax.parallel import sharding
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.rollout import Rollout, longest_prompt, rollout
from gptjax.stages import callbacks, chats, messages, start
from gptjax.stages.iterations import group_size
from gptjax.stages.judges import Judge, make_judge
from gptjax.stages.stage import Data
from gptjax.text.chat import ChatFormat
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.state import TrainState

SHOWN_PROMPTS = 3
Batch = dict[str, np.ndarray]


class Prompts(NamedTuple):
    """Tasks of the two splits."""

    form: ChatFormat
    train: list[Prompt]
    validation: list[Prompt]
    padded_tokens: int


def load_data(config: Config, tokenizer: Tokenizer | None, log: Callable[[str], None]) -> Data:
    """Read all prompts, lay them out, and say what does not fit.

    Args:
        tokenizer: the run's own, where it goes on; None: that of `model.init_from` or of `tokenizer.path`.

    Raises:
        UserError: what cannot be read; or a prompt that leaves no room for an answer, if not skipped.
    """
    tokenizer = tokenizer or start.tokenizer(config)
    find_reward(config.rl.reward)  # a name that is none is no reason to read the data first
    form, skipped = chats.layout(config, tokenizer), Counter()
    length, bound = _room(config)
    most_tokens = longest_prompt(length, config.rl.answer_tokens)
    if most_tokens < 1:
        raise UserError(
            f"rl.answer_tokens {config.rl.answer_tokens} leaves no room for a prompt in {bound} {length}; at most "
            f"{length - 1} work"
        )
    judged = config.rl.reward in JUDGED_BY_ANSWER
    items = read_items(config.data, lambda record: _task(record, judged), skipped)
    sides = []
    for side in split_items(items, config.data, skipped):
        prompts, counts = encode_prompts(form, side, most_tokens, config.data, f"{bound} {length}")
        skipped += counts
        if not prompts:
            raise UserError(f"no prompt is left of at most {most_tokens} tokens")
        sides.append(prompts)
    log(f"data: {len(items):,} prompts, {len(sides[0]):,} to answer, {len(sides[1]):,} held out{left_out(skipped)}")
    mark = fingerprint(
        [[item.prompt, item.answer] for item in items],
        # One more, as in runs that began when prompts were let in that no answer could be drawn to.
        *(tokenizer.fingerprint, form.template, most_tokens + 1, config.data.on_long),
        *(config.data.on_error, config.data.split, SPLIT_BY, config.data.validation_fraction),
    )
    content = Prompts(form, *sides, padded_tokens([*sides[0], *sides[1]], most_tokens))
    rows = Rows(1, rounded(content.padded_tokens + config.rl.answer_tokens - 1, length))
    num_rows = len(sides[0]) * group_size(config) * config.rl.inner_epochs
    return Data(tokenizer, mark, " ".join(config.data.path), num_rows, rows, content)


def _task(record: Record, judged: bool) -> Task:
    return require_right_answer(task_of(record)) if judged else task_of(record)


def _room(config: Config) -> tuple[int, str]:
    """Tokens that prompt and answer have together, and the field that says so: an answer is drawn within the model's
    context, and learned from in a row."""
    rows, context = config.sequence_length, config.model.context_length
    return (rows, "training.sequence_length") if rows <= context else (context, "model.context_length")


def example_rows(config: Config, data: Data, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The first prompts, (B, T), and nothing of them that is learned: that is yet to be drawn."""
    prompts, padding = data.content, data.tokenizer.padding_id
    order = PromptOrder(prompts.train, config.training.seed)
    tokens_BT = np.full((num_rows, prompts.padded_tokens), padding, np.int32)
    for row in range(num_rows):
        tokens_BT[row, : len(order[row].token_ids)] = order[row].token_ids
    return tokens_BT, np.zeros(tokens_BT.shape, bool)


def reward_of(config: Config, data: Data) -> Judge:
    """`judges.make_judge` for these prompts."""
    return make_judge(config, data.tokenizer, data.content.form, row_tokens(config, data))


def row_tokens(config: Config, data: Data) -> int:
    """T: prompt and answer, of which all but the last are inputs, padded so that meshes can divide those."""
    return data.rows.num_tokens + 1


class Drawn(NamedTuple):
    """Answers with what they are worth, as rows (B, T): prompt, answer, and nothing."""

    prompts: list[Prompt]
    """Of each answer."""
    texts: list[str]
    rewards_B: np.ndarray
    rollout: Rollout
    tokens_BT: np.ndarray
    mask_BT: np.ndarray
    """True at the answer's tokens."""
    old_logprobs_BT: np.ndarray
    seconds: dict[str, float]


def draw(
    config: Config,
    data: Data,
    reward: Judge,
    params: Params,
    prompts: Sequence[Prompt],
    answers_per_prompt: int,
    temperature: float,
    key: jax.Array,
) -> Drawn:
    """Answer prompts and judge the answers."""
    started = time.perf_counter()
    form, N = data.content.form, config.rl.answer_tokens
    found = rollout(
        callbacks.as_used(config.model),
        params,
        [prompt.token_ids for prompt in prompts],
        answers_per_prompt,
        SamplingConfig(max_tokens=N, temperature=temperature),
        form.stop_ids,
        key,
        prompt_tokens=data.content.padded_tokens,
        in_int8=config.rl.rollout_weights == "int8",
    )
    drawn = time.perf_counter()
    of_answers = [prompt for prompt in prompts for _ in range(answers_per_prompt)]
    shape = len(of_answers), row_tokens(config, data)
    tokens_BT, mask_BT = np.full(shape, data.tokenizer.padding_id, np.int32), np.zeros(shape, bool)
    logprobs_BT, ends_BT, texts = np.zeros(shape, np.float32), np.zeros(shape, np.float32), []
    for row, (prompt, length) in enumerate(zip(of_answers, found.lengths_B, strict=True)):
        at = len(prompt.token_ids)
        here = slice(at, at + length)
        tokens_BT[row, :at], tokens_BT[row, here] = prompt.token_ids, found.tokens_BN[row, :length]
        mask_BT[row, here], logprobs_BT[row, here] = True, found.logprobs_BN[row, :length]
        ends_BT[row, here.stop - 1] = 1.0
        texts.append(data.tokenizer.decode(found.tokens_BN[row, : length - found.ended_B[row]].tolist()))
    rewards_B = reward([prompt.task for prompt in of_answers], texts, tokens_BT, ends_BT)
    rewards_B = rewards_B - config.rl.unfinished_penalty * ~found.ended_B
    seconds = {"rollout_seconds": drawn - started, "reward_seconds": time.perf_counter() - drawn}
    return Drawn(of_answers, texts, rewards_B, found, tokens_BT, mask_BT, logprobs_BT, seconds)


class AnswerStream:
    """Rows that the policy itself writes, an iteration at a time."""

    def __init__(
        self,
        config: Config,
        data: Data,
        reward: Judge,
        policy_of: Callable[[TrainState], Params],
        rows_of: Callable[[Drawn, TrainState, int], tuple[Batch, dict[str, float]]],
        position: int,
    ):
        """
        Args:
            policy_of: the policy's parameters in a state.
            rows_of: what is learned from answers: rows in their order, and what there is to report; of a state and the
                iteration's number.
            position: of the first row, a multiple of an iteration's.
        """
        self._config, self._data, self._reward = config, data, reward
        self._policy_of, self._rows_of = policy_of, rows_of
        self._order, self.position = PromptOrder(data.content.train, config.training.seed), position
        self.metrics: dict[str, float] = {}
        self.on_policy = True

    def take(self, num_rows: int, state: TrainState) -> Batch:
        """Draw an iteration's answers with the policy as it is, and judge them.

        Raises:
            UserError: other than an iteration is asked for, of which the rest would be drawn once more.
        """
        config, group = self._config, group_size(self._config)
        rl, seed = config.rl, config.training.seed
        iteration, inside = divmod(self.position, rl.answers * rl.inner_epochs)
        require(
            not inside and num_rows == rl.answers * rl.inner_epochs,
            f"{num_rows} rows after the first {self.position} are no iteration of {rl.answers * rl.inner_epochs}; give "
            "the run the rl.answers, rl.inner_epochs and training.batch_size that it began with",
        )
        self.position += num_rows
        prompts = [self._order[iteration * (rl.answers // group) + i] for i in range(rl.answers // group)]
        key = jax.random.fold_in(jax.random.key(seed), iteration)
        policy = self._policy_of(state)
        drawn = draw(config, self._data, self._reward, policy, prompts, group, rl.temperature, key)
        order = np.random.default_rng((seed, iteration))
        if rl.shuffle_rewards:
            drawn = drawn._replace(rewards_B=order.permutation(drawn.rewards_B))
        started = time.perf_counter()
        rows, reported = self._rows_of(drawn, state, iteration)
        lengths_B = drawn.rollout.lengths_B
        self.metrics = {
            "reward": float(drawn.rewards_B.mean()),
            "reward_std": float(drawn.rewards_B.std()),
            "answer_tokens": float(lengths_B.mean()),
            "ended": float(drawn.rollout.ended_B.mean()),
            **reported,
            **drawn.seconds,
            "judge_seconds": time.perf_counter() - started,
        }
        # Each epoch in an order of its own, of which a process takes its rows of every micro-batch.
        numbers = np.concatenate([order.permutation(rl.answers) for _ in range(rl.inner_epochs)])
        size = config.training.resolved_micro_batch_size
        numbers = numbers.reshape(-1, size)[:, sharding.local_rows(size)].ravel()
        return {name: values[numbers] for name, values in rows.items()}

    def close(self) -> None:
        """Nothing is read ahead."""


def shared_rows(drawn: Drawn, advantages_BT: np.ndarray, aggregate: str, answer_tokens: int) -> Batch:
    """What the loss of both takes: rows, advantages, and how much each token and each row counts.

    Args:
        aggregate: `token`: all tokens alike; `answer`: all answers; `constant`: tokens, over the most an answer may
            have.
    """
    lengths_B1 = drawn.rollout.lengths_B[:, None]
    weight = {"token": 1.0, "answer": 1.0 / lengths_B1, "constant": 1.0 / answer_tokens}[aggregate]
    row_weight_B = drawn.rollout.lengths_B if aggregate == "token" else np.ones(len(lengths_B1))
    return {
        "tokens": drawn.tokens_BT,
        "loss_mask": drawn.mask_BT.astype(np.float32),
        "old_logprobs": drawn.old_logprobs_BT,
        "advantages": advantages_BT.astype(np.float32),
        "token_weight": (drawn.mask_BT * weight).astype(np.float32),
        "row_weight": row_weight_B.astype(np.float32),
    }


def evaluator(
    config: Config, data: Data, reward: Judge, policy_of: Callable[[TrainState], Params]
) -> Callable[[TrainState], dict[str, float]]:
    """The mean reward of the likeliest answers to held-out prompts, or to `training.eval_sequences` of them."""
    prompts = data.content.validation
    held_out = [prompts[number] for number in evenly_spaced(len(prompts), config.training.eval_sequences)]
    size = min(len(held_out), config.rl.answers)

    def evaluate(state: TrainState) -> dict[str, float]:
        policy, found = policy_of(state), []
        for first in range(0, len(held_out), size):
            part = held_out[first : first + size]
            filled = [*part, *[part[-1]] * (size - len(part))]
            drawn = draw(config, data, reward, policy, filled, 1, 0.0, jax.random.key(0))
            found.append((drawn.rewards_B[: len(part)], drawn.rollout.lengths_B[: len(part)]))
        rewards, lengths = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return {"val_reward": float(rewards.mean()), "val_answer_tokens": float(lengths.mean())}

    return evaluate


def sampler(
    config: Config, directory: Path, data: Data, policy_of: Callable[[TrainState], Params], log: Callable[[str], None]
) -> Callable:
    """Answers to the first held-out prompts."""
    asked = [prompt.task.prompt for prompt in data.content.validation[:SHOWN_PROMPTS]]
    shown = dataclasses.replace(config.training, sample_tokens=config.rl.answer_tokens)
    write = chats.answerer(dataclasses.replace(config, training=shown), data.tokenizer, data.content.form, asked)
    return callbacks.sampler(directory, lambda state: write(policy_of(state)), log)


def describe(config: Config, data: Data) -> list[str]:
    """What an iteration is, for the start of a run."""
    rl, prompts = config.rl, data.content
    steps = config.training.steps_per_dispatch
    iterations = math.ceil(config.training.steps / steps)
    return [
        f"{iterations:,} iterations of {rl.answers} answers to {rl.answers // group_size(config)} prompts, "
        f"{steps} steps each; prompts of up to {prompts.padded_tokens} tokens, answers of {rl.answer_tokens}",
        f"reward: {rl.reward}{', SHUFFLED' * rl.shuffle_rewards}",
        f"{messages.of_evaluation(config, len(prompts.validation), 'held-out prompts')}: the likeliest answers",
    ]
