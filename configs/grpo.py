"""Group-relative policy optimization: `python train.py configs/grpo.py --model.init-from RUN --data.path FILE`.

With the corrections of Dr. GRPO and DAPO: no division by the group's deviation, all tokens alike, a wider bound above,
groups that agree left out, no reference. As in DeepSeekMath (Shao et al. 2024) each answer is learned from once.
"""

from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GrpoConfig,
    GuardConfig,
    OptimizerConfig,
    RlConfig,
    TrainingConfig,
)

config = Config(
    stage="grpo",
    rl=RlConfig(reward="number", answers=128, answer_tokens=64),
    grpo=GrpoConfig(group_size=8, divide_by_deviation=False, aggregate="token", clip_high=0.28, dynamic_sampling=True),
    data=DataConfig(path=(), suggestion="a file of prompts: .json, .jsonl or .parquet", validation_fraction=0.1),
    optimizer=OptimizerConfig(peak_learning_rate=1e-4, schedule="constant", warmup_steps=10, weight_decay=0.0),
    training=TrainingConfig(
        steps=200,
        batch_size=64,
        log_every_steps=2,
        eval_every_steps=20,
        sample_every_steps=100,
    ),
    guard=GuardConfig(spike_sigmas=0.0),  # a loss of advantages has no usual size
    checkpoint=CheckpointConfig(every_steps=50),
)
