"""Direct preference optimization: `python train.py configs/dpo.py --model.init-from RUN --data.path FILE`.

Beta 0.1, batches of 64 pairs and 150 steps of warm-up are those of Rafailov et al. 2023 (appendix B); the warm-up is
shorter here, as the data are fewer. Their learning rate is 1e-6, for models of billions of parameters.
"""

from gptjax.config import CheckpointConfig, Config, DataConfig, OptimizerConfig, PreferenceConfig, TrainingConfig

config = Config(
    stage="dpo",
    preference=PreferenceConfig(loss="dpo", beta=0.1),
    data=DataConfig(path=(), suggestion="a file of ranked answers: .json, .jsonl or .parquet", validation_fraction=0.1),
    optimizer=OptimizerConfig(peak_learning_rate=5e-5, warmup_steps=10, weight_decay=0.0),
    training=TrainingConfig(
        steps=None,
        epochs=3,
        batch_size=64,
        log_every_steps=5,
        eval_every_steps=25,
        sample_every_steps=0,
        sample_prompt="What is the capital of France?",
    ),
    checkpoint=CheckpointConfig(every_steps=50),
)
