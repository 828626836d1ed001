"""From text to a tuned model on two CPU cores: `python -m gptjax recipe configs/recipe_tiny.py`.

Pretraining on the source code of Python's standard library, then on made conversations the three steps of InstructGPT
(demonstrations, a reward model from ranked answers, PPO against it with pretraining text mixed in), and DPO on the same
ranked answers beside them.
"""

from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    PreferenceConfig,
    RlConfig,
    TokenizerConfig,
    TrainingConfig,
)
from gptjax.recipe import Recipe

QUESTION = "Write lambda in capitals."

pretrain = Config(
    model=ModelConfig(
        num_layers=4,
        model_dim=128,
        num_heads=2,
        context_length=128,
        norm="rmsnorm",
        positions="rope",
        feed_forward="relu2",
        qk_norm=True,
        bias=False,
    ),
    tokenizer=TokenizerConfig(vocab_size=4096),
    optimizer=OptimizerConfig(
        peak_learning_rate=4e-3, schedule="linear", warmup_steps=50, final_learning_rate_fraction=0.0
    ),
    training=TrainingConfig(
        steps=1200, batch_size=8, log_every_steps=50, eval_every_steps=400, sample_every_steps=0, sample_prompt="def "
    ),
    checkpoint=CheckpointConfig(every_steps=200),
)

sft = Config(
    stage="sft",
    model=ModelConfig(init_from="pretrain", residual_dropout=0.1),
    data=DataConfig(path="made://conversations"),
    optimizer=OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=20),
    training=TrainingConfig(
        steps=None,
        epochs=6,
        batch_size=16,
        log_every_steps=25,
        eval_every_steps=100,
        sample_every_steps=200,
        sample_prompt=QUESTION,
        sample_tokens=40,
    ),
    checkpoint=CheckpointConfig(every_steps=100),
)

reward = Config(
    stage="reward",
    model=ModelConfig(init_from="sft"),
    data=DataConfig(path="made://preferences", validation_fraction=0.1),
    optimizer=OptimizerConfig(peak_learning_rate=5e-4, weight_decay=0.0, warmup_steps=10),
    training=TrainingConfig(steps=None, epochs=3, batch_size=32, log_every_steps=10, eval_every_steps=50),
    checkpoint=CheckpointConfig(every_steps=50),
)

dpo = Config(
    stage="dpo",
    model=ModelConfig(init_from="sft"),
    preference=PreferenceConfig(beta=0.1),
    data=DataConfig(path="made://preferences", validation_fraction=0.1),
    optimizer=OptimizerConfig(peak_learning_rate=1e-4, weight_decay=0.0, warmup_steps=10),
    training=TrainingConfig(
        steps=120,
        batch_size=32,
        log_every_steps=10,
        eval_every_steps=40,
        sample_every_steps=0,
        sample_prompt=QUESTION,
        sample_tokens=40,
    ),
    checkpoint=CheckpointConfig(every_steps=40),
)

ppo = Config(
    stage="ppo",
    model=ModelConfig(init_from="sft"),
    rl=RlConfig(reward="reward", answers=128, answer_tokens=32, unfinished_penalty=1.0),
    ppo=PpoConfig(
        kl_coefficient=0.3,  # the reward model is small, and easily fooled by who goes far from what it has seen
        value_learning_rate=1e-3,
        ema_decay=0.95,
        pretraining_path=("stdlib://",),
        pretraining_rows=1,
        pretraining_coefficient=0.1,
    ),
    data=DataConfig(path="made://preferences", validation_fraction=0.1),
    optimizer=OptimizerConfig(peak_learning_rate=1e-4, schedule="constant", warmup_steps=10, weight_decay=0.0),
    training=TrainingConfig(
        steps=160,
        batch_size=64,
        log_every_steps=4,
        eval_every_steps=40,
        sample_every_steps=80,
    ),
    guard=GuardConfig(spike_sigmas=0.0),  # a loss of advantages has no usual size
    checkpoint=CheckpointConfig(every_steps=40),
)

recipe = Recipe({"pretrain": pretrain, "sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo})
