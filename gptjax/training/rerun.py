"""The same step twice: a device that computes wrong now and then says nothing, but does not do it twice alike."""

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.training.state import TrainState
from gptjax.training.step import Metrics, TrainStep


def run_twice(train_step: TrainStep, state: TrainState, *arguments: Any) -> tuple[TrainState, Metrics, list[str]]:
    """What `train_step` gives, and the arrays of the state that it gave otherwise before, on a copy of the same state.

    Both times the very same program runs, so where it is deterministic (on GPUs: `training.deterministic`) a difference
    of one bit is a fault of the machine, and one of the two results is wrong. It takes room for a second state, and
    waits for the device.
    """
    other, _ = train_step(_copy(state), *arguments)
    state, metrics = train_step(state, *arguments)
    same = jax.device_get(_identical(state, other))
    leaves = jax.tree_util.tree_flatten_with_path(same)[0]
    differing = [jax.tree_util.keystr(path, simple=True, separator=".") for path, equal in leaves if not equal]
    return state, metrics, differing


@jax.jit
def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


@jax.jit
def _identical(one: TrainState, other: TrainState) -> Any:
    """For each leaf whether all bits agree: NaN equals itself, and 0 is not -0."""

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)

    return jax.tree.map(lambda x, y: (bits(x) == bits(y)).all(), one, other)
