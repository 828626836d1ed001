"""What evaluations cost beside the training that they are made in, of every configuration that ships with gptjax."""

from pathlib import Path

import pytest

from gptjax.config_files import load_config
from gptjax.recipe import load_recipe
from gptjax.resolve import evaluation_sequences
from gptjax.scaling.depth import of_depth
from gptjax.scaling.study import load_study
from gptjax.stages import iterations
from gptjax.training.schedule import Progress, batch_size, final_progress

WHOLE = {"quickstart", "shakespeare_char_cpu", "shakespeare_char_gpu", "shakespeare_speedrun"}
"""They read all that is held out: of texts that are small, and known."""
FOLDER = Path(__file__).parent.parent / "configs"
RECIPE = FOLDER / "recipe_tiny.py"
EVERY_RUN = {path.stem: load_config(path) for path in sorted(FOLDER.glob("*.py")) if path != RECIPE}
EVERY_RUN |= {f"recipe_tiny: {name}": config for name, config in load_recipe(RECIPE).runs.items()}
EVERY_RUN |= {f"study {path.stem}": load_study(path).base for path in (FOLDER / "studies").glob("*.py")}
EVERY_RUN |= {f"depth {depth}": of_depth(depth) for depth in (1, 2, 4, 8, 12, 20, 32, 64)}


@pytest.mark.parametrize("name", EVERY_RUN)
def test_an_evaluation_costs_little(name):
    """Of the training since the last one 6 % at most, a forward pass being a third of a step, and its filled-up last
    micro-batch counted; or no more than 64 sequences, or, if they are more, a micro-batch."""
    config = EVERY_RUN[name]
    config = iterations.configure(config) if config.stage in ("ppo", "grpo") else config
    training, progress = config.training, Progress()
    number, micro = evaluation_sequences(training), training.resolved_micro_batch_size
    if name in WHOLE:
        assert number == 0
        return
    assert number > 0
    if training.eval_every_steps == 0 and name.startswith("study "):
        return  # a number that the study's file says, once a run
    steps = min(training.eval_every_steps, training.steps or training.eval_every_steps)
    while progress.step < steps:
        progress = progress.advance(batch_size(training, progress), config.sequence_length)
    read = -(-number // micro) * micro
    assert read / (3 * progress.sequences) <= 0.06 or read <= max(64, micro)


WEB = [name for name, config in EVERY_RUN.items() if "fineweb" in config.data.suggestion]


def test_which_presets_are_for_the_web():
    families = ("gpt1", "gpt2", "gpt3", "modern", "muon", "depth ")
    assert set(WEB) == {name for name in EVERY_RUN if name.startswith(families)}


@pytest.mark.parametrize("name", WEB)
def test_all_that_is_there_is_trained_on(name):
    """Of the tokens that a run trains on nearly none are held out, and still enough to tell the loss."""
    config = EVERY_RUN[name]
    assert config.data.validation_fraction <= 0.002
    held_out = config.data.validation_fraction * final_progress(config.training, config.sequence_length).tokens
    read = min(held_out, evaluation_sequences(config.training) * config.sequence_length)
    assert read >= (250_000 if name not in ("depth 1", "depth 2") else 80_000)
