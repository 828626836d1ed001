"""Five sizes that grow in depth and width, on the source code of Python's standard library, byte by byte, of which the
largest is predicted from the other four. Some half an hour on two CPU cores; ladder.py does better (docs/scaling.md).

Width grows with depth, 16 (depth + 1); µP keeps the learning rate, which configs/studies/transfer.py found. Every size
is trained once at a constant rate, and the four budgets' cooldowns branch off; no text is seen twice.
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
    question="What loss does the fifth size reach, said from the four below it?",
    base=Config(
        model=ModelConfig(
            num_layers=1,
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
        "depth1": {"model.num_layers": 1, "model.model_dim": 32, "model.num_heads": 2},
        "depth2": {"model.num_layers": 2, "model.model_dim": 48, "model.num_heads": 3},
        "depth3": {"model.num_layers": 3, "model.model_dim": 64, "model.num_heads": 4},
        "depth4": {"model.num_layers": 4, "model.model_dim": 80, "model.num_heads": 5},
        "depth5": {"model.num_layers": 5, "model.model_dim": 96, "model.num_heads": 6},
    },
    tokens=(1_375_000, 2_750_000, 5_500_000, 11_000_000),
    predict=("depth5",),
    branch_cooldowns=True,
)
