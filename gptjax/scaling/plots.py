"""Pictures of scaling studies. Figures are drawn without pyplot, so that they touch no global state."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gptjax.evaluation.pictures import new_figure, saved
from gptjax.scaling.coordinates import Coordinate, slopes
from gptjax.scaling.findings import Findings
from gptjax.scaling.fit import LossFit
from gptjax.scaling.laws import FRONTIERS, short
from gptjax.scaling.optima import Valley
from gptjax.scaling.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PUBLISHED_STYLES = ("--", "-.", ":", (0, (5, 1)), (0, (1, 1)))


def plot_findings(found: Findings, path: str | os.PathLike | None = None) -> "Figure":
    """The law over its points, its residuals, and its frontier beside published ones; below, the valleys if any.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    valleys = [("isoFLOP", found.isoflop)] if found.isoflop else []
    rows = 1 + bool(valleys or found.tunings)
    figure = new_figure(15.5, 4.8 * rows)
    grid = figure.subplots(rows, 3, squeeze=False)
    draw_law(grid[0, 0], found.fit, found.fitted, found.held_out)
    draw_residuals(grid[0, 1], found.fit, found.fitted, found.held_out)
    draw_frontier(grid[0, 2], found)
    if rows > 1:
        panels = iter(grid[1])
        if found.isoflop:
            draw_valleys(
                next(panels), found.isoflop, "parameters", [f"{valley.at[0]:.2g} FLOPs" for valley in found.isoflop]
            )
        for name, tuning in found.tunings.items():
            draw_tuning(next(panels), tuning.valleys, name)
        for panel in panels:
            panel.axis("off")
    return saved(figure, path)


def draw_law(panel: "Axes", fit: LossFit, fitted: Table, held_out: Table) -> None:
    """Loss over parameters, with the fitted curve of each number of tokens."""
    law, colours = fit.law, _colours(np.concatenate([fitted.tokens_P, held_out.tokens_P]))
    all_N = np.concatenate([fitted.parameters_P, held_out.parameters_P])
    N = np.geomspace(all_N.min() * 0.8, all_N.max() * 1.25, 200)
    levels = np.unique(np.concatenate([fitted.tokens_P, held_out.tokens_P]).round(-2))
    for D in levels[np.unique(np.linspace(0, len(levels) - 1, min(len(levels), 6)).round().astype(int))]:
        panel.plot(N, [law.loss(n, D) for n in N], color=colours(D), linewidth=1, label=f"{short(D)} tokens")
    panel.scatter(fitted.parameters_P, fitted.loss_P, c=[colours(D) for D in fitted.tokens_P], s=22, zorder=3)
    if len(held_out.names):
        panel.scatter(
            *(held_out.parameters_P, held_out.loss_P),
            c=[colours(D) for D in held_out.tokens_P], marker="*", s=110, edgecolors="black", linewidths=0.6, zorder=4,
            label="held out",
        )  # fmt: skip
    panel.set(xscale="log", yscale="log", xlabel=f"parameters ({law.counts})", ylabel="loss (nats a token)")
    _plain_ticks(panel, "x")
    _plain_ticks(panel, "y")
    of_N, of_D = f" + {law.A:.3g} / N^{law.alpha:.3f}", f" + {law.B:.3g} / D^{law.beta:.3f}"
    panel.set_title(f"L = {law.E:.3g}{of_N if law.A else ''}{of_D if law.B else ''}", fontsize=10)
    panel.legend(fontsize=8)


def draw_residuals(panel: "Axes", fit: LossFit, fitted: Table, held_out: Table) -> None:
    """By how much the law is above what was measured, in percent."""
    colours = _colours(np.concatenate([fitted.tokens_P, held_out.tokens_P]))
    shades = [colours(D) for D in fitted.tokens_P]
    panel.scatter(fitted.parameters_P, 100 * np.expm1(fit.residuals_P), c=shades, s=22, label="fitted to")
    if len(held_out.names):
        rows = zip(held_out.parameters_P, held_out.tokens_P, held_out.loss_P, strict=True)
        errors = [100 * (fit.law.loss(N, D) / loss - 1) for N, D, loss in rows]
        panel.scatter(held_out.parameters_P, errors, c=[colours(D) for D in held_out.tokens_P], marker="*", s=110,
                      edgecolors="black", linewidths=0.6, label="held out")  # fmt: skip
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(xscale="log", xlabel="parameters", ylabel="fitted over measured loss, % too high", title="residuals")
    _plain_ticks(panel, "x")
    panel.legend(fontsize=8)


def draw_frontier(panel: "Axes", found: Findings) -> None:
    """Compute-optimal parameters over FLOPs, with the resamples' band, beside published laws."""
    law, fit = found.fit.law, found.fit
    flops_P = found.fitted.more["flops"]
    C = np.geomspace(flops_P.min() / 3, flops_P.max() * 30, 60)
    if not fit.fixed:
        panel.plot(C, [law.compute_optimal(c)[0] for c in C], color="black", linewidth=2,
                   label=f"this fit, a = {law.frontier_exponent:.2f}")  # fmt: skip
        if fit.draws:
            drawn = np.array([[draw.compute_optimal(c)[0] for c in C] for draw in fit.draws[:300]])
            low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
            panel.fill_between(C, low, high, color="black", alpha=0.12, linewidth=0)
    for valley in found.isoflop:
        if valley.best is not None:
            panel.plot(valley.at[0], valley.best, "o", color="tab:red", markersize=6)
    for published, style in zip(FRONTIERS, PUBLISHED_STYLES, strict=True):
        panel.plot(C, [published.compute_optimal(c)[0] for c in C], linestyle=style, linewidth=1.2,
                   label=f"{published.name}, a = {published.frontier_exponent:.2f}")  # fmt: skip
    panel.scatter(flops_P, found.fitted.parameters_P, s=8, color="0.6", label="runs")
    panel.set(xscale="log", yscale="log", xlabel="training FLOPs (6 N D)", ylabel="compute-optimal parameters")
    panel.set_title("frontier", fontsize=10)
    panel.legend(fontsize=7)


