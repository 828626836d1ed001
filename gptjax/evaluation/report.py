"""A run as a document: what it learned, what it cost, what it writes, and how to have it again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.config import Config
from gptjax.config_files import flat
from gptjax.evaluation.pictures import new_figure, saved
from gptjax.training.metrics import METRICS_FILE, plotted, read_metrics
from gptjax.training.run_dir import SAMPLES_FILE, load_run_config, write_text
from gptjax.training.summary import read_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE = "report.md"
CURVES_FILE = "curves.png"
SHOWN_SAMPLES = 3
"""The last ones."""


def report_run(run: Path, out: Path) -> Path:
    """Write `report.md` and `curves.png` of a run into a folder.

    Returns:
        The document.

    Raises:
        UserError: the folder is no run, matplotlib is missing, or a file cannot be written.
    """
    config, environment = load_run_config(run)
    summary, metrics = read_summary(run), run / METRICS_FILE
    records = read_metrics(metrics) if metrics.is_file() else []
    parts = [f"# Run {run.name}", *_outcome(summary)]
    if records:
        plot_curves(records, out / CURVES_FILE)
        parts += ["## Curves", f"![loss, learning rate, gradient norm and speed over tokens]({CURVES_FILE})"]
    if summary:
        parts += ["## Where the time went", *_goodput(summary)]
    samples = run / SAMPLES_FILE
    if samples.is_file() and (text := samples.read_text(encoding="utf-8").strip()):
        pieces = text.split("\n## ")
        parts += ["## Samples", "\n\n".join(f"### {piece.removeprefix('## ')}" for piece in pieces[-SHOWN_SAMPLES:])]
    parts += ["## Configuration", "What differs from the defaults:", changed_fields(config)]
    parts += ["## Environment", environment_table(environment)]
    path = out / REPORT_FILE
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def plot_curves(records: Sequence[Mapping[str, Any]], path: Path | None = None) -> "Figure":
    """Loss or reward, learning rate or KL, norm of the gradient and speed, over the tokens trained on."""
    figure = new_figure(11, 6.6)
    panels = figure.subplots(2, 2)
    curve, label = plotted(records)
    steered = any("kl" in record for record in records)
    named = (
        (panels[0, 0], (curve, f"val_{curve}"), label),
        (panels[0, 1], ("kl",), "KL from the start, nats an answer")
        if steered
        else (panels[0, 1], ("learning_rate",), "learning rate"),
        (panels[1, 0], ("grad_norm",), "norm of the gradient, before clipping"),
        (panels[1, 1], ("tokens_per_second",), "tokens a second"),
    )
    for panel, names, label in named:
        for name in names:
            points = [(record["tokens"], record[name]) for record in records if record.get(name) is not None]
            style = "o-" if name.startswith("val_") else "-"
            panel.plot(
                *zip(*points, strict=True) if points else ([], []), style, markersize=3, linewidth=1.2, label=name
            )
        panel.set(xlabel="tokens", ylabel=label)
        if len(names) > 1:
            panel.legend()
    panels[1, 1].set_ylim(bottom=0)
    return saved(figure, path)


def _outcome(summary: Mapping[str, Any] | None) -> list[str]:
    if summary is None:
        return ["It has not ended: there is no summary yet."]
    shown = {
        "how it ended": summary["stopped"],
        "steps": f"{summary['step']:,}",
        "tokens": _number(summary.get("tokens"), ",d"),
        "parameters": _number(summary.get("parameters"), ",d"),
        "validation loss, nats a token": _number(summary.get("val_loss"), ".4f"),
        "bits a byte": _number(summary.get("val_bits_per_byte"), ".4f"),
        "perplexity": _number(summary.get("val_perplexity"), ".2f"),
        "skipped steps": _number(summary.get("skipped_steps"), "d"),
        "tokens a second, median": _number(summary.get("tokens_per_second"), ",.0f"),
        "MFU, median": _number(summary.get("mfu"), ".1%"),
        "peak memory": _number(summary.get("peak_memory_bytes"), ",d", " bytes"),
    }
    return [markdown_table(("", ""), [*shown.items()])]


def _goodput(summary: Mapping[str, Any]) -> list[str]:
    seconds, wall = summary.get("seconds") or {}, summary.get("wall_seconds")
    if not wall:
        return ["The run did not say."]
    rows = [(kind, f"{value:,.1f}", f"{value / wall:.1%}") for kind, value in seconds.items() if value > 0]
    rows.sort(key=lambda row: -seconds[row[0]])
    productive = summary.get("productive_seconds", 0) / wall
    return [
        f"Goodput: {productive:.1%} of {wall:,.0f} s were training steps and their data.",
        markdown_table(("", "seconds", "share"), rows),
    ]


def changed_fields(config: Config) -> str:
    """A table of the fields that are not the defaults."""
    default = flat(Config())
    rows = [(f"`{name}`", f"`{value}`") for name, value in flat(config).items() if value != default.get(name)]
    return markdown_table(("field", "value"), [row for row in rows if row[0] != "`run_dir`"])


def environment_table(environment: Mapping[str, Mapping[str, Any]]) -> str:
    """Versions, devices and revision as `config.json` has them."""
    rows = [
        (f"{section}.{name}", str(value))
        for section, values in environment.items()
        for name, value in values.items()
        if value not in (None, "")
    ]
    return markdown_table(("", ""), rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of GitHub's Markdown, figures to the right."""
    columns = range(len(header))
    lines = [header, ["---" if column == 0 else "---:" for column in columns], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: Any, form: str, unit: str = "") -> str:
    return "unknown" if value is None else format(int(value) if form.endswith("d") else value, form) + unit
