"""PPO: `python train.py configs/ppo.py --model.init-from RUN --rl.reward REWARD --data.path FILE`.

InstructGPT's settings (Ouyang et al. 2022, appendix C.4): KL coefficient 0.02, clip 0.2, no discount, one inner epoch,
constant rate after 10 iterations of warm-up, an average over steps with decay 0.992, and, with --ppo.pretraining-path
TEXT, eight rows of text for each answer at coefficient 27.8. An iteration there has 512 answers in minibatches of 64;
here a quarter of them, for small machines. The rates are for small models; theirs is 5e-6 to 1e-5 for 1.3 billion
parameters.
"""

from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardConfig,
    OptimizerConfig,
    PpoConfig,
    RlConfig,
    TrainingConfig,
)

config = Config(
    stage="ppo",
    rl=RlConfig(answers=128, answer_tokens=64),
    ppo=PpoConfig(value_learning_rate=3e-4),
    data=DataConfig(path=(), suggestion="a file of prompts: .json, .jsonl or .parquet", validation_fraction=0.1),
    optimizer=OptimizerConfig(peak_learning_rate=1e-4, schedule="constant", warmup_steps=20, weight_decay=0.0),
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
