"""What a stage holds and computes: its models, and the rows that one sequence of a batch puts through each of them.

`accounting.py` has the formulas of one model; here they are added up for every stage, so that memory, FLOPs, tokens,
MFU and epochs are counted in one way. A sequence is one of `training.batch_size`: a row of text, a prompt with its
ranked answers, a pair, or an answer that was drawn.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from gptjax.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from gptjax.model.accounting import (
    FlopsPerToken,
    Memory,
    activation_bytes,
    adapter_parameters,
    hidden_weights,
    parameter_counts,
    training_flops_per_token,
)
from gptjax.tuning_config import LoraConfig

FULL = LoraConfig()
"""Without adapters: all weights are trained."""


class Rows(NamedTuple):
    """The rows that one sequence is to a model."""

    count: int
    """1; of a pair 2; of ranked answers the most that a prompt has."""
    num_tokens: int
    """Of each that the model reads, padding included."""


class Network(NamedTuple):
    """A model that a stage holds on its devices while it trains."""

    model: ModelConfig
    rows: tuple[Rows, ...] = ()
    """That one sequence puts through it, forward and backward. None: it is not trained."""
    lora: LoraConfig = FULL
    values: bool = False
    """Whether its value head is asked, and not its vocabulary's."""
    averaged: bool = False
    """Whether an average of what is trained is kept."""


Networks = tuple[Network, ...]
"""The first is the one that the run is for."""
NetworksOf = Callable[[Config], Networks]


def expected_rows(config: Config) -> Rows:
    """What a sequence is as far as is known before the data is read: as long as a row may be, and 2 of ranked ones."""
    return Rows(2 if config.stage in ("reward", "dpo") else 1, config.sequence_length)


def fewest_rows(config: Config) -> Rows:
    """The least that a sequence can turn out to be when the data is read."""
    rows = expected_rows(config)
    return rows if config.stage in ("pretrain", "sft") else rows._replace(num_tokens=1)


def networks(
    config: Config, rows: Rows | None = None, critic: ModelConfig | None = None, judge: ModelConfig | None = None
) -> Networks:
    """The models of a stage's training step, and those that judge between steps.

    DPO's reference is not among them: it judges before the first step, and is gone when that begins.

    Args:
        rows: of a sequence; None: as `expected_rows` has it.
        critic: PPO's; None: the policy's shape.
        judge: the reward model's; None: rewards are computed otherwise.
    """
    stage, model, lora = config.stage, _known(config.model), config.lora
    rows, adapted = rows or expected_rows(config), bool(config.lora.rank)
    values = stage == "reward"
    model = dataclasses.replace(model, value_head=True) if values else model
    through, averaged = (rows,), stage == "ppo" and bool(config.ppo.ema_decay)
    if stage == "ppo" and config.ppo.pretraining_path:
        through += (Rows(config.ppo.pretraining_rows, config.sequence_length),)
    held = [Network(model, through, lora, values, averaged)]
    if stage == "ppo":
        held.append(Network(_known(critic or dataclasses.replace(model, value_head=True)), (rows,), lora, values=True))
    if not adapted and (stage == "ppo" or (stage == "grpo" and config.grpo.kl_coefficient)):
        held.append(Network(model))  # the reference; adapters leave what they adapt as it is
    if judge is not None:
        held.append(Network(_known(judge)))
    return tuple(held)


def _known(model: ModelConfig) -> ModelConfig:
    """With the least where the vocabulary is still open, and the type of accelerators."""
    return dataclasses.replace(model, vocab_size=model.vocab_size or 1, compute_dtype=model.compute_dtype or "bfloat16")


def sequence_tokens(held: Networks) -> int:
    """Tokens of one sequence that the model reads to learn, padding included: what runs count as tokens."""
    return sum(rows.count * rows.num_tokens for rows in held[0].rows)


def described(held: Networks) -> str:
    """What one sequence is: 256 tokens, or 2 × 112 tokens of a pair."""
    parts = [f"{f'{rows.count} × ' if rows.count > 1 else ''}{rows.num_tokens}" for rows in held[0].rows]
    return f"{' + '.join(parts)} tokens"


def flops_per_token(held: Networks) -> FlopsPerToken:
    """FLOPs of a training step, forward and backward through all that is trained, for each of `sequence_tokens`.

    Of reinforcement these are the steps' alone: drawing answers and judging them is not counted, though it takes time.
    """
    parts = [
        (rows, training_flops_per_token(n.model, rows.num_tokens, n.lora, n.values)) for n in held for rows in n.rows
    ]
    total = [sum(rows.count * rows.num_tokens * flops[i] for rows, flops in parts) for i in range(3)]
    return FlopsPerToken(*(round(flops / sequence_tokens(held)) for flops in total))


def weight_bytes(held: Networks) -> int:
    """Of all weights and adapters, each float32, on all devices together."""
    return 4 * sum(_stored(n.model) + (_trained(n) if n.rows and n.lora.rank else 0) for n in held)


def state_bytes(held: Networks, optimizer: OptimizerConfig, *, gradients: bool = True) -> int:
    """Of training, on all devices together: weights, and of what is trained two moments, an average where there is one
    and, if asked for, gradients; each float32.

    Of the blocks' matrices Muon, where it owns them, keeps a momentum and no second moment. The vocabulary is counted
    with its padding, which is stored.
    """
    kept = weight_bytes(held)
    for network in held:
        if network.rows:
            owned = hidden_weights(network.model) if optimizer.kind == "muon" and not network.lora.rank else 0
            kept += 4 * ((2 + network.averaged + gradients) * _trained(network) - owned)
    return kept


def _stored(model: ModelConfig) -> int:
    return parameter_counts(dataclasses.replace(model, vocab_size=model.padded_vocab_size))["total"]


def _trained(network: Network) -> int:
    model = network.model
    if not network.lora.rank:
        return _stored(model)
    return adapter_parameters(model, network.lora) + (model.model_dim + 1 if model.value_head else 0)


def memory_of_pass(
    held: Networks, mesh: MeshConfig, batch_size: int, chunk_tokens: int = 0, *, quadratic: bool = False
) -> Memory:
    """Activations of a micro-batch of `batch_size` sequences on one device, as `activation_bytes` has them.

    The least is that of the largest pass, for one may be over when the next begins; likely all are held together.
    """
    passes = [
        activation_bytes(
            dataclasses.replace(n.model, vocab_size=1) if n.values else n.model,
            *(mesh, batch_size * rows.count, chunk_tokens),
            num_tokens=rows.num_tokens,
            quadratic=quadratic,
        )
        for n in held
        for rows in n.rows
    ]
    return Memory(max(one.least for one in passes), sum(one.likely for one in passes))
