"""The train step: one compiled function, whatever the stage.

Shape suffixes: K steps of a dispatch, A accumulated micro-batches, B sequences of a micro-batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.model.gpt import Params
from gptjax.training.guard import judge
from gptjax.training.losses import Batch, Loss
from gptjax.training.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch, jax.Array, jax.Array, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    dropout_seed: int | None,
    accumulates: bool,
    steps_per_dispatch: int = 1,
    spike_sigmas: float = 0.0,
    after: Callable[[Any, Params, Metrics], Any] | None = None,
    frozen: Params | None = None,
) -> TrainStep:
    """Compile `train_step(state, batch, num_micro_K, learning_rate_K, num_steps) -> (state, metrics)`.

    The state is donated. `batch` leaves are (K, A, B, ...); step k uses the first `num_micro_K[k]`
    micro-batches. All counts are traced, so that a growing batch and a dispatch cut short by an interval
    run the same program. Metrics are (K,) arrays: `loss` (nats a token, without z-loss), `grad_norm`
    (before clipping), `weight` (predicted tokens), `skipped` (steps so far that changed nothing),
    `skipped_in_a_row` (those since the last that did) and what else the loss sums up.

    Args:
        loss: as described in `losses.py`.
        optimizer: as `make_optimizer` gives it.
        dropout_seed: seed of the dropout; None: no dropout.
        accumulates: whether a step may have more than one micro-batch.
        steps_per_dispatch: K.
        spike_sigmas: as `judge` takes it: a step that it skips leaves parameters and optimizer state as they are.
        frozen: parameters that are not trained: the loss gets them beside those that are, as `(params, frozen)`.
        after: what becomes of `state.extra` in a step that counts, from it, the new parameters and the loss's means.
    """

    def gradients(params: Params, held: Params, batch: Batch, num_micro: jax.Array, key: jax.Array | None):
        def loss_of(params: Params, micro: Batch, key: jax.Array | None):
            return loss(params if held is None else (params, held), micro, key)

        def one(index: jax.Array | int) -> tuple[Params, Metrics]:
            micro = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch)
            micro_key = None if key is None else jax.random.fold_in(key, index)
            return jax.grad(loss_of, has_aux=True)(params, micro, micro_key)

        if not accumulates:
            return one(0)

        def add(index: jax.Array, total: tuple[Params, Metrics]) -> tuple[Params, Metrics]:
            return jax.tree.map(jnp.add, total, one(index))

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x), jax.eval_shape(one, 0))
        return jax.lax.fori_loop(0, num_micro, add, zeros)

    def step(state: TrainState, held: Params, batch: Batch, num_micro: jax.Array, learning_rate: jax.Array):
        key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state.step)
        grads, sums = gradients(state.params, held, batch, num_micro, key)
        weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)  # a batch without labels has no gradient
        grads = jax.tree.map(lambda g: g / weight, grads)
        means = {name: total / weight for name, total in sums.items() if name != "weight"}
        loss, grad_norm = means["loss"], optax.tree.norm(grads)
        counts, guard = judge(state.guard, loss, grad_norm, spike_sigmas)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: jnp.where(counts, p - learning_rate * u, p), state.params, updates)
        optimizer_state = jax.tree.map(lambda new, old: jnp.where(counts, new, old), optimizer_state, state.optimizer)
        metrics = means | {
            "grad_norm": grad_norm,
            "weight": sums["weight"],
            "skipped": guard.skipped,
            "skipped_in_a_row": guard.in_a_row,
        }
        extra = state.extra
        if after is not None:
            extra = jax.tree.map(lambda new, old: jnp.where(counts, new, old), after(extra, params, means), extra)
        return TrainState(state.step + 1, params, optimizer_state, guard, extra), metrics

    def train_step(state, batch, num_micro_K, learning_rate_K, num_steps, held=None):
        def at(index):
            return jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False),
                (batch, num_micro_K, learning_rate_K),
            )

        if steps_per_dispatch == 1:
            state, metrics = step(state, held, *at(0))
            return state, jax.tree.map(lambda m: m[None], metrics)

        def advance(index, carry):
            state, history = carry
            state, metrics = step(state, held, *at(index))
            return state, jax.tree.map(lambda h, m: h.at[index].set(m), history, metrics)

        shapes = jax.eval_shape(step, state, held, *at(0))[1]
        history = jax.tree.map(lambda m: jnp.zeros((steps_per_dispatch,), m.dtype), shapes)
        return jax.lax.fori_loop(0, num_steps, advance, (state, history))

    compiled = jax.jit(train_step, donate_argnums=0)
    return compiled if frozen is None else _Bound(compiled, frozen)


class _Bound:
    """A compiled step with what is not trained: an argument, for a constant would be compiled into the program."""

    def __init__(self, compiled: Callable, frozen: Params):
        self._compiled, self._frozen = compiled, frozen

    def __call__(self, *arguments: Any) -> tuple[TrainState, Metrics]:
        return self._compiled(*arguments, self._frozen)

    def lower(self, *arguments: Any) -> Any:
        """As that of a jitted function."""
        return self._compiled.lower(*arguments, self._frozen)
