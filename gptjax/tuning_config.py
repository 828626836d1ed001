"""The settings of the stages after pretraining, as frozen dataclasses; `config.py` has all others.

Only the standard library is imported.
"""

import math
from dataclasses import dataclass
from typing import Literal

from gptjax.checks import require, require_range, require_types

Stage = Literal["pretrain", "sft", "reward", "dpo", "ppo", "grpo"]
"""What a run does: text, instructions, comparisons, pairs, reinforcement with and without a critic."""
AdaptedLayer = Literal["q", "k", "v", "out", "gate", "up", "down"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): what is trained is added to weights that stay as they are."""

    rank: int = 0
    """Rank of the adapters. 0: there are none, and all weights are trained."""
    alpha: float = 16.0
    """Adapters are multiplied by alpha / rank."""
    targets: tuple[AdaptedLayer, ...] = ("q", "k", "v", "out", "gate", "up", "down")
    """Which matrices of the blocks get one."""

    def __post_init__(self):
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))
        require_types("lora.", self)
        require_range("lora.", self, 0, math.inf, "rank")
        require(0 < self.alpha < math.inf, f"lora.alpha is {self.alpha:g}, but must be above 0; 16 is usual")
        require(len(self.targets) > 0, "lora.targets is empty; the usual ones are q k v out gate up down")


@dataclass(frozen=True)
class PreferenceConfig:
    """How a policy learns from pairs of answers without a reward model."""

    loss: Literal["dpo", "ipo", "simpo"] = "dpo"
    """DPO (Rafailov et al. 2023), IPO (Azar et al. 2023), or SimPO (Meng et al. 2024), which needs no reference."""
    beta: float = 0.1
    """How strongly the policy is held to its reference; of simpo the scale of the mean log-probability, usually 2."""
    margin: float = 0.5
    """By how much simpo's chosen answer is to lead, over beta."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round (of dpo)."""

    def __post_init__(self):
        require_types("preference.", self)
        require(0 < self.beta < math.inf, f"preference.beta is {self.beta:g}, but must be above 0; 0.1 is usual")
        require_range("preference.", self, 0, math.inf, "margin")
        require_range("preference.", self, 0, 0.499999, "label_smoothing")


@dataclass(frozen=True)
class RlConfig:
    """Reinforcement: what is answered, how answers are judged, and how far a policy may move at once."""

    reward: str = ""
    """Run of a reward model; or number, exact, json, regex:PATTERN, length:WORDS; or FILE.py:FUNCTION."""
    answers: int = 64
    """Answers that are drawn before the policy changes, over all prompts and devices."""
    answer_tokens: int = 64
    """Most tokens of an answer, that which ends it included."""
    temperature: float = 1.0
    """At which answers are drawn, and judged."""
    inner_epochs: int = 1
    """Times that each answer is learned from."""
    clip: float = 0.2
    """How far the ratio of new to old probability may leave 1 before its gradient is cut."""
    unfinished_penalty: float = 0.0
    """Taken from the reward of an answer that the model has not ended itself."""
    rollout_weights: Literal["full", "int8"] = "full"
    """int8: answers are drawn with rounded weights, which is a policy a little off the one that learns."""
    shuffle_rewards: bool = False
    """Give every answer the reward of another: a control, with which nothing can be learned."""

    def __post_init__(self):
        require_types("rl.", self)
        require_range("rl.", self, 1, math.inf, "answers", "answer_tokens", "inner_epochs")
        require_range("rl.", self, 0, math.inf, "unfinished_penalty")
        require_range("rl.", self, 0, 0.999999, "clip")
        require(
            0 < self.temperature < math.inf,
            f"rl.temperature is {self.temperature:g}, but must be above 0: without chance there is nothing to compare",
        )


@dataclass(frozen=True)
class PpoConfig:
    """Proximal policy optimization as InstructGPT has it (Ouyang et al. 2022; Schulman et al. 2017)."""

    kl_coefficient: float = 0.02
    """What each token's log-probability over the reference's costs in reward."""
    kl_target: float = 0.0
    """KL from the reference, in nats an answer, that the coefficient is steered to (Ziegler et al. 2019). 0: fixed."""
    kl_horizon_answers: float = 10_000.0
    """Answers over which the coefficient is steered."""
    discount: float = 1.0
    """Of later rewards, for each token."""
    gae_decay: float = 0.95
    """λ of generalized advantage estimation."""
    value_clip: float = 0.2
    """How far a value may move at once."""
    value_learning_rate: float = 9e-6
    """Peak learning rate of the critic, which has a network of its own."""
    critic_from: str = ""
    """Run that the critic starts from. Empty: the reward model, or the policy's start where there is none."""
    whiten_rewards: bool = False
    """Scale rewards to deviation 1 before advantages are made of them."""
    ema_decay: float = 0.992
    """Of the average of the policy over steps, which is what is evaluated and used. 0: the policy itself."""
    pretraining_path: tuple[str, ...] = ()
    """Text of which some is learned with the answers, against forgetting (ptx)."""
    pretraining_rows: int = 8
    """Rows of that text for each answer."""
    pretraining_coefficient: float = 27.8
    """Weight of its loss."""

    def __post_init__(self):
        if isinstance(self.pretraining_path, str):
            object.__setattr__(self, "pretraining_path", (self.pretraining_path,))
        require_types("ppo.", self)
        require_range(
            *("ppo.", self, 0, math.inf, "kl_coefficient", "kl_target", "value_clip", "value_learning_rate"),
            "pretraining_coefficient",
        )
        require_range("ppo.", self, 0, 1, "discount", "gae_decay")
        require_range("ppo.", self, 0, 0.999999, "ema_decay")
        require_range("ppo.", self, 1, math.inf, "kl_horizon_answers", "pretraining_rows")


@dataclass(frozen=True)
class GrpoConfig:
    """Group-relative policy optimization (Shao et al. 2024), with the corrections of those who came after."""

    group_size: int = 8
    """Answers to each prompt, which are compared with each other in place of a critic."""
    kl_coefficient: float = 0.0
    """Weight of the divergence from the reference in the loss; GRPO has 0.04, DAPO and Dr. GRPO none."""
    divide_by_deviation: bool = True
    """Advantages over the group's deviation. Off: Dr. GRPO (Liu et al. 2025), which shows that it favours the sure."""
    aggregate: Literal["answer", "token", "constant"] = "answer"
    """Mean over each answer (GRPO), over all tokens (DAPO), or sum over rl.answer_tokens (Dr. GRPO)."""
    clip_high: float = 0.0
    """How far the ratio may rise; DAPO (Yu et al. 2025) has 0.28. 0: as rl.clip."""
    dynamic_sampling: bool = False
    """Groups whose answers are all rewarded alike count for nothing, also not in means (DAPO)."""

    def __post_init__(self):
        require_types("grpo.", self)
        require_range("grpo.", self, 2, math.inf, "group_size")
        require_range("grpo.", self, 0, math.inf, "kl_coefficient", "clip_high")
