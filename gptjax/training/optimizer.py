"""The optimizer as an Optax chain, without its learning rate: the step multiplies that in."""

from typing import Any

import jax
import optax

from gptjax.config import OptimizerConfig
from gptjax.training.muon import is_hidden_matrix, muon

DECAYED = ("w", "embedding", "positions", "head")
"""Names of the parameters that weight decay pulls to zero: all but norms and biases, as GPT-3 does."""


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam (Kingma and Ba 2015), decoupled weight decay (Loshchilov and Hutter 2019).

    With `kind` muon, Muon takes Adam's place for the blocks' matrices.

    The update is the descent direction's negative: subtract learning rate times it.
    """
    scale = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.kind == "muon":
        kinds = {"muon": muon(config.muon_momentum, config.muon_update_rms), "adamw": scale}
        scale = optax.partition(kinds, owners)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def owners(params: Any) -> Any:
    """Of each parameter the kind of optimizer that updates it where `kind` is muon: `muon` or `adamw`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if is_hidden_matrix(path) else "adamw", params)


def decay_mask(params: Any) -> Any:
    """Which parameters decay, by the last part of their name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
