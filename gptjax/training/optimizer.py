"""The optimizer as an Optax chain, without its learning rate: the step multiplies that in."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from gptjax.config import OptimizerConfig
from gptjax.parametrization import STANDARD, Multipliers
from gptjax.training.muon import in_block, is_hidden_matrix, muon

DECAYED = ("w", "embedding", "positions", "head", "value_head")
"""Names of the parameters that weight decay pulls to zero: all but norms and biases, as GPT-3 does."""


def make_optimizer(config: OptimizerConfig, sizes: Multipliers = STANDARD) -> optax.GradientTransformation:
    """Clip by global norm, Adam (Kingma and Ba 2015), decoupled weight decay (Loshchilov and Hutter 2019).

    With `kind` muon, Muon takes Adam's place for the blocks' matrices.

    Args:
        sizes: what the model's size asks of each parameter, as `multipliers(config.model)` has it.

    The update is the descent direction's negative: subtract learning rate times it.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    scale = adam
    if config.kind == "muon":
        kinds = {"muon": muon(config.muon_momentum, config.muon_update_rms), "adamw": adam}
        scale = optax.partition(kinds, owners)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
    if sizes == STANDARD:
        return optax.chain(clip, scale, decay)
    rate = sizes.hidden_rate_muon if config.kind == "muon" else sizes.hidden_rate

    # Adam of c times the gradient is Adam with epsilon / c: each parameter gets its epsilon so.
    def epsilon(path: tuple) -> float:
        return 1 / (sizes.block_epsilon if in_block(path) else sizes.epsilon)

    def learning_rate(path: tuple) -> float:
        return rate if is_hidden_matrix(path) else 1.0

    # Decay comes last, as it is not scaled: its weight is divided by the rate that it would be multiplied with.
    return optax.chain(clip, _scale_by(epsilon), scale, _scale_by(learning_rate), decay)


def _scale_by(factor: Callable[[tuple], float]) -> optax.GradientTransformation:
    """Multiply each update by what its parameter's path says."""

    def scale(updates: Any, _: Any = None) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, update: factor(path) * update, updates)

    return optax.stateless(scale)


def owners(params: Any) -> Any:
    """Of each parameter the kind of optimizer that updates it where `kind` is muon: `muon` or `adamw`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if is_hidden_matrix(path) else "adamw", params)


def decay_mask(params: Any) -> Any:
    """Which parameters decay: by the last part of their name, and all of adapters, whose `b` is no bias."""

    def decays(path: tuple, _: Any) -> bool:
        return path[-1].key in DECAYED or "adapters" in [part.key for part in path]

    return jax.tree_util.tree_map_with_path(decays, params)
