"""One number for a whole model: `train.py --depth N`. Only the standard library is imported."""

import dataclasses

from gptjax.checks import require
from gptjax.config import Config
from gptjax.model.accounting import parameter_counts
from gptjax.presets import TOKENS_PER_PARAMETER, Shape, modern_of_shape
from gptjax.scaling.laws import STEP_LAW, counted_parameters, short
from gptjax.scaling.study import with_vocabulary
from gptjax.training.schedule import final_progress

WIDTH_PER_LAYER = 64
"""The ratio of nanochat's dial, between GPT-3's 64 (125M, 12 layers of 768) and 128 (175B, 96 of 12,288)."""
HEAD_DIM = 64
WIDE_HEAD_DIM = 128
"""From a width of 1024 on: half as many heads, which tensor cores like better."""

MAX_LEARNING_RATE = 0.01
"""The law gives more for models that are far smaller than those it was measured with."""


def of_depth(depth: int) -> Config:
    """A modern model of this many layers with everything that goes with it: width, heads, tokens, batch, rate.

    Raises:
        UserError: the depth is not at least 1.
    """
    require(depth >= 1, f"depth is {depth}, but must be at least 1")
    width = WIDTH_PER_LAYER * depth
    head_dim = WIDE_HEAD_DIM if width >= 1024 and width % WIDE_HEAD_DIM == 0 else HEAD_DIM
    config = modern_of_shape(Shape(depth, width, width // head_dim))
    rate = min(config.optimizer.peak_learning_rate, MAX_LEARNING_RATE)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, peak_learning_rate=rate))


def explain(config: Config) -> list[str]:
    """What the dial has set, by which law, with a warning where the law is extrapolated."""
    model = with_vocabulary(config)
    tokens = final_progress(config.training, config.sequence_length).tokens
    matrices = counted_parameters(model, STEP_LAW.counts)
    lines = [
        f"shape: {model.num_layers} layers of width {model.model_dim} = {WIDTH_PER_LAYER} × layers, {model.num_heads} "
        f"heads of {model.resolved_head_dim}: {short(parameter_counts(model)['total'])} parameters",
        f"tokens: {short(tokens)}, {TOKENS_PER_PARAMETER} for each parameter that a token is multiplied with (Hoffmann "
        "et al. 2022)",
        f"learning rate {config.optimizer.peak_learning_rate:g} and batch of {config.training.batch_size} × "
        f"{config.sequence_length} tokens, to the nearest power of two: {STEP_LAW.name} ({STEP_LAW.source})",
    ]
    if config.optimizer.peak_learning_rate == MAX_LEARNING_RATE:
        lines.append(f"learning rate: {STEP_LAW.name} gives more, but no more than {MAX_LEARNING_RATE} is taken")
    warning = STEP_LAW.outside(matrices, tokens)
    return [*lines, f"warning: {warning}"] if warning else lines
