"""Where the loss is least: sizes at equal FLOPs, learning rates and batches at equal size, and power laws through them.

Shape suffixes: P rows, V valleys.
"""

from typing import NamedTuple

import numpy as np

from gptjax.checks import require
from gptjax.scaling.fit import interval
from gptjax.scaling.table import Table

SAME_BUDGET = 0.1
"""Rows whose FLOPs differ by less share a budget: whole steps and whole layers do not hit one exactly."""
PLANNED = 0.8
"""Share of the rows from which on a table is an isoFLOP study."""
RESAMPLES = 500


class Valley(NamedTuple):
    """Losses over one variable, everything else being equal."""

    at: tuple[float, ...]
    """What is equal: the FLOPs, or parameters and tokens."""
    x: np.ndarray
    """The variable, ascending."""
    loss: np.ndarray
    best: float | None
    """Where the parabola in log x has its minimum; None where the lowest loss is at the least or the greatest x."""
    best_tokens: float | None = None
    """Tokens of a run at the minimum, where FLOPs are equal: what else they count than 6 N D, the runs know."""


class PowerLaw(NamedTuple):
    """y = coefficient · product of x_k ** exponents_k."""

    coefficient: float
    exponents: tuple[float, ...]
    intervals: tuple[tuple[float, float] | None, ...]
    """Of the exponents."""

    def __call__(self, *x: float) -> float:
        return self.coefficient * float(np.prod(np.power(x, self.exponents)))


def isoflop_valleys(table: Table) -> list[Valley]:
    """For each budget of FLOPs that three sizes or more were trained with: loss over parameters.

    The parabola is fitted to all sizes of a budget (Hoffmann et al. 2022, approach 2). Where fewer rows share budgets
    than `PLANNED` of all, they do so by chance, and there are none.
    """
    flops = table.more["flops"]
    order = np.argsort(flops, kind="stable")
    jumps = np.flatnonzero(np.diff(np.log(flops[order])) > np.log1p(SAME_BUDGET)) + 1
    found = []
    for group in np.split(order, jumps):
        if len(np.unique(table.parameters_P[group])) < 3:
            continue
        group = group[np.argsort(table.parameters_P[group], kind="stable")]
        x, loss = table.parameters_P[group], table.loss_P[group]
        best = _vertex(x, loss)
        tokens = None if best is None else _between(best, x, table.tokens_P[group])
        found.append(Valley((float(np.exp(np.log(flops[group]).mean())),), x, loss, best, tokens))
    return found if sum(len(valley.x) for valley in found) >= PLANNED * len(flops) else []


def tuning_valleys(table: Table, variable: str) -> list[Valley]:
    """For each size and token count of which three values or more were tried: loss over `learning_rate` or a batch.

    Where the loss is least it is nearly a parabola and soon no more, so that one is laid through the best value and
    those beside it.
    """
    column = table.more.get(variable)
    if column is None:
        return []
    keys = list(zip(table.parameters_P.tolist(), table.tokens_P.tolist(), strict=True))
    found = []
    for key in sorted(set(keys)):
        group = np.array([index for index, other in enumerate(keys) if other == key])
        x = np.unique(column[group])
        if len(x) < 3:
            continue
        loss = np.array([table.loss_P[group[column[group] == value]].min() for value in x])
        best = int(np.argmin(loss))
        near = slice(max(best - 1, 0), best + 2)
        found.append(Valley(key, x, loss, _vertex(x[near], loss[near])))
    return found


def _vertex(x: np.ndarray, loss: np.ndarray) -> float | None:
    """Minimum of the parabola in log x, if it lies inside; x ascends, and may have a value several times."""
    if len(x) < 3 or x[np.argmin(loss)] in (x[0], x[-1]):
        return None
    log_x = np.log(x)
    middle = log_x.mean()
    square, slope, _ = np.polyfit(log_x - middle, loss, 2)
    if not square > 0:
        return None
    vertex = middle - slope / (2 * square)
    return float(np.exp(vertex)) if log_x[0] <= vertex <= log_x[-1] else None


def _between(at: float, x: np.ndarray, y: np.ndarray) -> float:
    """y at a value of x, along straight lines in logarithms."""
    return float(np.exp(np.interp(np.log(at), np.log(x), np.log(y))))


def power_law(x: np.ndarray, y: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> PowerLaw:
    """Least squares in logarithms, with intervals from points drawn with replacement.

    Args:
        x: (V, K) variables.
        y: (V,)

    Raises:
        UserError: fewer points than coefficients.
    """
    V, K = x.shape
    require(V > K, f"{V} minima are fewer than the {K + 1} coefficients of a power law")
    basis = np.concatenate([np.ones((V, 1)), np.log(x)], 1)
    solution = np.linalg.lstsq(basis, np.log(y), rcond=None)[0]
    rng, draws = np.random.default_rng(seed), []
    for _ in range(resamples if V > K + 1 else 0):
        chosen = rng.integers(0, V, V)
        if np.linalg.matrix_rank(basis[chosen]) == K + 1:
            draws.append(np.linalg.lstsq(basis[chosen], np.log(y[chosen]), rcond=None)[0])
    bounds = tuple(interval(np.array(draws)[:, k + 1]) if len(draws) > 1 else None for k in range(K))
    return PowerLaw(float(np.exp(solution[0])), tuple(map(float, solution[1:])), bounds)


def frontier_of(valleys: list[Valley]) -> tuple[PowerLaw, PowerLaw] | None:
    """N*(C) and D*(C) through the minima of isoFLOP valleys; None where there are fewer than two."""
    inside = [valley for valley in valleys if valley.best is not None]
    if len(inside) < 2:
        return None
    flops = np.array([valley.at for valley in inside])
    parameters, tokens = (np.array([getattr(v, name) for v in inside]) for name in ("best", "best_tokens"))
    return power_law(flops, parameters), power_law(flops, tokens)


def tuning_law(valleys: list[Valley]) -> tuple[PowerLaw, tuple[str, ...]] | None:
    """The best value as a power of parameters and tokens, or of that of the two that varies, and of which."""
    inside = [valley for valley in valleys if valley.best is not None]
    if len(inside) < 2:
        return None
    x = np.array([valley.at for valley in inside])
    varies = [k for k in (0, 1) if len(np.unique(x[:, k])) > 1]
    if not varies or len(inside) <= len(varies):
        return None
    law = power_law(x[:, varies], np.array([valley.best for valley in inside]))
    return law, tuple(("parameters", "tokens")[k] for k in varies)
