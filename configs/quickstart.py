"""A few minutes on two CPU cores: a small GPT on the source code of Python's standard library.

Narrow, with a short context and a small batch, because in so little time more steps teach more than more width.
"""

from gptjax.config import (
    CheckpointConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
)

config = Config(
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
        steps=1200,
        batch_size=8,
        log_every_steps=20,
        eval_every_steps=400,
        eval_sequences=0,  # all: the loss that the README names
        sample_every_steps=400,
        sample_prompt="def __init__(self",
    ),
    checkpoint=CheckpointConfig(every_steps=200),
)
