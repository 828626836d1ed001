"""What the next model will reach, said before it is trained: five widths on the source code of Python's standard
library, byte by byte, of which the largest is predicted from the other four. Some twenty minutes on two CPU cores.

All have three layers, so that µP keeps everything but the width as it is, and the learning rate is the one that
configs/studies/transfer.py found. Every width is trained once at a constant rate, and the three budgets' cooldowns
branch off; no text is seen twice, and the largest model sees two tokens a parameter at least.
"""

from gptjax.config import (
    CheckpointConfig,
    Config,
    GuardConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from gptjax.scaling.study import Study

study = Study(
    question="What loss does the fifth width reach, said from the four below it?",
    base=Config(
        model=ModelConfig(
            num_layers=3,
            num_heads=2,
            model_dim=32,
            context_length=128,
            norm="rmsnorm",
            positions="rope",
            feed_forward="relu2",
            bias=False,
            parametrization="mup",
            base_model_dim=256,
            base_head_dim=16,
        ),
        tokenizer=TokenizerConfig(kind="byte"),
        optimizer=OptimizerConfig(peak_learning_rate=0.002, schedule="wsd", warmup_steps=40, wsd_decay_fraction=0.2),
        training=TrainingConfig(
            batch_size=32,
            log_every_steps=100,
            eval_every_steps=0,
            eval_sequences=1024,
            sample_every_steps=0,
            sample_prompt="def ",
            sample_tokens=64,
        ),
        guard=GuardConfig(spike_sigmas=0.0),
        checkpoint=CheckpointConfig(every_steps=0, keep_newest=1),
    ),
    sizes={
        "width32": {"model.model_dim": 32, "model.num_heads": 2},
        "width48": {"model.model_dim": 48, "model.num_heads": 3},
        "width64": {"model.model_dim": 64, "model.num_heads": 4},
        "width96": {"model.model_dim": 96, "model.num_heads": 6},
        "width128": {"model.model_dim": 128, "model.num_heads": 8},
    },
    tokens=(1_375_000, 2_750_000, 5_500_000),
    predict=("width128",),
    branch_cooldowns=True,
)
