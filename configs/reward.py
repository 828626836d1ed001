"""A reward model: `python train.py configs/reward.py --model.init-from RUN --data.path FILE`.

InstructGPT's settings (Ouyang et al. 2022, appendix C): one epoch, for more of them overfit, batches of 64 prompts,
cosine to a tenth. Its learning rate is 9e-6 for 6 billion parameters; the run that this starts from wants its own.
"""

from gptjax.config import CheckpointConfig, Config, DataConfig, OptimizerConfig, TrainingConfig

config = Config(
    stage="reward",
    data=DataConfig(path=(), suggestion="a file of ranked answers: .json, .jsonl or .parquet", validation_fraction=0.1),
    optimizer=OptimizerConfig(peak_learning_rate=3e-4, weight_decay=0.0),
    training=TrainingConfig(
        steps=None,
        epochs=1,
        batch_size=64,
        log_every_steps=5,
        eval_every_steps=50,
    ),
    checkpoint=CheckpointConfig(every_steps=50),
)
