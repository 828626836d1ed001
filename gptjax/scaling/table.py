"""What a fit reads: a row for each run, from a table with named columns, from a study's folder, or from runs.

Shape suffixes: P rows.
"""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from gptjax.checks import require
from gptjax.config_files import flat
from gptjax.errors import UserError
from gptjax.plain_files import read_json, read_text
from gptjax.scaling.conduct import STUDY_FILE
from gptjax.scaling.laws import Counting, counted_parameters
from gptjax.training.run_dir import CONFIG_FILE, load_run_config
from gptjax.training.summary import read_summary

NEEDED = ("parameters", "tokens", "loss")
OPTIONAL = ("flops", "unique_tokens", "learning_rate", "batch_tokens")
"""Columns that a fit of more than the loss law reads."""
ENDED = "finished"
"""What a `status` column says of rows that count; rows of any other status are listed and left out."""


@dataclass(frozen=True)
class Table:
    """Runs as columns."""

    source: str
    counts: Counting
    """How its parameters are counted."""
    names: tuple[str, ...]
    """A run's name, or `row 7`."""
    parameters_P: np.ndarray
    tokens_P: np.ndarray
    loss_P: np.ndarray
    """Nats a token."""
    more: Mapping[str, np.ndarray]
    """(P,) of those of the optional columns that are there; `flops` is 6 N D where it is not."""
    excluded: tuple[str, ...] = ()
    """Rows that were left out, and why."""

    def where(self, chosen_P: np.ndarray, note: Sequence[str] = ()) -> "Table":
        """The rows at these places, in order (a mask or indices)."""
        chosen_P = np.arange(len(self.names))[chosen_P]
        return dataclasses.replace(
            self,
            names=tuple(self.names[index] for index in chosen_P),
            parameters_P=self.parameters_P[chosen_P],
            tokens_P=self.tokens_P[chosen_P],
            loss_P=self.loss_P[chosen_P],
            more={name: column[chosen_P] for name, column in self.more.items()},
            excluded=(*self.excluded, *note),
        )


def read_table(
    path: str | os.PathLike, *, columns: Mapping[str, str] | None = None, counts: Counting = "total"
) -> Table:
    """A CSV file with a line of column names: parameters, tokens and loss, or flops (6 N D) for one of the first two.

    Args:
        columns: our name → the file's, where they differ.
        counts: how its parameters are counted.

    Raises:
        UserError: a column is missing, or a row has a value that is missing or not positive (which rows).
    """
    path, columns = Path(path), dict(columns or {})
    require(path.is_file(), f"no table {path}")
    header, rows = _cells(path)
    unknown = [name for name in columns if name not in (*NEEDED, *OPTIONAL, "status")]
    require(not unknown, f"--columns {unknown[:1]}: what can be read is {', '.join((*NEEDED, *OPTIONAL))} and status")
    missing = [name for name in columns.values() if name not in header]
    require(not missing, f"{path} has no column {missing[:1]}; it has {', '.join(header)}")
    place = {name: columns.get(name, name) for name in (*NEEDED, *OPTIONAL, "status")}
    place = {name: column for name, column in place.items() if column in header}
    absent = [name for name in NEEDED if name not in place]
    if "loss" in absent or (absent and ("flops" not in place or len(absent) > 1)):
        raise UserError(
            f"{path} has no column {' and '.join(absent)}; it has {', '.join(header)}. Needed are loss and two of "
            f"parameters, tokens, flops; --columns {absent[0]}=NAME says that a column has another name"
        )
    require(bool(rows), f"{path} has no rows")
    kept, excluded = [], []
    for number, row in rows:
        status = (row.get(place.get("status", "")) or ENDED).strip()
        loss = _number(row.get(place["loss"]))
        if status != ENDED:
            excluded.append(f"row {number}: {status}")
        elif loss is not None and not math.isfinite(loss):
            excluded.append(f"row {number}: diverged, loss {row[place['loss']]}")
        else:
            kept.append((number, row))
    values = {name: [_number(row.get(column)) for _, row in kept] for name, column in place.items() if name != "status"}
    for name, column in values.items():
        bad = [kept[i][0] for i, v in enumerate(column) if v is None or not 0 < v < math.inf]
        require(
            not bad,
            f"{path}: {place[name]} is missing or not a positive number in row{'s' if len(bad) > 1 else ''} "
            f"{', '.join(map(str, bad[:8]))}{f' and {len(bad) - 8} more' if len(bad) > 8 else ''}",
        )
    arrays = {name: np.array(column, float) for name, column in values.items()}
    if absent:
        other = "tokens" if absent[0] == "parameters" else "parameters"
        arrays[absent[0]] = arrays["flops"] / (6 * arrays[other])
    names = tuple(row.get("run") or f"row {number}" for number, row in kept)
    return _table(str(path), counts, names, arrays, excluded)


