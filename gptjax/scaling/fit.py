"""Scaling laws fitted to runs: coefficients with intervals, from losses of models of several sizes and token counts.

L(N, D) = E + A / N^alpha + B / D^beta, by the Huber loss (delta = 0.001) of the difference in log L, summed over points
(Hoffmann et al. 2022, section D.2; averaged, as theirs was, it stops too early: Besiroglu et al. 2024).

Shape suffixes: P points, K terms (one of each variable that varies), C coefficients (1 + 2 K), S starts, R resamples.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checks import require
from gptjax.errors import UserError
from gptjax.scaling import huber
from gptjax.scaling.laws import Counting, LossLaw, short

COEFFICIENTS = ("E", "A", "B", "alpha", "beta")
CONFIDENCE = 0.9
"""Of all intervals."""
EXPONENTS = np.geomspace(0.05, 1.6, 14)
"""Of which pairs the starts are made."""
STARTS = 12
MAX_EXPONENT = 10.0
"""Beyond it a term is a step that the points happen to stand on both sides of, and its scale overflows."""


class LossFit(NamedTuple):
    """A fitted law, and how sure it is."""

    law: LossLaw
    """With B = 0 where all points have the same tokens, and A = 0 where all have the same parameters."""
    draws: tuple[LossLaw, ...]
    """The laws of the resampled points."""
    residuals_P: np.ndarray
    """log of the fitted loss over the measured one."""
    least: float
    """The sum that was minimized."""
    fixed: tuple[str, ...]
    """Coefficients that the points say nothing of."""

    def interval(self, coefficient: str) -> tuple[float, float] | None:
        """The middle 90 % of the resamples' values; None where there are none, or none to say."""
        if not self.draws or coefficient in self.fixed:
            return None
        return interval(np.array([getattr(law, coefficient) for law in self.draws]))

    def frontier_interval(self) -> tuple[float, float] | None:
        """Of a in N* ∝ C^a."""
        return interval(np.array([law.frontier_exponent for law in self.draws])) if self.draws else None

    def predict(self, N: float, D: float, seed: int = 0) -> tuple[float, float, float]:
        """A loss to expect, and the interval in which a new run's is expected: the coefficients' doubt, and its noise.

        The noise is drawn from the residuals, scaled up for the degrees of freedom that the fit used.
        """
        loss = self.law.loss(N, D)
        if not self.draws:
            return loss, float("nan"), float("nan")
        count = len(self.residuals_P)
        scale = np.sqrt(count / max(count - (len(COEFFICIENTS) - len(self.fixed)), 1))
        noise = np.random.default_rng(seed).choice(self.residuals_P, (len(self.draws), 20)) * scale
        # A residual is what the law says over what was measured; a new run is what the law says over its residual.
        drawn = np.array([law.loss(N, D) for law in self.draws])[:, None] / np.exp(noise)
        return loss, *interval(drawn.ravel())


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 90 %."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def fit_loss(
    parameters: Sequence[float],
    tokens: Sequence[float],
    loss: Sequence[float],
    *,
    counts: Counting = "total",
    resamples: int = 500,
    seed: int = 0,
    delta: float = huber.HUBER_DELTA,
    name: str = "this fit",
) -> LossFit:
    """Fit E, A, B, alpha and beta, and resample the points for their intervals.

    A variable that has one value in all points has no term: its share of the loss is in E.

    The minimum is sought from the best of a grid of exponents, of each of which E, A and B are a linear problem, and
    from there by `huber.minimize`; each resample starts at the fit of all points.

    Args:
        parameters, tokens: (P,) N and D of each point.
        loss: (P,) nats a token.
        counts: the way in which `parameters` are counted; the law says so.
        delta: of the Huber loss. A fit of few points, each of them a good one, is better off with least squares: 1.
        resamples: how often P points are drawn with replacement and fitted; 0: no intervals.

    Raises:
        UserError: fewer points than coefficients, or neither variable varies.
    """
    names, columns = ("parameters", "tokens"), np.log(np.array([parameters, tokens], float))
    y_P = np.log(np.asarray(loss, float))
    varies = [index for index in (0, 1) if len(np.unique(columns[index].round(6))) > 1]
    require(bool(varies), f"all {len(y_P)} points have the same parameters and tokens, so there is nothing to fit")
    fixed = tuple(c for index, pair in enumerate((("A", "alpha"), ("B", "beta"))) if index not in varies for c in pair)
    needed = 1 + 2 * len(varies)
    require(
        len(y_P) >= needed,
        f"{len(y_P)} points are fewer than the {needed} coefficients "
        f"{', '.join(c for c in COEFFICIENTS if c not in fixed)}; give {needed} at least, and several times as many "
        "for intervals that mean something",
    )
    for index in varies:
        values = len(np.unique(columns[index].round(6)))
        require(
            values > 2,
            f"the points have {values} different {names[index]}, but a curve with a floor needs three at least",
        )
    x_PK = columns[varies].T
    middle_K = x_PK.mean(0)
    x_PK = x_PK - middle_K  # so that scales and exponents are nearly independent
    best_C, least = _minimize(x_PK, y_P, delta)
    draws_RC = huber.resample(_log_loss, best_C, x_PK, y_P, resamples, seed, delta)
    draws_RC = draws_RC[_falls(draws_RC, len(varies))]
    make = functools.partial(_law, middle_K=middle_K, varies=varies, counts=counts, name=name)
    ranges = [(float(np.exp(c.min())), float(np.exp(c.max()))) for c in columns]
    law = make(best_C, ranges=ranges)
    draws = tuple(make(draw_C, ranges=ranges) for draw_C in draws_RC)
    residuals_P = np.array([np.log(law.loss(N, D)) for N, D in zip(parameters, tokens, strict=True)]) - y_P
    return LossFit(law, draws, residuals_P, least, fixed)


