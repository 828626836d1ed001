"""`python -m gptjax coordinates CONFIG`: whether training moves models of all widths, or of all depths, alike."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gptjax import cli
from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TokenizerConfig
from gptjax.config_files import load_config
from gptjax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

DEFAULT = Path(__file__).parents[2] / "configs" / "quickstart.py"
FLAT = 0.1
"""Slopes below it are those of a parametrization that carries over."""
SIZES = {"width": (64, 128, 256, 512, 1024), "depth": (4, 8, 16, 32)}
PARAMETRIZATIONS = {"width": ("standard", "mup"), "depth": ("mup", "completep")}


@dataclass(frozen=True)
class CoordinatesArguments:
    """What `python -m gptjax coordinates` was asked for."""

    axis: Literal["width", "depth"] = "width"
    """What grows."""
    sizes: tuple[int, ...] = ()
    """Widths or depths. None: 64 to 1024, or 4 to 32."""
    parametrizations: tuple[Literal["standard", "mup", "completep"], ...] = ()
    """What to compare. None: standard and mup over widths, mup and completep over depths."""
    steps: int = 8
    """Of training, all on the same rows at the peak learning rate."""
    seeds: int = 4
    """Initializations of each model."""
    batch_size: int = 1
    """Rows. What tokens learn from each other's gradients is of the order of their number over the width, and no
    parametrization takes it away: few tokens show the slopes that are its own."""
    row_tokens: int = 16
    """Tokens of a row."""
    out: str | None = None
    """Picture, .png or another kind. None: no picture."""
    json: str | None = None
    """File for all that was measured and the slopes as one JSON object; - is standard output. None: a table."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        for name, least in (("steps", 1), ("seeds", 1), ("batch_size", 1), ("row_tokens", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if self.sizes and (len(set(self.sizes)) < 2 or min(self.sizes) < 1):
            raise UserError(f"sizes are {self.sizes}, but a slope needs two different ones")


def main(arguments: Sequence[str]) -> int:
    """Train models of several widths or depths for some steps, and show how much of what they compute has moved."""
    import tyro

    arguments = list(arguments)
    file = arguments.pop(0) if arguments and not arguments[0].startswith("-") else DEFAULT
    config = load_config(file)
    sections = {name: getattr(config, name) for name in ("model", "optimizer", "tokenizer", "data")}
    prog = "python -m gptjax coordinates [CONFIG.py]"
    parsed = tyro.cli(
        CoordinatesArguments,
        default=CoordinatesArguments(**sections),
        args=arguments,
        prog=prog,
        description=main.__doc__,
    )
    cli.check_output("--json", parsed.json)

    from gptjax.parallel import platform

    platform.configure()

    import jax

    from gptjax.data.prepare import prepare
    from gptjax.evaluation.pictures import require_picture
    from gptjax.parallel.mesh import one_device_mesh
    from gptjax.scaling.coordinates import coordinates, resized, slopes
    from gptjax.scaling.plots import plot_coordinates

    if parsed.out is not None:
        require_picture(parsed.out)
        cli.check_output("--out", parsed.out)
    say = cli.print_to_stderr if parsed.json == "-" else _say
    sizes, names = parsed.sizes or SIZES[parsed.axis], parsed.parametrizations or PARAMETRIZATIONS[parsed.axis]
    for size in sizes:
        resized(parsed.model, parsed.axis, size)  # refused before anything is prepared
    data = prepare(parsed.data, parsed.tokenizer, log=say)
    rows_BT = _rows(data.tokens("train"), parsed.batch_size, parsed.row_tokens)
    model = dataclasses.replace(parsed.model, vocab_size=data.tokenizer.vocab_size, context_length=parsed.row_tokens)
    found = {}
    with jax.set_mesh(one_device_mesh()):
        for name in names:
            config = dataclasses.replace(model, parametrization=name)
            found[name] = []
            for size in sizes:
                seeds = range(parsed.seeds)
                found[name] += coordinates(
                    config, parsed.optimizer, rows_BT, parsed.axis, [size], steps=parsed.steps, seeds=seeds
                )
                say(f"{name}, {parsed.axis} {size}: done")
    slope = {name: slopes(records, parsed.steps) for name, records in found.items()}
    records = [record._asdict() for group in found.values() for record in group]
    cli.write_json(parsed.json, {"axis": parsed.axis, "slopes": slope, "coordinates": records})
    if parsed.json != "-":
        _show(parsed, slope)
    if parsed.out is not None:
        plot_coordinates(found, parsed.steps, parsed.out)
        say(f"picture: {parsed.out}")
    return 0


def _rows(tokens, batch_size: int, row_tokens: int) -> "np.ndarray":
    """(B, T + 1) evenly spaced pieces of the training text."""
    import numpy as np

    length = row_tokens + 1
    if len(tokens) < length * batch_size:
        raise UserError(
            f"the training text has {len(tokens):,} tokens, but {batch_size} rows of {row_tokens} need "
            f"{length * batch_size:,}"
        )
    starts = np.linspace(0, len(tokens) - length, batch_size).astype(int)
    return np.stack([np.asarray(tokens[int(start) : int(start) + length]) for start in starts]).astype(np.int32)


def _show(parsed: CoordinatesArguments, slope: dict[str, dict[str, float]]) -> None:
    places = list(next(iter(slope.values())))
    title = f"slope of log |change| over log {parsed.axis}, after {parsed.steps} steps"
    table = cli.make_table(title, "", *places, "")
    for name, values in slope.items():
        verdict = "flat" if all(abs(value) < FLAT for value in values.values()) else f"a slope is {FLAT} or more"
        table.add_row(name, *(f"{values[place]:+.3f}" for place in places), verdict)
    cli.print_wide(table)


def _say(text: str) -> None:
    print(text, flush=True)
