"""What GPT-3's smaller models said of the larger: their loss curves fitted, 6.7B to 175B predicted, and compared.

    python benchmarks/gpt3_curves.py CSV            # columns model, step (billions of tokens), val_loss
    python benchmarks/gpt3_curves.py CSV --json gpt3.json

The models up to 2.7B are fitted to at 20 token counts each, even in their logarithm; a point is the median of 3 % of a
curve. What is predicted is the loss at the end, the median over the last 5 of 300 billion tokens. The first row, from
20 billion tokens on, is the one that counts: GPT-3's batch grows over the first 4 to 12 billion, and what comes later
is all data there is. The others show how much depends on that choice, which is a lot: a curve's points are not of
models whose rate had decayed by then, and there are five sizes. The last is of the losses at the end alone, by least
squares.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence

import measure
import numpy as np

from gptjax.scaling.fit import fit_loss

PARAMETERS = {
    "small": 125e6,
    "medium": 356e6,
    "large": 760e6,
    "xl": 1.3e9,
    "2.7b": 2.65e9,
    "6.7b": 6.7e9,
    "13b": 13e9,
    "175b": 175e9,
}
"""Table 2.1 of Brown et al. 2020, which rounds; medium and 2.7b as their shapes have it."""
LARGEST_FITTED = 2.7e9
TOKENS = 300e9
STARTS = (20, 12, 30, 50, 100)
"""Billions of tokens from which curves are fitted to."""
COLUMNS = {"fitted_from": "", "points": "d", "E": ".3g", "alpha": ".3f", "beta": ".3f",
           **{f"{model}_error": "+.2%" for model in ("6.7b", "13b", "175b")}}  # fmt: skip


def read(path: str) -> dict[str, np.ndarray]:
    """Each model's curve, (points, 2): billions of tokens, validation loss."""
    curves = defaultdict(list)
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["val_loss"]:
                curves[row["model"]].append((float(row["step"]), float(row["val_loss"])))
    return {model: np.array(curves[model]) for model in PARAMETERS}


def points(curves: dict[str, np.ndarray], start: float) -> tuple[list[float], list[float], list[float]]:
    """Parameters, tokens and losses of the models that are fitted to."""
    found = []
    for model, curve in curves.items():
        if PARAMETERS[model] > LARGEST_FITTED:
            continue
        for low in np.geomspace(start, 290, 20):
            near = curve[(curve[:, 0] > low) & (curve[:, 0] < 1.03 * low), 1]
            if len(near):
                found.append((PARAMETERS[model], low * 1.015e9, float(np.median(near))))
    return tuple(zip(*found, strict=True))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv")
    parser.add_argument("--json", help="file for the results, or - for standard output")
    options = parser.parse_args(arguments)
    curves = read(options.csv)
    last = {model: float(np.median(curve[curve[:, 0] > 295, 1])) for model, curve in curves.items()}
    small = [model for model in PARAMETERS if PARAMETERS[model] <= LARGEST_FITTED]
    tables = [(f"{start} billion tokens", points(curves, start), 1e-3) for start in STARTS]
    final = [PARAMETERS[model] for model in small], [TOKENS] * len(small), [last[model] for model in small]
    rows = []
    for name, (N, D, loss), delta in (*tables, ("the end, least squares", final, 1.0)):
        fit = fit_loss(N, D, loss, resamples=0, delta=delta)
        row = {
            "fitted_from": name,
            "points": len(N),
            "E": fit.law.E,
            "alpha": fit.law.alpha,
            "beta": None if fit.fixed else fit.law.beta,
        }
        for model in PARAMETERS:
            row[f"{model}_error"] = fit.law.loss(PARAMETERS[model], TOKENS) / last[model] - 1
        rows.append(row)
    measure.show(rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