def _cells(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The names of the columns, and the rows that are not empty with the numbers that an editor gives their lines.

    Raises:
        UserError: it is no table that commas separate, or a row has more cells than there are columns.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as error:
        raise UserError(f"{path} is no table: {error} in row {reader.line_num}") from error
    _, header = lines[0] if lines else (1, [])
    while header and not header[-1]:
        header.pop()
    mark = next((mark for mark in ";\t" if len(header) == 1 and mark in header[0]), None)
    require(
        mark is None,
        f"{path} separates its columns with {mark!r}; separate them with commas, and write 3.5 rather than 3,5",
    )
    twice = [name for name in header if header.count(name) > 1]
    require(not twice, f"{path} has several columns {twice[:1]}; give each a name of its own")
    for number, cells in lines[1:]:
        more = [cell for cell in cells[len(header) :] if cell]
        require(
            not more,
            f"{path}: row {number} has {len(more)} more cell{'s' * (len(more) > 1)} than there are columns, "
            f"{', '.join(more[:3])}; write 3.5 rather than 3,5",
        )
    return header, [(number, dict(zip(header, cells, strict=False))) for number, cells in lines[1:]]


def read_runs(
    paths: Sequence[str | os.PathLike], *, counts: Counting | None = None, where: Mapping[str, str] | None = None
) -> Table:
    """Runs, and the runs of studies' folders.

    Args:
        where: fields of the configuration (`section.field`) and the values, as text, of the runs that are wanted.
        counts: how to count parameters. None: as the study does; of runs that are of none, non_embedding_and_head.

    Raises:
        UserError: a folder is neither a study nor a run, two studies count differently, or nothing has finished.
    """
    runs: list[Path] = []
    said: set[Counting] = set()
    for path in map(Path, paths):
        if (path / STUDY_FILE).is_file():
            card = read_json(path / STUDY_FILE)
            said.add(card["counts"])
            runs += [path / "runs" / name for name in card["runs"]]
        else:
            require((path / CONFIG_FILE).is_file(), f"{path} is neither a run, a study's folder nor a .csv table")
            runs.append(path)
    if counts is None:
        require(len(said) < 2, f"the studies count parameters differently ({', '.join(said)}); say how with --counts")
        counts = next(iter(said), "non_embedding_and_head")
    rows, names, excluded, kinds = [], [], [], set()
    for run in runs:
        summary = read_summary(run) if (run / CONFIG_FILE).is_file() else None
        status = "not trained yet" if summary is None else summary["stopped"]
        loss = None if summary is None else summary.get("val_loss")
        if status != ENDED or loss is None or not math.isfinite(loss):
            excluded.append(f"{run.name}: {status if status != ENDED else 'without a validation loss'}")
            continue
        config, _ = load_run_config(run)
        fields = flat(config)
        unknown = [name for name in where or {} if name not in fields]
        require(not unknown, f"where {unknown[:1]} is no field of a configuration, such as model.parametrization")
        if any(str(fields[name]) != value for name, value in (where or {}).items()):
            continue
        kinds.add(config.model.parametrization)
        names.append(run.name)
        batch = config.training.batch_size * config.sequence_length
        parameters = counted_parameters(config.model, counts)
        rows.append((parameters, summary["tokens"], loss, config.optimizer.peak_learning_rate, batch))
    wanted = "".join(f" with {name} {value}" for name, value in (where or {}).items())
    require(bool(rows), f"none of the {len(runs)} runs{wanted} has finished: {'; '.join(excluded[:3])}")
    if len(kinds) > 1:
        excluded.append(f"parametrizations are mixed: {', '.join(sorted(kinds))}; model.parametrization selects one")
    arrays = dict(zip((*NEEDED, "learning_rate", "batch_tokens"), np.array(rows, float).T, strict=True))
    return _table(", ".join(map(str, paths)), counts, tuple(names), arrays, excluded)


def read(
    paths: Sequence[str], columns: Mapping[str, str], counts: Counting | None, where: Mapping[str, str] | None = None
) -> Table:
    """One table, or runs and studies.

    Raises:
        UserError: as both, and for an unknown way to count.
    """
    require(counts in (None, *get_args(Counting)), f"counts {counts} is not one of {', '.join(get_args(Counting))}")
    tables = [path for path in paths if path.lower().endswith(".csv")]
    if tables:
        require(len(paths) == 1, f"one table, or runs, but not {', '.join(paths)}; put the rows into one file")
        require(not where, "--where names fields of runs' configurations, and a table has none")
        return read_table(paths[0], columns=columns, counts=counts or _said_beside(Path(paths[0])) or "total")
    require(not columns, "--columns names columns of a table, and runs have none")
    return read_runs(paths, counts=counts, where=where)


def _said_beside(table: Path) -> Counting | None:
    """How the study counts whose table this is, if it is one's."""
    study = table.with_name(STUDY_FILE)
    return read_json(study)["counts"] if study.is_file() else None


def best_tuned(table: Table) -> Table:
    """Of runs with the same parameters and tokens that differ in learning rate or batch, the best: what tuning is for.

    Rows that differ in nothing (measured twice, other seeds) all stay.
    """
    tuned = [table.more[name] for name in ("learning_rate", "batch_tokens") if name in table.more]
    groups: dict[tuple[float, float], list[int]] = {}
    for index, key in enumerate(zip(table.parameters_P.tolist(), table.tokens_P.tolist(), strict=True)):
        groups.setdefault(key, []).append(index)
    keep = np.zeros(len(table.names), bool)
    for members in groups.values():
        settings = [tuple(column[index] for column in tuned) for index in members]
        best = settings[int(np.argmin(table.loss_P[members]))]
        keep[[index for index, setting in zip(members, settings, strict=True) if setting == best]] = True
    left = int((~keep).sum())
    note = [f"{left} runs of other learning rates or batches than the best of their size and tokens"] if left else []
    return table.where(keep, note)


def _table(source, counts, names, arrays, excluded) -> Table:
    more = {name: arrays[name] for name in OPTIONAL if name in arrays}
    more.setdefault("flops", 6 * arrays["parameters"] * arrays["tokens"])
    return Table(source, counts, names, *(arrays[name] for name in NEEDED), more=more, excluded=tuple(excluded))


def _number(text: str | None) -> float | None:
    """None: no number."""
    try:
        return float(text) if text and text.strip() else None
    except ValueError:
        return None
