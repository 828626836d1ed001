"""What a step carries: parameters, optimizer state, the step's number, and what the next step is judged by."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.model import lora
from gptjax.model.gpt import GPT, VALUE_HEAD, Params
from gptjax.parallel import sharding
from gptjax.training.guard import Guard, init_guard
from gptjax.tuning_config import LoraConfig


class TrainState(NamedTuple):
    """A pytree; every leaf lives in its shards from the start."""

    step: jax.Array
    params: Params
    optimizer: Any
    guard: Guard
    extra: Any = ()
    """What a stage keeps beside: an average of the parameters, say."""


def init_params(model: GPT, key: jax.Array) -> Params:
    """Initial parameters, drawn straight into their shards; jitted by the caller or not."""
    # Shapes do not depend on the tokens. One for each shard of a batch is the least that can be laid out.
    shape = (sharding.num_shards("batch"), sharding.num_shards("sequence"))
    tokens_BT = sharding.reshard(jnp.zeros(shape, jnp.int32), "batch", "sequence")
    return model.init(key, tokens_BT)["params"]


def draw_trained(model: GPT, adapt: LoraConfig, key: jax.Array) -> Params:
    """What is trained of a model: all of its parameters, or `adapters` and the value head, where it has one."""
    params = init_params(model, key)
    if not adapt.rank:
        return params
    heads = {name: params[name] for name in VALUE_HEAD if name in params}
    return heads | {"adapters": lora.draw_adapters(params["blocks"], adapt, key)}


def draw_params(model: GPT, seed: int, names: Sequence[str] | None = None) -> Params:
    """Initial parameters under the current mesh.

    Args:
        names: of those that are kept, out of the tree's first level; memory holds no others. None: all.
    """

    def draw(key: jax.Array) -> Params:
        params = init_params(model, key)
        return params if names is None else {name: params[name] for name in names}

    return jax.jit(draw)(jax.random.key(seed))


def state_of(
    params: Params, optimizer: optax.GradientTransformation, extra_of: Callable[[Params], Any] = lambda params: ()
) -> TrainState:
    """The state of a run that begins with these parameters, which it takes over.

    Args:
        extra_of: what the stage keeps beside them.
    """
    return jax.jit(functools.partial(_state_of, optimizer=optimizer, extra_of=extra_of), donate_argnums=0)(params)


def init_state(model: GPT, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state under the current mesh."""
    return jax.jit(functools.partial(_new_state, model, optimizer))(jax.random.key(seed))


def abstract_params(model: GPT) -> Params:
    """Shapes, types and shardings of the parameters under the current mesh, without allocating them."""
    return _concrete(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


def abstract_state(model: GPT, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, types and shardings of a state under the current mesh, without allocating it: what a restore fills."""
    return abstract(functools.partial(_new_state, model, optimizer))


def abstract(draw: Callable[[jax.Array], Any]) -> Any:
    """The same of whatever a function makes of a random key."""
    return _concrete(jax.eval_shape(lambda: draw(jax.random.key(0))))  # no key on devices that may not be here


def _new_state(model: GPT, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    return _state_of(init_params(model, key), optimizer)


def _state_of(
    params: Params, optimizer: optax.GradientTransformation, extra_of: Callable[[Params], Any] = lambda params: ()
) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), init_guard(), extra_of(params))


def _concrete(shapes: Any) -> Any:
    """The shardings over the mesh's devices; `eval_shape` gives them over its names alone, and none to scalars."""
    if not sharding.has_mesh():
        return shapes
    mesh = jax.sharding.get_mesh()

    def concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(concrete, shapes)
