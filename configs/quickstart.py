"""A few minutes on two CPU cores: a small GPT on the source code of Python's standard library."""

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
        model_dim=256,
        num_heads=4,
        context_length=128,
        norm="rmsnorm",
        positions="rope",
        feed_forward="relu2",
        qk_norm=True,
        bias=False,
    ),
    tokenizer=TokenizerConfig(vocab_size=4096),
    optimizer=OptimizerConfig(
        peak_learning_rate=3e-3, warmup_steps=50, final_learning_rate_fraction=0.0, weight_decay=0.1
    ),
    training=TrainingConfig(
        steps=600,
        batch_size=16,
        eval_every_steps=200,
        eval_sequences=256,
        sample_every_steps=200,
        sample_prompt="def ",
    ),
    checkpoint=CheckpointConfig(every_steps=200),
)
