"""Everything that a table of runs tells: the loss law, what it extrapolates to, the best sizes, rates and batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.checks import require
from gptjax.errors import UserError
from gptjax.scaling.fit import COEFFICIENTS, CONFIDENCE, LossFit, fit_loss
from gptjax.scaling.huber import HUBER_DELTA
from gptjax.scaling.laws import FRONTIERS, PORIAN_EXPONENTS, TUNING_LAWS, short
from gptjax.scaling.optima import PowerLaw, Valley, frontier_of, isoflop_valleys, tuning_law, tuning_valleys
from gptjax.scaling.repeated import RepeatedFit, fit_repeated
from gptjax.scaling.table import Table, best_tuned

TUNED = ("learning_rate", "batch_tokens")
EXCESS = 1.001
"""Tokens over unique tokens, beyond which some were seen again."""


class Tuning(NamedTuple):
    """The best value of something, over sizes and tokens."""

    valleys: list[Valley]
    law: PowerLaw | None
    """None: fewer minima than it has coefficients."""
    variables: tuple[str, ...]
    """Of the law."""


class Findings(NamedTuple):
    """See the module's first line."""

    table: Table
    """All rows."""
    fitted: Table
    """Those that the law is fitted to."""
    fit: LossFit
    held_out: Table
    """Rows that the law extrapolates to; none unless asked for."""
    isoflop: list[Valley]
    frontier: tuple[PowerLaw, PowerLaw] | None
    """Parameters and tokens through the minima of `isoflop`; the law has another."""
    tunings: dict[str, Tuning]
    repeated: RepeatedFit | None
    notes: tuple[str, ...]


def examine(
    table: Table,
    *,
    hold_out_above: float | None = None,
    resamples: int = 500,
    seed: int = 0,
    delta: float = HUBER_DELTA,
) -> Findings:
    """Fit what can be fitted.

    Args:
        hold_out_above: parameters; larger models are not fitted to, but extrapolated to.

    Raises:
        UserError: as `fit_loss`; nothing is held out, or everything is.
    """
    best, notes = best_tuned(table), []
    small_P = np.ones(len(best.names), bool) if hold_out_above is None else best.parameters_P <= hold_out_above
    require(
        hold_out_above is None or 0 < small_P.sum() < len(small_P),
        f"hold-out-above {hold_out_above} leaves {int(small_P.sum())} of {len(small_P)} points to fit; parameters are "
        f"{short(best.parameters_P.min())} to {short(best.parameters_P.max())}",
    )
    unique = best.more.get("unique_tokens")
    once_P = np.ones(len(small_P), bool) if unique is None else best.tokens_P <= EXCESS * unique
    fitted, held_out = best.where(small_P & once_P), best.where(~small_P & once_P)
    fit = fit_loss(
        *(fitted.parameters_P, fitted.tokens_P, fitted.loss_P),
        counts=table.counts, resamples=resamples, seed=seed, delta=delta,
    )  # fmt: skip
    if fit.law.E / fitted.loss_P.min() < 1e-3:
        notes.append("the points bend too little to tell a floor: E is 0 as far as they say")
    repeated = None
    again_P = small_P & ~once_P
    if again_P.any():
        again = best.where(again_P)
        try:
            repeated = fit_repeated(
                *(fit.law, again.parameters_P, again.tokens_P, again.more["unique_tokens"], again.loss_P),
                resamples=resamples, seed=seed,
            )  # fmt: skip
        except UserError as error:
            notes.append(f"{int(again_P.sum())} rows repeat text and were left out: {error}")
    tunings = {}
    for name in TUNED:
        if valleys := tuning_valleys(table, name):
            law, variables = tuning_law(valleys) or (None, ())
            tunings[name] = Tuning(valleys, law, variables)
            edge = sum(valley.best is None for valley in valleys)
            if edge:
                notes.append(
                    f"{edge} of {len(valleys)} best {name}s lie at the edge of what was tried, and are left out"
                )
    isoflop = isoflop_valleys(best)
    return Findings(
        table, fitted, fit, held_out, isoflop, frontier_of(isoflop), tunings, repeated, (*best.excluded, *notes)
    )


