"""Robust fits of log loss: the Huber loss, and its minimum from many starts or for many resamples in one solve.

Shape suffixes: P points, C coefficients, S starts, R resamples.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HUBER_DELTA = 1e-3
"""Of log loss, so about relative: differences beyond it count by their size, and no longer by their square."""
MAX_STEPS = 300

Model = Callable[[jax.Array, Any], jax.Array]
"""(C,) coefficients and arrays with P rows → (P,) log loss; a function of a module, for it is compiled once."""


def minimize(
    model: Model, starts_SC: np.ndarray, data: Any, y_P: np.ndarray, delta: float = HUBER_DELTA
) -> tuple[np.ndarray, np.ndarray]:
    """Minimize sum(huber(model(theta, data) - y)) from every start, in float64. A large delta: least squares.

    By least squares reweighted for the Huber loss and damped as Levenberg and Marquardt have it. L-BFGS, which papers
    on scaling laws use, stops in its line search from most starts (so did `jax.scipy.optimize` here, and took twenty
    times as long); this converges from all that are near.

    Returns:
        (S, C) where each ended, and (S,) the sums there.
    """
    with jax.enable_x64(True):
        theta_SC, value_S = _solvers(model)[0](np.asarray(starts_SC, float), data, y_P, np.ones(len(y_P)), delta)
        return np.asarray(theta_SC), np.asarray(value_S) * delta


def resample(
    model: Model,
    start_C: np.ndarray,
    data: Any,
    y_P: np.ndarray,
    resamples: int,
    seed: int,
    delta: float = HUBER_DELTA,
) -> np.ndarray:
    """(R, C) the same for P points drawn with replacement, each from the fit of all; those that ended nowhere are out.

    One compiled solve for all resamples, of a shape that does not depend on which points were drawn.
    """
    if not resamples:
        return np.zeros((0, len(start_C)))
    P = len(y_P)
    weights_RP = np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), resamples).astype(float)
    with jax.enable_x64(True):
        draws_RC = np.asarray(_solvers(model)[1](np.asarray(start_C, float), data, y_P, weights_RP, delta)[0])
    return draws_RC[np.isfinite(draws_RC).all(1)]


@functools.cache
def _solvers(model: Model):
    """For many starts, and for many weights."""
    solve = functools.partial(_solve, model)
    return jax.jit(jax.vmap(solve, (0, *[None] * 4))), jax.jit(jax.vmap(solve, (None, None, None, 0, None)))


def _objective(difference_P: jax.Array, weights_P: jax.Array, delta: jax.Array) -> jax.Array:
    """Over delta, so about the sum of absolute differences."""
    size_P = jnp.abs(difference_P)
    squared = 0.5 * size_P**2 / delta
    return (weights_P * jnp.where(size_P <= delta, squared, size_P - 0.5 * delta)).sum()


class _Search(NamedTuple):
    theta_C: jax.Array
    value: jax.Array
    damping: jax.Array
    steps: jax.Array
    done: jax.Array


def _solve(model: Model, start_C: jax.Array, data: Any, y_P: jax.Array, weights_P: jax.Array, delta: jax.Array):
    def improve(at: _Search) -> _Search:
        difference_P = model(at.theta_C, data) - y_P
        jacobian_PC = jax.jacfwd(model)(at.theta_C, data)
        # Huber's loss is touched from above by the parabola with this weight, so that its minimum is no worse.
        curvature_P = weights_P / jnp.maximum(jnp.abs(difference_P), delta)
        gradient_C = jacobian_PC.T @ (curvature_P * difference_P)
        hessian_CC = (jacobian_PC.T * curvature_P[None, :]) @ jacobian_PC
        damped_CC = hessian_CC + jnp.diag(at.damping * jnp.diag(hessian_CC) + 1e-12)
        tried_C = at.theta_C - jnp.linalg.solve(damped_CC, gradient_C)
        value = _objective(model(tried_C, data) - y_P, weights_P, delta)
        better = value < at.value
        settled = (better & (at.value - value <= 1e-10 * at.value)) | (at.damping > 1e8)
        return _Search(
            jnp.where(better, tried_C, at.theta_C),
            jnp.where(better, value, at.value),
            jnp.where(better, 0.3 * at.damping, 4 * at.damping),
            at.steps + 1,
            settled,
        )

    first = _objective(model(start_C, data) - y_P, weights_P, delta)
    start = _Search(start_C, first, jnp.asarray(1e-3, first.dtype), jnp.asarray(0), jnp.asarray(False))
    end = jax.lax.while_loop(lambda at: (at.steps < MAX_STEPS) & ~at.done, improve, start)
    return end.theta_C, end.value
