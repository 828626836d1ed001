"""A small trained run for the commands that read one."""

import shutil

import pytest
import tokenizers

from gptjax.config import Config, DataConfig, ModelConfig, TokenizerConfig, TrainingConfig
from gptjax.stages.train import train


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Two layers, four steps, on 200 lines of English and Chinese: the folder of the run."""
    folder = tmp_path_factory.mktemp("commands")
    text = "".join(f"The cat sat on mat {i}. 猫坐在垫子上。\n" for i in range(200))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    config = Config(
        model=ModelConfig(num_layers=2, model_dim=32, num_heads=4, context_length=32, positions="rope"),
        tokenizer=TokenizerConfig(vocab_size=320),
        data=DataConfig(path=(str(folder / "text.txt"),), prepared_dir=str(folder / "data")),
        training=TrainingConfig(steps=4, batch_size=8, eval_every_steps=2, sample_every_steps=0, sample_tokens=4),
        run_dir=str(folder / "run"),
    )
    train(config)
    return folder / "run"


@pytest.fixture
def losing_run(run, tmp_path):
    """The same run with a tokenizer that writes everything small, which no run of ours has."""
    folder = tmp_path / "losing"
    shutil.copytree(run, folder)
    backend = tokenizers.Tokenizer.from_file(str(run / "tokenizer.json"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.save(str(folder / "tokenizer.json"))
    return folder