def extrapolations(found: Findings, asked: Sequence[tuple[float, float]] = ()) -> list[dict[str, Any]]:
    """What the law says of rows held out, and of (parameters, tokens) asked for, where nothing was measured."""
    held = found.held_out
    rows = [*zip(held.names, held.parameters_P.tolist(), held.tokens_P.tolist(), held.loss_P.tolist(), strict=True)]
    rows += [("asked for", N, D, None) for N, D in asked]
    result = []
    for name, N, D, measured in rows:
        loss, low, high = found.fit.predict(N, D)
        error = None if measured is None else loss / measured - 1
        card = {"name": name, "parameters": N, "tokens": D, "loss": loss, "low": low, "high": high}
        result.append(card | {"measured": measured, "error": error, "warning": found.fit.law.outside(N, D)})
    return result


def frontiers(found: Findings, flops: Sequence[float]) -> list[dict[str, Any]]:
    """Compute-optimal sizes by the fitted law, by the valleys, and by published laws, with their exponents.

    Kaplan's and Hoffmann's laws count parameters each in its way, which `counts` says; at these sizes the ways differ.
    """
    law, rows = found.fit.law, []
    if not found.fit.fixed:
        rows.append(("this fit", law.counts, law.frontier_exponent, found.fit.frontier_interval(), law.compute_optimal))
    if found.frontier is not None:
        N, D = found.frontier
        parabolas = lambda C: (N(C), D(C))  # noqa: E731
        rows.append(("isoFLOP parabolas", law.counts, N.exponents[0], N.intervals[0], parabolas))
    rows += [(f.name, f.counts, f.frontier_exponent, None, f.compute_optimal) for f in FRONTIERS]
    return [
        {"name": name, "counts": counts, "exponent": exponent, "interval": bounds,
         "optima": [{"flops": C, "parameters": N, "tokens": D} for C in flops for N, D in [optimal(C)]]}
        for name, counts, exponent, bounds, optimal in rows
    ]  # fmt: skip


def to_json(found: Findings, asked: Sequence[tuple[float, float]], flops: Sequence[float]) -> dict[str, Any]:
    """Everything, with the law's coefficients at the top."""
    fit = found.fit
    return {
        **{name: None if name in fit.fixed else getattr(fit.law, name) for name in COEFFICIENTS},
        "intervals": {name: fit.interval(name) for name in COEFFICIENTS},
        "confidence": CONFIDENCE,
        "counts": fit.law.counts,
        "points": len(found.fitted.names),
        "parameters_range": fit.law.parameters_range,
        "tokens_range": fit.law.tokens_range,
        "huber_sum": fit.least,
        "residuals": dict(zip(found.fitted.names, fit.residuals_P.tolist(), strict=True)),
        "extrapolations": extrapolations(found, asked),
        "resamples": [[getattr(law, name) for name in COEFFICIENTS] for law in fit.draws],
        "frontiers": frontiers(found, flops),
        "porian_exponents": PORIAN_EXPONENTS,
        "isoflop": [_valley(valley, ("flops",)) for valley in found.isoflop],
        "tuning": {name: _tuning(name, tuning) for name, tuning in found.tunings.items()},
        "repeated": None if found.repeated is None else _repeated(found.repeated),
        "excluded": list(found.notes),
    }


def _valley(valley: Valley, names: Sequence[str]) -> dict[str, Any]:
    at = dict(zip(names, valley.at, strict=True))
    return at | {"x": valley.x.tolist(), "loss": valley.loss.tolist(), "best": valley.best}


def _tuning(name: str, tuning: Tuning) -> dict[str, Any]:
    card: dict[str, Any] = {"valleys": [_valley(valley, ("parameters", "tokens")) for valley in tuning.valleys]}
    if tuning.law is not None:
        exponents = dict(zip(tuning.variables, tuning.law.exponents, strict=True))
        bounds = dict(zip(tuning.variables, tuning.law.intervals, strict=True))
        card |= {"coefficient": tuning.law.coefficient, "exponents": exponents, "intervals": bounds}
    card["published"] = {law.name: getattr(law, f"{name}_power") for law in TUNING_LAWS}
    return card


def _repeated(fit: RepeatedFit) -> dict[str, Any]:
    return {
        "repeats_tokens": fit.law.repeats_tokens,
        "excess_parameters": fit.law.excess_parameters,
        "intervals": {"repeats_tokens": fit.repeats_interval, "excess_parameters": fit.excess_interval},
    }
