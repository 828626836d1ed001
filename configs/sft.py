"""Supervised fine-tuning: `python train.py configs/sft.py --model.init-from RUN --data.path FILE`.

InstructGPT's settings (Ouyang et al. 2022, appendix C): 16 epochs, residual dropout 0.2, cosine to a tenth, no warm-up,
32 rows a batch. Its learning rate, 9.65e-6 for 1.3 billion parameters, is not: the model that the quickstart trains is
a thousand times smaller, and learns best with a hundred times more.
"""

from gptjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

config = Config(
    stage="sft",
    model=ModelConfig(residual_dropout=0.2),
    data=DataConfig(path=(), suggestion="a file of conversations: .json, .jsonl or .parquet"),
    optimizer=OptimizerConfig(peak_learning_rate=1e-3),
    training=TrainingConfig(
        steps=None,
        epochs=16,
        batch_size=32,
        log_every_steps=10,
        eval_every_steps=100,
        sample_every_steps=100,
        sample_prompt="What is the capital of France?",
    ),
    checkpoint=CheckpointConfig(every_steps=100),
)
