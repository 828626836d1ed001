"""Shakespeare on characters to a validation loss below 1.88, as fast as two CPU cores can: `--data.path FILE`.

The size of nanoGPT's README setting for CPUs, with Muon, rotary positions and squared ReLU: 240 steps in place of
2,000. So few ask for a short memory: a momentum of 0.95 ends higher. benchmarks/speedrun.py measures loss and time.
"""

from gptjax.config import (
    CheckpointConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from gptjax.presets import SHAKESPEARE

config = Config(
    model=ModelConfig(
        num_layers=4,
        model_dim=128,
        num_heads=4,
        context_length=64,
        norm="rmsnorm",
        positions="rope",
        feed_forward="relu2",
        qk_norm=True,
        bias=False,
    ),
    tokenizer=TokenizerConfig(kind="char"),
    data=SHAKESPEARE,
    optimizer=OptimizerConfig(
        kind="muon",
        peak_learning_rate=0.01,
        muon_momentum=0.8,
        schedule="linear",
        warmup_steps=20,
        final_learning_rate_fraction=0.0,
    ),
    training=TrainingConfig(
        steps=240, batch_size=12, log_every_steps=50, eval_every_steps=0, eval_sequences=0, sample_every_steps=0
    ),
    checkpoint=CheckpointConfig(every_steps=0),
)
