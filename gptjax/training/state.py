"""What a step carries: parameters, optimizer state, the step's number, and what the next step is judged by."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.model.gpt import GPT, Params
from gptjax.parallel import sharding
from gptjax.training.guard import Guard, init_guard


class TrainState(NamedTuple):
    """A pytree; every leaf lives in its shards from the start."""

    step: jax.Array
    params: Params
    optimizer: Any
    guard: Guard


def init_params(model: GPT, key: jax.Array) -> Params:
    """Initial parameters, drawn straight into their shards; jitted by the caller or not."""
    # Shapes do not depend on the tokens. One for each shard of a batch is the least that can be laid out.
    shape = (sharding.num_shards("batch"), sharding.num_shards("sequence"))
    tokens_BT = sharding.reshard(jnp.zeros(shape, jnp.int32), "batch", "sequence")
    return model.init(key, tokens_BT)["params"]


def init_state(model: GPT, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state under the current mesh."""
    return jax.jit(functools.partial(_new_state, model, optimizer))(jax.random.key(seed))


def abstract_params(model: GPT) -> Params:
    """Shapes, types and shardings of the parameters under the current mesh, without allocating them."""
    return _concrete(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


def abstract_state(model: GPT, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, types and shardings of a state under the current mesh, without allocating it: what a restore fills."""
    return _concrete(jax.eval_shape(functools.partial(_new_state, model, optimizer), jax.random.key(0)))


def _new_state(model: GPT, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = init_params(model, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), init_guard())


def _concrete(shapes: Any) -> Any:
    """The shardings over the mesh's devices; `eval_shape` gives them over its names alone, and none to scalars."""
    if not sharding.has_mesh():
        return shapes
    mesh = jax.sharding.get_mesh()

    def concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(concrete, shapes)
