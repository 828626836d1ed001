"""Do the intervals of `python -m gptjax fit` hold what they say? On tables whose coefficients are known.

    python benchmarks/fit_coverage.py                                  # 200 tables of 60 points, 200 refits each
    python benchmarks/fit_coverage.py --tables 20 --points 240 --json coverage.json

Each table has the losses of Epoch's law at random sizes and tokens, log-uniform over the range that the law was
measured in, with noise of 0.3 % (normal in log loss). A 90 % interval should hold the true coefficient in 90 % of the
tables; intervals from resampled points are a little too narrow or too wide on small tables, so that 80 to 97 % is what
is asked of them.
"""

import argparse
import time
from collections.abc import Sequence

import measure
import numpy as np

from gptjax.scaling.fit import COEFFICIENTS, fit_loss
from gptjax.scaling.laws import EPOCH

COLUMNS = {"coefficient": "", "truth": ".5g", "median": ".5g", "coverage": ".1%", "median_width": ".3g"}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0.003, help="standard deviation of log loss")
    parser.add_argument("--json", help="file for the results, or - for standard output")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    fits = []
    for seed in range(options.tables):
        rng = np.random.default_rng(seed)
        N = np.exp(rng.uniform(*np.log(EPOCH.parameters_range), options.points))
        D = np.exp(rng.uniform(*np.log(EPOCH.tokens_range), options.points))
        loss = np.array([EPOCH.loss(n, d) for n, d in zip(N, D, strict=True)])
        loss *= np.exp(rng.normal(0, options.noise, options.points))
        fits.append(fit_loss(N, D, loss, resamples=options.resamples, seed=seed))
    seconds, rows = time.perf_counter() - begun, []
    for name in COEFFICIENTS:
        truth, bounds = getattr(EPOCH, name), np.array([fit.interval(name) for fit in fits])
        inside = (bounds[:, 0] <= truth) & (truth <= bounds[:, 1])
        median = float(np.median([getattr(fit.law, name) for fit in fits]))
        width = float(np.median(bounds[:, 1] - bounds[:, 0]))
        row = {"coefficient": name, "truth": truth, "median": median, "coverage": float(inside.mean())}
        rows.append(row | {"median_width": width, "seconds": seconds, "tables": options.tables})
    measure.show(rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