def _law(theta_C, *, middle_K, varies, counts, name, ranges) -> LossLaw:
    """Back from logarithms about the middle."""
    K = len(varies)
    terms = {0: (0.0, 1.0), 1: (0.0, 1.0)}
    for index, scale, exponent, middle in zip(varies, theta_C[1 : 1 + K], theta_C[1 + K :], middle_K, strict=True):
        terms[index] = float(np.exp(scale + exponent * middle)), float(exponent)
    (A, alpha), (B, beta) = terms[0], terms[1]
    return LossLaw(
        *(float(np.exp(theta_C[0])), A, B, alpha, beta),
        name=name, source="fitted by gptjax", counts=counts, parameters_range=ranges[0], tokens_range=ranges[1],
    )  # fmt: skip


def _log_loss(theta_C: jax.Array, x_PK: jax.Array) -> jax.Array:
    """(P,) log(E + sum of A_k exp(-alpha_k x_k)), of (log E, log A, alpha)."""
    K = x_PK.shape[1]
    terms_PK = theta_C[None, 1 : 1 + K] - theta_C[None, 1 + K :] * x_PK
    return jnp.logaddexp(jax.nn.logsumexp(terms_PK, axis=1), theta_C[0])


def _minimize(x_PK: np.ndarray, y_P: np.ndarray, delta: float) -> tuple[np.ndarray, float]:
    """The least of the minima that the starts lead to."""
    starts_SC = _starts(x_PK, y_P)
    theta_SC, value_S = huber.minimize(_log_loss, starts_SC, x_PK, y_P, delta)
    usable_S = np.isfinite(value_S) & _falls(theta_SC, x_PK.shape[1])
    if not usable_S.any():
        raise UserError(
            "no law with falling terms fits these points: the loss does not fall with parameters and tokens; "
            "look at the table, or leave out runs that were not trained to their end"
        )
    best = int(np.argmin(np.where(usable_S, value_S, np.inf)))
    return theta_SC[best], float(value_S[best])


def _falls(theta_SC: np.ndarray, K: int) -> np.ndarray:
    """(S,) whether all terms fall with their variable, and no faster than one can tell."""
    exponents_SK = theta_SC[:, -K:]
    return ((exponents_SK > 0) & (exponents_SK < MAX_EXPONENT)).all(1)


def _starts(x_PK: np.ndarray, y_P: np.ndarray) -> np.ndarray:
    """(S, C): the exponents of the grid whose best E and A fit best, by least squares of the relative difference."""
    loss_P, found = np.exp(y_P), []
    for exponents in np.stack(np.meshgrid(*[EXPONENTS] * x_PK.shape[1]), -1).reshape(-1, x_PK.shape[1]):
        basis = np.concatenate([np.ones((len(y_P), 1)), np.exp(-exponents * x_PK)], 1)
        linear = np.linalg.lstsq(basis / loss_P[:, None], np.ones(len(y_P)), rcond=None)[0]
        linear = np.maximum(linear, 1e-3 * loss_P.min())  # E and A are positive
        distance = np.abs(basis @ linear / loss_P - 1).sum()
        found.append((distance, [*np.log(linear), *exponents]))
    found.sort(key=lambda start: start[0])
    return np.array([theta for _, theta in found[:STARTS]])


def describe(fit: LossFit) -> list[tuple[str, str, str]]:
    """(coefficient, value, interval) as rows to show."""
    rows = []
    for name in COEFFICIENTS:
        value, bounds = getattr(fit.law, name), fit.interval(name)
        shown = "not in the points" if name in fit.fixed else f"{value:.4g}"
        rows.append((name, shown, "" if bounds is None else f"{bounds[0]:.4g} to {bounds[1]:.4g}"))
    if not fit.fixed:
        low, high = fit.frontier_interval() or (float("nan"), float("nan"))
        rows.append(("a in N* ∝ C^a", f"{fit.law.frontier_exponent:.3f}", f"{low:.3f} to {high:.3f}"))
    return rows


def span(law: LossLaw) -> str:
    """What the points covered, in words."""
    (n0, n1), (d0, d1) = law.parameters_range, law.tokens_range
    return f"{short(n0)} to {short(n1)} parameters ({law.counts}), {short(d0)} to {short(d1)} tokens"
