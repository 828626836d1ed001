"""Which steps count: one whose gradient is not finite, or whose loss or gradient leaps up, changes nothing.

Both are judged inside the compiled step, so that no host waits for the verdict. Shape suffix: W steps of the window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128
"""Steps over which what is usual is measured; as many come before one is skipped for not being usual."""
NORM_FACTOR = 5
"""Six deviations of the gradient norm alone skipped 2 of the quickstart's 1,200 steps, at 1.5 times the mean, and twice
the mean 2 of 400 of a small model's: the promise is fewer than one in 1,000."""

LEAST_LEAP = 0.1
"""Nats by which a loss must leap to be skipped. Where examples are seen many times the loss is nearly 0, and so is its
deviation: a batch with one example that is not learned yet would be skipped in every epoch, and never learned."""


class Guard(NamedTuple):
    """What the next step is judged by."""

    losses_W: jax.Array
    """Of the last steps that counted, in no order."""
    grad_norms_W: jax.Array
    seen: jax.Array
    """Steps that were remembered so far."""
    skipped: jax.Array
    """Steps that changed nothing, since the run began."""
    in_a_row: jax.Array
    """Of the skipped steps those since the last that counted."""


def init_guard() -> Guard:
    """Before the first step."""
    # Five arrays, for a state is donated, and no buffer can be given away twice.
    return Guard(*(jnp.zeros(WINDOW, jnp.float32) for _ in range(2)), *(jnp.zeros((), jnp.int32) for _ in range(3)))


def forget(guard: Guard) -> Guard:
    """The guard of a run whose text or settings are others from here on: what is usual is to be seen first."""
    return guard._replace(seen=jax.jit(jnp.zeros_like)(guard.seen))


def judge(guard: Guard, loss: jax.Array, grad_norm: jax.Array, spike_sigmas: float) -> tuple[jax.Array, Guard]:
    """Whether a step counts, and the guard after it.

    It does if both numbers are finite and neither is more than `spike_sigmas` standard deviations above its mean over
    the last 128 steps that counted (OLMo 2, Walsh et al. 2025, skips by the same rule). A gradient norm must also be
    five times its mean to be skipped: its tail is long, and clipping takes care of what is less. A loss must be a tenth
    of a nat above its mean.
    What was skipped is not taken for usual: else a few leaps would be enough to let the rest of them pass.

    Args:
        loss: of the step's batch, float32.
        grad_norm: global norm before clipping; not finite if any number of the gradient is not.
        spike_sigmas: 0: only what is not finite is skipped.
    """

    def limit(last_W: jax.Array) -> jax.Array:
        return last_W.mean() + spike_sigmas * last_W.std()

    def remember(last_W: jax.Array, value: jax.Array) -> jax.Array:
        return last_W.at[guard.seen % WINDOW].set(jnp.where(counts, value, last_W[guard.seen % WINDOW]))

    counts = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if spike_sigmas:
        loss_limit = jnp.maximum(limit(guard.losses_W), guard.losses_W.mean() + LEAST_LEAP)
        norm_limit = jnp.maximum(limit(guard.grad_norms_W), NORM_FACTOR * guard.grad_norms_W.mean())
        counts &= (guard.seen < WINDOW) | ((loss <= loss_limit) & (grad_norm <= norm_limit))
    return counts, Guard(
        remember(guard.losses_W, loss),
        remember(guard.grad_norms_W, grad_norm),
        guard.seen + counts,
        guard.skipped + ~counts,
        jnp.where(counts, 0, guard.in_a_row + 1),
    )
