"""How far scores agree with people: accuracy with its interval, and whether probabilities mean what they say.

Shape suffixes: B prompts, K answers, P pairs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

from gptjax.evaluation.pictures import new_figure, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 10


class Agreement(NamedTuple):
    """Of scores with ranks, over all pairs that are no tie."""

    loss: float
    """Mean over prompts of the mean over their pairs of -log σ(lead)."""
    accuracy: float
    """Share of the pairs whose better answer has the higher score; half of those with equal scores."""
    pairs: int
    interval: tuple[float, float]
    """Wilson's (1927), 95 %, of the accuracy."""


def agreement(scores_BK: np.ndarray, ranks_BK: np.ndarray) -> Agreement:
    """
    Args:
        ranks_BK: less is better; negative: there is no such answer.
    """
    leads = [_leads(scores_K, ranks_K) for scores_K, ranks_K in zip(scores_BK, ranks_BK, strict=True)]
    losses = [np.logaddexp(0.0, -lead_P).mean() for lead_P in leads if len(lead_P)]
    lead_P = np.concatenate(leads)
    right, pairs = (lead_P > 0).sum() + (lead_P == 0).sum() / 2, len(lead_P)
    low, high = stats.binomtest(int(right), pairs).proportion_ci(0.95, method="wilson")
    return Agreement(float(np.mean(losses)), float(right / pairs), pairs, (float(low), float(high)))


def plot_calibration(scores_BK: np.ndarray, ranks_BK: np.ndarray, path: Path | None = None) -> "Figure":
    """How often the answer with the higher score is the better one, over the probability that the scores give that."""
    lead_P = np.concatenate([_leads(s, r) for s, r in zip(scores_BK, ranks_BK, strict=True)])
    claimed_P, right_P = 1 / (1 + np.exp(-np.abs(lead_P))), lead_P > 0
    order = np.array_split(np.argsort(claimed_P, kind="stable"), min(BINS, max(1, len(lead_P) // 5)))
    figure = new_figure(5, 4.6)
    panel = figure.subplots()
    panel.plot([0.5, 1], [0.5, 1], ":", color="grey", label="as claimed")
    for bin_P in order:
        right, count = int(right_P[bin_P].sum()), len(bin_P)
        low, high = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
        x = claimed_P[bin_P].mean()
        panel.plot([x, x], [low, high], color="C0", linewidth=1)
        panel.plot([x], [right / count], "o", color="C0", label="with 95 % intervals" if bin_P is order[0] else None)
    panel.set(xlabel="probability that the scores claim", ylabel="share of pairs that are so", ylim=(0, 1.02))
    panel.legend(loc="lower right")
    return saved(figure, path)


def _leads(scores_K: np.ndarray, ranks_K: np.ndarray) -> np.ndarray:
    """By how much the better answer of each pair leads, (P,)."""
    there = ranks_K >= 0
    is_pair_KK = (ranks_K[:, None] < ranks_K[None, :]) & there[:, None] & there[None, :]
    return (scores_K[:, None] - scores_K[None, :])[is_pair_KK].astype(np.float64)
