"""The coordinate check (Yang et al. 2022, appendix D.1): whether training moves models of all sizes alike.

After a few steps at the same learning rate, the mean size of what has changed in the residual stream and in the logits
should be the same at every width (and, under CompleteP, at every depth): a slope of 0 in logarithms. In the standard
parametrization it grows with the width, and with it what a learning rate does.

Shape suffixes: K steps, A micro-batches, B sequences, T tokens, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checks import require
from gptjax.config import ModelConfig, OptimizerConfig
from gptjax.model.gpt import GPT, Params
from gptjax.model.trace import Stream
from gptjax.parametrization import multipliers
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import init_state
from gptjax.training.step import make_train_step

Axis = Literal["width", "depth"]


class Coordinate(NamedTuple):
    """How large something was, at one place of one model."""

    parametrization: str
    axis: Axis
    size: int
    """Width or depth, as `axis` says."""
    seed: int
    step: int
    """Steps of training before; 0: at the start."""
    place: str
    """`embedding`, `first block`, `middle block`, `last block` (the residual stream after them) or `logits`. Over
    depths there is no first block: what a single one adds is to fall as they get more."""
    magnitude: float
    """Mean absolute value of its elements."""
    change: float
    """The same of what has changed since the start."""


def resized(config: ModelConfig, axis: Axis, size: int) -> ModelConfig:
    """This model at another width, with as many more heads of the same size, or at another depth.

    Raises:
        UserError: heads do not divide the width.
    """
    if axis == "depth":
        return dataclasses.replace(config, num_layers=size)
    head_dim, shared = config.resolved_head_dim, config.num_heads // config.resolved_num_kv_heads
    unit = head_dim * shared
    require(
        size % unit == 0,
        f"width {size} is no multiple of {unit}: {shared} heads of head_dim {head_dim} share keys and values; "
        f"the nearest that is one is {max(1, round(size / unit)) * unit}",
    )
    heads = size // head_dim
    ffn_dim = None if config.ffn_dim is None else config.ffn_dim * size // config.model_dim
    return dataclasses.replace(
        config, model_dim=size, num_heads=heads, num_kv_heads=heads // shared, head_dim=head_dim, ffn_dim=ffn_dim
    )


def coordinates(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    rows_BT: np.ndarray,
    axis: Axis,
    sizes: Sequence[int],
    *,
    steps: int = 8,
    seeds: Sequence[int] = (0, 1),
) -> Iterator[Coordinate]:
    """Train the model at each size for a few steps on these rows, at the peak learning rate, and look at it.

    Args:
        config: its vocabulary is known; `axis` says what of it is changed.
        rows_BT: (B, T + 1) token ids; every step sees all of them.

    Raises:
        UserError: as `resized`.
    """
    for size in sizes:
        model_config = dataclasses.replace(resized(config, axis, size), compute_dtype="float32")
        model, update = GPT(model_config), make_optimizer(optimizer, multipliers(model_config))
        train_step = make_train_step(language_model_loss(model), update, dropout_seed=None, accumulates=False)
        look = jax.jit(lambda params, config=model_config: _look(config, params, jnp.asarray(rows_BT[:, :-1])))
        batch = {"tokens": jnp.asarray(rows_BT[None, None])}
        rate_K, micro_K = np.full(1, optimizer.peak_learning_rate, np.float32), np.ones(1, np.int32)
        for seed in seeds:
            state = init_state(model, update, seed)
            start = look(state.params)
            for step in range(steps + 1):
                if step:
                    state, _ = train_step(state, batch, micro_K, rate_K, 1)
                for place, now in (start if step == 0 else look(state.params)).items():
                    if axis == "depth" and place == "first block":
                        continue
                    magnitude, change = jnp.abs(now).mean(), jnp.abs(now - start[place]).mean()
                    yield Coordinate(
                        model_config.parametrization, axis, size, seed, step, place, float(magnitude), float(change)
                    )


def _look(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    stream = Stream(config).apply({"params": params}, tokens_BT)
    logits_BTV, _ = GPT(config).apply({"params": params}, tokens_BT)
    layers = config.num_layers
    return {
        "embedding": stream[0],
        "first block": stream[1],
        "middle block": stream[(layers + 1) // 2],
        "last block": stream[layers],
        "logits": logits_BTV[:, :, : config.vocab_size],
    }


def slopes(found: Sequence[Coordinate], step: int) -> dict[str, float]:
    """Of each place: the slope of log change over log size, by least squares over sizes and seeds."""
    result = {}
    for place in dict.fromkeys(record.place for record in found):
        points = [(record.size, record.change) for record in found if record.place == place and record.step == step]
        size, change = np.log(np.array(points)).T
        result[place] = float(np.polyfit(size, change, 1)[0])
    return result
