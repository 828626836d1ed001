"""AdamW as an Optax chain, without its learning rate: the step multiplies that in."""

from typing import Any

import jax
import optax

from gptjax.config import OptimizerConfig

DECAYED = ("w", "embedding", "positions", "head")
"""Names of the parameters that weight decay pulls to zero: all but norms and biases, as GPT-3 does."""


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam (Kingma and Ba 2015), decoupled weight decay (Loshchilov and Hutter 2019).

    The update is the descent direction's negative: subtract learning rate times it.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def decay_mask(params: Any) -> Any:
    """Which parameters decay, by the last part of their name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
