"""How much repeated text is worth: the two constants of the data-constrained law, fitted to runs that saw text again.

Shape suffixes: P points.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checks import require
from gptjax.scaling import huber
from gptjax.scaling.fit import interval
from gptjax.scaling.laws import DATA_CONSTRAINED, DataConstrainedLaw, LossLaw


class RepeatedFit(NamedTuple):
    """The constants, with their intervals where the points determine them."""

    law: DataConstrainedLaw
    repeats_interval: tuple[float, float] | None
    excess_interval: tuple[float, float] | None
    """None: no model has more parameters than its unique tokens can use, so that the published constant stands."""


def fit_repeated(
    base: LossLaw,
    parameters_P: np.ndarray,
    tokens_P: np.ndarray,
    unique_P: np.ndarray,
    loss_P: np.ndarray,
    *,
    resamples: int = 500,
    seed: int = 0,
) -> RepeatedFit:
    """Fit R*_D, and R*_N where it shows, of `DataConstrainedLaw`, its base being known (Muennighoff et al. 2023).

    Args:
        base: fitted to runs that saw nothing twice.
        parameters_P, tokens_P, unique_P, loss_P: of runs that saw some of it again.

    Raises:
        UserError: too few runs, or none that repeats.
    """
    repeats = tokens_P > 1.001 * unique_P
    require(int(repeats.sum()) >= 3, f"{int(repeats.sum())} runs repeat text, but the worth of repeats needs three")
    unique_P = np.minimum(unique_P, tokens_P)
    usable_P = np.minimum(parameters_P, [base.optimal_parameters(U) for U in unique_P])
    excess = bool((parameters_P > 1.001 * usable_P).sum() >= 2)
    published = np.log([DATA_CONSTRAINED.repeats_tokens, DATA_CONSTRAINED.excess_parameters])
    data = tuple(
        np.broadcast_to(np.asarray(column, float), loss_P.shape)
        for column in (
            *(parameters_P, tokens_P, unique_P, usable_P, published[1]),
            *(base.E, base.A, base.B, base.alpha, base.beta),
        )
    )
    start_C, y_P = published if excess else published[:1], np.log(loss_P)
    theta_C = huber.minimize(_log_loss, start_C[None] + np.array([[0.0], [1.5], [-1.5]]), data, y_P)
    best_C = theta_C[0][int(np.nanargmin(theta_C[1]))]
    draws_RC = np.exp(huber.resample(_log_loss, best_C, data, y_P, resamples, seed))
    found = np.exp(best_C)
    law = DataConstrainedLaw(base, float(found[0]), float(found[1]) if excess else DATA_CONSTRAINED.excess_parameters)
    return RepeatedFit(
        law,
        interval(draws_RC[:, 0]) if len(draws_RC) else None,
        interval(draws_RC[:, 1]) if len(draws_RC) and excess else None,
    )


def _log_loss(theta_C: jax.Array, data: tuple[jax.Array, ...]) -> jax.Array:
    """As `DataConstrainedLaw.loss`, of (log R*_D, log R*_N), or of the first alone."""
    N, D, U_D, U_N, published, E, A, B, alpha, beta = data
    excess = theta_C[1] if theta_C.shape[0] == 2 else published
    N = _decayed(U_N, N / U_N - 1, jnp.exp(excess))
    D = _decayed(U_D, D / U_D - 1, jnp.exp(theta_C[0]))
    return jnp.log(E + A / N**alpha + B / D**beta)


def _decayed(once: jax.Array, repeats: jax.Array, constant: jax.Array) -> jax.Array:
    return once * (1 - constant * jnp.expm1(-repeats / constant))
