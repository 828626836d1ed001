"""Whether the best learning rate of a narrow model is that of a wide one: standard parametrization and µP, eight times
in width, on the source code of Python's standard library. Some twenty minutes on two CPU cores."""

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
    question="Does the best learning rate stay where it is when a model gets eight times as wide?",
    base=Config(
        model=ModelConfig(
            num_layers=2,
            num_heads=1,
            model_dim=32,
            context_length=128,
            norm="rmsnorm",
            positions="rope",
            feed_forward="relu2",
            bias=False,
            base_model_dim=256,
            base_head_dim=32,
        ),
        tokenizer=TokenizerConfig(vocab_size=1024),
        optimizer=OptimizerConfig(schedule="linear", warmup_steps=25, final_learning_rate_fraction=0.0),
        training=TrainingConfig(
            batch_size=16,
            log_every_steps=50,
            eval_every_steps=0,
            eval_sequences=512,
            sample_every_steps=0,
            sample_prompt="def ",
            sample_tokens=1,
        ),
        guard=GuardConfig(spike_sigmas=0.0),
        checkpoint=CheckpointConfig(every_steps=0, keep_newest=1),
    ),
    sizes={
        "width32": {"model.model_dim": 32, "model.num_heads": 1},
        "width64": {"model.model_dim": 64, "model.num_heads": 2},
        "width128": {"model.model_dim": 128, "model.num_heads": 4},
        "width256": {"model.model_dim": 256, "model.num_heads": 8},
    },
    grid={
        "model.parametrization": ("standard", "mup"),
        "optimizer.peak_learning_rate": (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
    },
    tokens=(524_288,),
)
