"""What a run tells while it goes: `metrics.jsonl`, the progress at the terminal, the loss curve.

Units: losses in nats a token, learning rates and gradient norms without one, times in seconds.
"""

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gptjax.errors import UserError
from gptjax.plain_files import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.progress import Progress

METRICS_FILE = "metrics.jsonl"
TRAINING = (
    *("step", "tokens", "loss", "learning_rate", "grad_norm", "skipped_steps"),
    *("tokens_per_second", "mfu", "data_wait_fraction", "seconds"),
)
"""What every stage's line of `metrics.jsonl` has; whatever else there is has the stage's own names."""


@dataclass(frozen=True)
class MetricsLog:
    """Appends to a `metrics.jsonl`."""

    path: str | os.PathLike

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, whole when this returns; its values may be NumPy or JAX scalars.

        Raises:
            UserError: it cannot be written: the disk is full, say.
        """
        try:
            with Path(self.path).open("a", encoding="utf-8") as file:
                file.write(metrics_line(record))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error


def metrics_line(record: Mapping[str, Any]) -> str:
    """A record as it stands in `metrics.jsonl`."""
    return to_json(record, ascii_only=True) + "\n"


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without a last line that a killed run left half written.

    Raises:
        UserError: there is no such file, or a line before the last is broken.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise UserError(f"there are no metrics at {path}") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break is empty or half a line
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"line {number} of {path} is not JSON: {line[:60]!r}") from error
    return records


class Console:
    """Progress for people: a bar in place at a terminal, plain lines anywhere else.

    Use it in a `with`: leaving that gives the terminal its last line and its cursor back.
    """

    def __init__(self, file: TextIO | None = None):
        """Show progress on `file`; None is standard output."""
        self._file = file or sys.stdout
        self._bar = _make_bar(self._file) if self._file.isatty() else None
        self._first: tuple[int, float] | None = None

    def log(self, record: Mapping[str, Any], steps: int) -> None:
        """Show a training record of `metrics.jsonl`; None values are unknown.

        Args:
            steps: where the run ends, for the bar and the time left.
        """
        numbers = training_line(record, self._eta(record, steps))
        line = f"step {record['step']:>{len(str(steps))}}/{steps}  {numbers}"
        if self._bar is None:
            self.message(line)
            return
        if not self._bar.tasks:
            self._bar.add_task(line)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=line, total=steps, completed=record["step"])

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        """Show an evaluation's record of `metrics.jsonl`, on a line that stays."""
        self.message(evaluation_line(record))

    def message(self, text: str) -> None:
        """Show text on lines that stay, above the bar where there is one."""
        if self._bar is None:
            print(text, file=self._file, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _eta(self, record: Mapping[str, Any], steps: int) -> float | None:
        """Seconds left, at the pace since this console's first record: evaluations and saves count."""
        now = record["step"], record["seconds"]
        if self._first is None or now[0] < self._first[0]:  # a run that has gone back begins anew
            self._first = now
        first_step, first_seconds = self._first
        if now[0] == first_step:
            return None
        return (steps - now[0]) * (now[1] - first_seconds) / (now[0] - first_step)

    def close(self) -> None:
        """Leave the bar as it stands; what follows is plain lines below it."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def training_line(record: Mapping[str, Any], eta_seconds: float | None) -> str:
    """The numbers of a training record in one line, the ones that a narrow terminal cuts off last."""
    fields = (
        ("loss {:.3f}", record["loss"]),
        *((f"{name.replace('_', ' ')} {{:.3g}}", value) for name, value in record.items() if _is_shown(name)),
        ("{:,.0f} tok/s", record["tokens_per_second"]),
        ("MFU {:.1%}", record["mfu"]),
        ("ETA {}", None if eta_seconds is None else _clock(eta_seconds)),
        ("lr {:.1e}", record["learning_rate"]),
        ("grad {:.2f}", record["grad_norm"]),
        ("data wait {:.1%}", record["data_wait_fraction"]),
        *([("skipped {}", record["skipped_steps"])] if record.get("skipped_steps") else []),
    )
    return "  ".join(
        re.sub("{.*}", "unknown", form) if value is None else form.format(value).replace("%", " %")
        for form, value in fields
    )


def _is_shown(name: str) -> bool:
    """Whether a number of the stage's own is for people, too: what took how long is for later."""
    return name not in TRAINING and not name.endswith("_seconds")


def evaluation_line(record: Mapping[str, Any]) -> str:
    """The numbers of an evaluation in one line."""
    if "val_perplexity" not in record:
        found = {name.removeprefix("val_"): value for name, value in record.items() if name.startswith("val_")}
        numbers = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items() if value is not None)
        return f"step {record['step']}  validation  {'  '.join(numbers)}"
    return (
        f"step {record['step']}  validation {record['val_loss']:.3f} nats/token  "
        f"{record['val_bits_per_byte']:.2f} bits/byte  perplexity {record['val_perplexity']:.1f}"
    )


def _make_bar(file: TextIO) -> "Progress":
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    # A narrow terminal cuts the line short: wrapped, it would fill the screen.
    column = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    line = TextColumn("{task.description}", markup=False, table_column=column)
    return Progress(BarColumn(bar_width=10), line, console=RichConsole(file=file), expand=True)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, without leading zeros: 1:23 or 2:00:05."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if text.startswith("0:") else text


def plotted(records: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What a run is about, by its name among the metrics, and with its unit."""
    names = set().union(*records)
    if "reward" in names:
        return "reward", "reward"
    return "loss", "loss" if "val_accuracy" in names else "loss (nats per token)"


def plot_loss(
    run_or_metrics: str | os.PathLike | Sequence[Mapping[str, Any]], path: str | os.PathLike | None = None
) -> "Figure":
    """Training and validation loss against the step; of a run that is rewarded, rewards.

    The figure is drawn without pyplot, so that it needs no display and touches no global state.

    Args:
        run_or_metrics: a run folder, or the records that `read_metrics` gives.
        path: where to write the figure as well; the ending chooses the format, such as .png.

    Raises:
        UserError: matplotlib is missing, or nothing was logged yet.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('plots need matplotlib: pip install "gptjax[log]"') from error

    records = run_or_metrics
    if isinstance(run_or_metrics, str | os.PathLike):
        records = read_metrics(Path(run_or_metrics) / METRICS_FILE)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    curve, label = plotted(records)
    axes = figure.add_subplot(xlabel="step", ylabel=label)
    for key, label, style in (
        (curve, "training", {"linewidth": 1.0}),
        (f"val_{curve}", "validation", {"marker": "o", "markersize": 4.0, "linewidth": 1.5}),
    ):
        points = [
            (record["step"], math.nan if record[key] is None else record[key]) for record in records if key in record
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if not axes.lines:
        raise UserError("there is no loss to plot: nothing was logged yet")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
