"""A study as a document: its question, its runs, the laws they follow, what was predicted, and what came of it."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.checks import require
from gptjax.config_files import flat, from_dict
from gptjax.errors import UserError
from gptjax.evaluation.report import REPORT_FILE, changed_fields, environment_table, markdown_table
from gptjax.plain_files import read_json
from gptjax.scaling.conduct import ENDED, STUDY_FILE
from gptjax.scaling.findings import TUNED, Findings, examine, frontiers
from gptjax.scaling.fit import describe, span
from gptjax.scaling.laws import PORIAN_EXPONENTS, short
from gptjax.scaling.optima import tuning_valleys
from gptjax.scaling.plots import plot_findings, plot_prediction, plot_transfer
from gptjax.scaling.predict import read_prediction
from gptjax.scaling.table import Table, read_runs
from gptjax.training.run_dir import load_run_config, write_text
from gptjax.training.summary import read_summary

MEASURED_ONCE = ("optimizer.peak_learning_rate", "training.batch_size")
"""Fields of a grid along which the best is sought; the values of all others are told apart."""
METHOD = "Minima of the parabola, in the logarithm, through the best value and those beside it."


def report_study(folder: Path, out: Path) -> Path:
    """Write `report.md` and its pictures of a study into a folder.

    Returns:
        The document.

    Raises:
        UserError: the folder has no study, none of its runs has finished, matplotlib is missing.
    """
    path = folder / STUDY_FILE
    require(path.is_file(), f"{folder} is no study's folder: it has no {STUDY_FILE}")
    card = read_json(path)
    runs = {name: read_summary(folder / "runs" / name) for name in card["runs"]}
    ended = [name for name, summary in runs.items() if summary is not None and summary["stopped"] in ENDED]
    require(bool(ended), f"none of the {len(runs)} runs of {folder} has ended")
    everything = read_runs([folder])
    parts = [f"# Study {folder.name}", f"> {card['question']}", *_prediction(folder, runs, out)]
    parts += _laws(folder, card, everything, out)
    parts += ["## Runs", *_runs(folder, runs, everything)]
    base = from_dict(card["runs"][ended[0]])
    _, environment = load_run_config(folder / "runs" / ended[0])
    parts += ["## Configuration", f"Of {ended[0]}, where it differs from the defaults:", changed_fields(base)]
    parts += ["## Environment", environment_table(environment)]
    report = out / REPORT_FILE
    write_text(report, "\n\n".join(parts) + "\n")
    return report


def _prediction(folder: Path, runs: Mapping[str, Mapping[str, Any] | None], out: Path) -> list[str]:
    prediction = read_prediction(folder)
    if prediction is None:
        return []
    measured = {name: None if summary is None else summary.get("val_loss") for name, summary in runs.items()}
    plot_prediction(prediction, measured, out / "prediction.png")
    law, bounds = prediction["law"], prediction["intervals"]
    coefficients = [
        (name, f"{value:.4g}", "" if bounds[name] is None else f"{bounds[name][0]:.4g} to {bounds[name][1]:.4g}")
        for name, value in law.items()
    ]
    rows, errors = [], []
    for row in prediction["runs"]:
        found = measured.get(row["run"])
        error = None if found is None else row["loss"] / found - 1
        errors += [] if error is None else [abs(error)]
        interval = f"{row['low']:.4f} to {row['high']:.4f}"
        inside = "" if found is None else "yes" if row["low"] <= found <= row["high"] else "no"
        after = ("not trained yet", "", "") if found is None else (f"{found:.4f}", f"{100 * error:+.2f} %", inside)
        rows.append(
            (row["run"], f"{row['parameters']:,}", f"{row['tokens']:,}", f"{row['loss']:.4f}", interval, *after)
        )
    verdict = f" The largest error is {100 * max(errors):.2f} %." if errors else ""
    header = ("run", "parameters", "tokens", "predicted", "90 % interval", "measured", "error", "inside")
    return [
        "## The prediction",
        f"Written to `prediction.json` at {prediction['made']}, before any of these runs was begun, from "
        f"{len(prediction['points'])} runs of smaller sizes.{verdict}",
        markdown_table(header, rows),
        "![the law over the points that it was fitted to, the predictions, and what was measured](prediction.png)",
        "The law as it was then, L(N, D) = E + A / N^alpha + B / D^beta:",
        markdown_table(("coefficient", "value", "90 % interval"), coefficients),
    ]


def _laws(folder: Path, card: Mapping[str, Any], everything: Table, out: Path) -> list[str]:
    """A section for each combination of what the grid tells apart, and the learning rates side by side."""
    apart = [name for name in card["grid"] if name not in MEASURED_ONCE and not name.endswith("seed")]
    configs = [flat(from_dict(values)) for values in card["runs"].values()]
    values = [list(dict.fromkeys(str(config[name]) for config in configs)) for name in apart]
    parts, groups = [], {}
    for number, chosen in enumerate(itertools.product(*values)):
        title = ", ".join(chosen)
        where = dict(zip(apart, chosen, strict=True))
        try:
            table = read_runs([folder], where=where)
        except UserError as error:
            parts += [f"## {title or 'The law'}", f"Nothing to fit: {error}."]
            continue
        groups[title] = table
        parts += [f"## The law{f' with {title}' if title else ''}"]
        try:
            found = examine(table)
        except UserError as error:
            parts += [f"No law is fitted: {error}."]
            continue
        picture = f"fit-{number}.png" if title else "fit.png"
        plot_findings(found, out / picture)
        parts += [*_fit(found), f"![the law, its residuals and its frontier]({picture})"]
    return parts + _tunings(groups, out)


def _fit(found: Findings) -> list[str]:
    parts = [f"{len(found.fitted.names)} points: {span(found.fit.law)}."]
    parts += [markdown_table(("coefficient", "value", "90 % interval"), describe(found.fit))]
    if not found.fit.fixed:
        flops = [factor * float(found.table.more["flops"].max()) for factor in (1, 10)]
        rows = []
        for row in frontiers(found, flops):
            bounds = "" if row["interval"] is None else f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}"
            sizes = [f"{short(o['parameters'])} on {short(o['tokens'])}" for o in row["optima"]]
            rows.append((row["name"], row["counts"], f"{row['exponent']:.3f}", bounds, *sizes))
        header = ("law", "counts", "a in N* ∝ C^a", "90 % interval", *(f"N* on D* at {C:.2g} FLOPs" for C in flops))
        porian = ", ".join(f"{name} {exponent:.3f}" for name, exponent in PORIAN_EXPONENTS.items())
        parts += [markdown_table(header, rows), f"Porian et al. 2024 on what makes a: {porian}."]
    notes = [note for note in found.notes if note]
    return [*parts, *(["Left out, or to know:\n\n" + "\n".join(f"- {note}" for note in notes)] if notes else [])]


def _tunings(groups: Mapping[str, Table], out: Path) -> list[str]:
    parts = []
    for name in TUNED:
        tunings = {title: valleys for title, table in groups.items() if (valleys := tuning_valleys(table, name))}
        if not tunings:
            continue
        picture = f"{name}.png"
        plot_transfer(tunings, name, out / picture)
        rows, moves = [], []
        for title, valleys in tunings.items():
            best = [valley.best for valley in valleys if valley.best is not None]
            for valley in valleys:
                shown = "at the edge of what was tried" if valley.best is None else f"{valley.best:.3g}"
                rows.append((title or "all", *map(short, valley.at), shown, f"{valley.loss.min():.4f}"))
            if len(best) == len(valleys) > 1:
                sizes = [valley.at[0] for valley in valleys]
                moved = f"{max(best) / min(best):.2f} times while parameters grow {max(sizes) / min(sizes):.0f} times"
                moves.append(f"- {title or 'all'}: the best value moves {moved}")
        words = name.replace("_", " ")
        parts += [f"## The best {words}", METHOD]
        parts += [markdown_table(("", "parameters", "tokens", f"best {words}", "lowest loss"), rows)]
        parts += ["\n".join(moves)] if moves else []
        parts += [f"![loss over {words}]({picture})"]
    return parts


def _runs(folder: Path, runs: Mapping[str, Mapping[str, Any] | None], everything: Table) -> list[str]:
    count = dict(zip(everything.names, everything.parameters_P, strict=True))
    rows, seconds = [], 0.0
    for name, summary in runs.items():
        if summary is None:
            rows.append((name, "", "", "", "", "", "not trained yet"))
            continue
        seconds += summary.get("wall_seconds") or 0.0
        loss, bits = (summary.get(key) for key in ("val_loss", "val_bits_per_byte"))
        rows.append(
            (
                name,
                f"{count[name]:,.0f}" if name in count else "",
                f"{summary['tokens']:,}",
                "" if loss is None else f"{loss:.4f}",
                "" if bits is None else f"{bits:.4f}",
                f"{summary.get('wall_seconds') or 0:,.0f}",
                summary["stopped"],
            )
        )
    header = ("run", f"parameters ({everything.counts})", "tokens", "loss", "bits a byte", "seconds", "ended")
    return [
        markdown_table(header, rows),
        f"{seconds / 60:.0f} minutes of these processes in all, where a branch counts its trunk's as well.",
    ]