def draw_valleys(panel: "Axes", valleys: Sequence[Valley], xlabel: str, labels: Sequence[str]) -> None:
    """Loss over one variable, a line for each valley, its minimum marked."""
    for valley, label in zip(valleys, labels, strict=True):
        (line,) = panel.plot(valley.x, valley.loss, "o-", markersize=4, linewidth=1.2, label=label)
        if valley.best is not None:
            panel.axvline(valley.best, color=line.get_color(), linestyle=":", linewidth=1)
    panel.set(xscale="log", xlabel=xlabel, ylabel="loss (nats a token)")
    if xlabel == "parameters":
        _plain_ticks(panel, "x")
    panel.legend(fontsize=8)


def draw_tuning(panel: "Axes", valleys: Sequence[Valley], name: str) -> None:
    """Loss over learning rate or batch, a line for each size and number of tokens."""
    labels = [f"{short(N)} parameters, {short(D)} tokens" for N, D in (valley.at for valley in valleys)]
    draw_valleys(panel, valleys, name.replace("_", " "), labels)


def plot_transfer(
    tunings: Mapping[str, Sequence[Valley]], name: str, path: str | os.PathLike | None = None
) -> "Figure":
    """Whether the best value stays where it is as models grow: a panel for each way to train them."""
    figure = new_figure(5.6 * len(tunings), 4.6)
    panels = figure.subplots(1, len(tunings), squeeze=False, sharey=True)[0]
    for panel, (title, valleys) in zip(panels, tunings.items(), strict=True):
        draw_tuning(panel, valleys, name)
        panel.set_title(title)
    return saved(figure, path)


def plot_coordinates(
    found: Mapping[str, Sequence[Coordinate]], step: int, path: str | os.PathLike | None = None
) -> "Figure":
    """Mean absolute change at each place over width or depth: a panel for each parametrization."""
    figure = new_figure(5.4 * len(found), 4.8)
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for panel, (title, records) in zip(panels, found.items(), strict=True):
        for place, slope in slopes(records, step).items():
            here = [record for record in records if record.place == place and record.step == step]
            sizes = sorted({record.size for record in here})
            change = [np.exp(np.mean([np.log(r.change) for r in here if r.size == size])) for size in sizes]
            panel.plot(sizes, change, "o-", markersize=4, label=f"{place}, slope {slope:+.2f}")
        panel.set(xscale="log", yscale="log", xlabel=records[0].axis, title=f"{title}, after {step} steps")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.legend(fontsize=8)
    panels[0].set_ylabel("mean |change| since the start")
    return saved(figure, path)


def plot_prediction(
    prediction: Mapping[str, Any], measured: Mapping[str, float | None], path: str | os.PathLike | None = None
) -> "Figure":
    """The points and the law of `prediction.json`, what it predicts with its interval, and what came of it."""
    law, points, runs = prediction["law"], prediction["points"], prediction["runs"]
    colours = _colours(np.array([row["tokens"] for row in (*points, *runs)], float))
    figure = new_figure(7.6, 5.2)
    panel = figure.subplots()
    sizes = np.array([row["parameters"] for row in (*points, *runs)], float)
    N = np.geomspace(sizes.min() * 0.8, sizes.max() * 1.3, 200)
    for D in sorted({row["tokens"] for row in points}):
        curve = law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]
        panel.plot(N, curve, color=colours(D), linewidth=1, label=f"{short(D)} tokens")
    panel.scatter([p["parameters"] for p in points], [p["loss"] for p in points], s=26, zorder=3,
                  c=[colours(p["tokens"]) for p in points])  # fmt: skip
    for row in runs:
        bars = [[row["loss"] - row["low"]], [row["high"] - row["loss"]]]
        panel.errorbar(row["parameters"], row["loss"], yerr=bars, fmt="_", markersize=14, capsize=5,
                       color=colours(row["tokens"]), zorder=3)  # fmt: skip
        if measured.get(row["run"]) is not None:
            panel.scatter(row["parameters"], measured[row["run"]], marker="*", s=120, color=colours(row["tokens"]),
                          edgecolors="black", linewidths=0.7, zorder=5)  # fmt: skip
    panel.scatter([], [], marker="*", s=120, color="white", edgecolors="black", label="measured afterwards")
    panel.errorbar([], [], yerr=[], fmt="_", capsize=5, color="0.4", label="predicted, 90 %")
    panel.set(xscale="log", xlabel=f"parameters ({prediction['counts']})", ylabel="loss (nats a token)")
    ticks = sorted(set(sizes.tolist()))
    panel.set_xticks(ticks, [short(tick) for tick in ticks])
    panel.minorticks_off()
    panel.legend(fontsize=8)
    return saved(figure, path)


def _colours(tokens: np.ndarray):
    """Tokens → a colour, dark to light."""
    from matplotlib import colormaps

    low, high = np.log(tokens.min()), np.log(tokens.max())
    scale = colormaps["viridis"]
    return lambda D: scale(0.85 * (np.log(D) - low) / (high - low) if high > low else 0.4)


def _plain_ticks(panel: "Axes", axis: Literal["x", "y"]) -> None:
    """Ticks of a logarithmic axis as people write them: 20M, 1.5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    chosen = panel.yaxis if axis == "y" else panel.xaxis
    chosen.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0) if axis == "y" else (1.0, 2.0, 5.0)))
    chosen.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    chosen.set_minor_formatter(NullFormatter())
