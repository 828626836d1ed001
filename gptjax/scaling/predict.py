"""The prediction that a study writes down before it trains what is predicted, and the comparison afterwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.plain_files import read_json
from gptjax.scaling.conduct import ENDED, PREDICTION_FILE, Result
from gptjax.scaling.fit import COEFFICIENTS, CONFIDENCE, fit_loss
from gptjax.scaling.study import PlannedRun
from gptjax.scaling.table import Table, best_tuned

RESAMPLES = 1000


def predict(found: Sequence[Result], runs: Sequence[PlannedRun], counts: str) -> dict[str, Any]:
    """Fit the runs that are done, and predict others.

    Where runs differ in their learning rate or batch, the best of each size and budget count.

    Returns:
        What `prediction.json` holds: the law with intervals, the points that it is fitted to, and for each run its
        loss and the interval in which 90 % of such runs are expected.

    Raises:
        UserError: some runs are not done, or too few are to fit a law.
    """
    missing = [result.run.name for result in found if result.status not in ENDED]
    if missing:
        raise UserError(f"{len(missing)} runs are to be predicted from and not done, {missing[0]} the first")
    table = best_tuned(_table([result for result in found if result.loss is not None], counts))
    fit = fit_loss(table.parameters_P, table.tokens_P, table.loss_P, counts=counts, resamples=RESAMPLES)
    rows = []
    for run in runs:
        loss, low, high = fit.predict(run.parameters, run.tokens)
        size = {"run": run.name, "parameters": run.parameters, "tokens": run.tokens}
        rows.append(size | {"loss": loss, "low": low, "high": high})
    return {
        "law": {name: getattr(fit.law, name) for name in COEFFICIENTS},
        "intervals": {name: fit.interval(name) for name in COEFFICIENTS},
        "confidence": CONFIDENCE,
        "counts": counts,
        "points": [
            {"run": name, "parameters": N, "tokens": D, "loss": loss, "fitted": fit.law.loss(N, D)}
            for name, N, D, loss in zip(
                table.names,
                table.parameters_P.tolist(),
                table.tokens_P.tolist(),
                table.loss_P.tolist(),
                strict=True,
            )
        ],
        "excluded": [
            *(f"{result.run.name}: {result.status}" for result in found if result.loss is None),
            *table.excluded,
        ],
        "runs": rows,
    }


def _table(found: Sequence[Result], counts: str) -> Table:
    configs = [result.run.config for result in found]
    return Table(
        "study",
        counts,
        tuple(result.run.name for result in found),
        np.array([result.run.parameters for result in found], float),
        np.array([result.run.tokens for result in found], float),
        np.array([result.loss for result in found], float),
        {
            "learning_rate": np.array([config.optimizer.peak_learning_rate for config in configs]),
            "batch_tokens": np.array([c.training.batch_size * c.sequence_length for c in configs], float),
        },
    )


def read_prediction(folder: Path) -> dict[str, Any] | None:
    """What was predicted, or None where nothing was."""
    path = folder / PREDICTION_FILE
    return read_json(path) if path.is_file() else None


def comparison(found: Sequence[Result], folder: Path) -> list[dict[str, Any]]:
    """Each prediction with what came of it: `measured`, and `error`, by which the prediction is too high.

    Of several runs of one size and budget that differ in their tuning, every one is compared.
    """
    prediction, losses = read_prediction(folder), {result.run.name: result.loss for result in found}
    rows = []
    for row in (prediction or {"runs": ()})["runs"]:
        measured = losses.get(row["run"])
        rows.append(row | {"measured": measured, "error": None if measured is None else row["loss"] / measured - 1})
    return rows
