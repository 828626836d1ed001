"""`python -m gptjax fit RUNS|TABLE.csv`: the scaling laws that runs follow."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax import cli
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.scaling.findings import Findings, Tuning


@dataclass(frozen=True)
class FitArguments:
    """What `python -m gptjax fit` was asked for."""

    columns: tuple[str, ...] = ()
    """Columns of the table that have other names, OURS=THEIRS: loss=val_loss. Ours are parameters, tokens, loss, flops,
    unique_tokens, learning_rate, batch_tokens and status."""
    counts: str | None = None
    """How parameters are counted: total, non_embedding or non_embedding_and_head. None: total in a table, as a study
    says, and with the head in runs."""
    where: tuple[str, ...] = ()
    """Runs that are wanted, FIELD=VALUE: model.parametrization=mup."""
    hold_out_above: float | None = None
    """Models of more parameters are not fitted to, but predicted and compared. None: all are fitted to."""
    predict: tuple[str, ...] = ()
    """What to predict, PARAMETERS:TOKENS: 13e9:300e9."""
    flops: tuple[float, ...] = ()
    """Budgets for which to give the best size. None: ten and a hundred times the largest of the table."""
    resamples: int = 500
    """Fits of resampled points, from which the intervals are."""
    huber_delta: float = 1e-3
    """Differences in log loss that count by their size and no longer by their square. 1: least squares."""
    seed: int = 0
    """Of the resampling."""
    out: str | None = None
    """Picture of the fit, its residuals and its frontier, .png or another kind. None: no picture."""
    json: str | None = None
    """File for everything as one JSON object; - is standard output. None: tables."""

    def __post_init__(self):
        if self.resamples < 0 or not self.huber_delta > 0:
            raise UserError(
                f"resamples {self.resamples} must not be negative, and huber-delta {self.huber_delta} positive"
            )
        low = [value for value in (*self.flops, self.hold_out_above or 1.0) if not value > 0]
        if low:
            raise UserError(f"{low[0]:g} is no positive number of FLOPs or parameters")


def main(arguments: Sequence[str]) -> int:
    """Fit scaling laws to runs, a study or a table, with intervals, beside the published ones."""
    import tyro

    paths = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    prog = "python -m gptjax fit RUN|STUDY|TABLE.csv ..."
    parsed = tyro.cli(FitArguments, args=arguments[len(paths) :], prog=prog, description=main.__doc__)
    if not paths:
        raise UserError("nothing to fit; write: python -m gptjax fit TABLE.csv, or the folder of a study, or runs")
    cli.check_output("--json", parsed.json)
    asked = [_pair(text) for text in parsed.predict]
    columns = dict(_setting(text, "--columns", "loss=val_loss") for text in parsed.columns)
    where = dict(_setting(text, "--where", "model.parametrization=mup") for text in parsed.where)

    from gptjax.parallel import platform

    platform.configure()

    from gptjax.evaluation.pictures import require_picture
    from gptjax.scaling.findings import examine, to_json
    from gptjax.scaling.table import read

    if parsed.out is not None:
        require_picture(parsed.out)
        cli.check_output("--out", parsed.out)
    table = read(paths, columns, parsed.counts, where)
    found = examine(
        table,
        hold_out_above=parsed.hold_out_above,
        resamples=parsed.resamples,
        seed=parsed.seed,
        delta=parsed.huber_delta,
    )
    flops = parsed.flops or tuple(factor * float(table.more["flops"].max()) for factor in (10, 100))
    if parsed.json is not None:
        cli.write_json(parsed.json, to_json(found, asked, flops))
    if parsed.json != "-":
        show(found, asked, flops)
    if parsed.out is not None:
        from gptjax.scaling.plots import plot_findings

        plot_findings(found, parsed.out)
        (cli.print_to_stderr if parsed.json == "-" else print)(f"picture: {parsed.out}")
    return 0


def _pair(text: str) -> tuple[float, float]:
    try:
        parameters, tokens = map(float, text.split(":"))
    except ValueError:
        raise UserError(f"--predict {text} is not PARAMETERS:TOKENS, such as 13e9:300e9") from None
    if not (parameters > 0 and tokens > 0):
        raise UserError(f"--predict {text}: parameters and tokens must be positive")
    return parameters, tokens


def _setting(text: str, option: str, example: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise UserError(f"{option} {text} is not NAME=VALUE, such as {example}")
    return ours, theirs


def show(found: "Findings", asked: Sequence[tuple[float, float]], flops: Sequence[float]) -> None:
    """Print everything as tables."""
    from gptjax.scaling.findings import extrapolations, frontiers
    from gptjax.scaling.fit import describe, span
    from gptjax.scaling.laws import PORIAN_EXPONENTS, short

    print(f"{len(found.fitted.names)} points of {found.table.source}: {span(found.fit.law)}")
    for note in found.notes:
        print(f"left out, or to know: {note}")
    table = cli.make_table("L(N, D) = E + A / N^alpha + B / D^beta", "", "value", "90 % interval")
    for row in describe(found.fit):
        table.add_row(*row)
    cli.print_wide(table)
    rows = extrapolations(found, asked)
    if rows:
        table = cli.make_table("extrapolated", "", "parameters", "tokens", "loss", "90 % interval", "measured", "error")
        for row in rows:
            measured = "" if row["measured"] is None else f"{row['measured']:.4f}"
            error = "" if row["error"] is None else f"{100 * row['error']:+.2f} %"
            bounds = f"{row['low']:.4f} to {row['high']:.4f}" if row["low"] == row["low"] else ""
            sizes = short(row["parameters"]), short(row["tokens"])
            table.add_row(row["name"], *sizes, f"{row['loss']:.4f}", bounds, measured, error)
        cli.print_wide(table)
        for warning in dict.fromkeys(row["warning"] for row in rows if row["warning"]):
            print(f"warning: {warning}")
    table = cli.make_table("compute-optimal", "", "counts", "a in N* ∝ C^a", "90 % interval", *_headings(flops))
    for row in frontiers(found, flops):
        bounds = "" if row["interval"] is None else f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}"
        sizes = [f"{short(o['parameters'])} on {short(o['tokens'])}" for o in row["optima"]]
        table.add_row(row["name"], row["counts"], f"{row['exponent']:.3f}", bounds, *sizes)
    for name, exponent in PORIAN_EXPONENTS.items():
        table.add_row(f"Porian, {name}", "", f"{exponent:.3f}")
    cli.print_wide(table)
    for name, tuning in found.tunings.items():
        _show_tuning(name, tuning)
    if found.repeated is not None:
        law, bounds = found.repeated.law, found.repeated.repeats_interval
        interval = "" if bounds is None else f", {bounds[0]:.3g} to {bounds[1]:.3g}"
        print(f"repeated text: R*_D = {law.repeats_tokens:.3g}{interval} (published: 15.4)")


def _headings(flops: Sequence[float]) -> list[str]:
    return [f"N* on D* at {value:.2g} FLOPs" for value in flops]


def _show_tuning(name: str, tuning: "Tuning") -> None:
    from gptjax.scaling.laws import TUNING_LAWS, short

    table = cli.make_table(f"best {name}", "parameters", "tokens", "best", *(law.name for law in TUNING_LAWS))
    for valley in tuning.valleys:
        best = "at the edge" if valley.best is None else f"{valley.best:.3g}"
        published = [f"{getattr(law, name)(*valley.at):.3g}" for law in TUNING_LAWS]
        table.add_row(*map(short, valley.at), best, *published)
    cli.print_wide(table)
    if tuning.law is not None:
        terms = zip(tuning.variables, tuning.law.exponents, tuning.law.intervals, strict=True)
        shown = [
            f"{variable}^{exponent:.3f}" + ("" if bounds is None else f" ({bounds[0]:.3f} to {bounds[1]:.3f})")
            for variable, exponent, bounds in terms
        ]
        print(f"{name} = {tuning.law.coefficient:.3g} · {' · '.join(shown)}")
