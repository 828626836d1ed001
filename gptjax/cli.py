"""From a command line to a configuration, before JAX is imported; and from errors to exit codes."""

import codecs
import contextlib
import dataclasses
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO

from gptjax.config import Config
from gptjax.config_files import load_config, opened
from gptjax.errors import UserError
from gptjax.parallel.launch import DistributedConfig
from gptjax.plain_files import to_json
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.streams import safe_streams

if TYPE_CHECKING:
    from rich.table import Table

EXIT_USER_ERROR = 2
EXIT_OF = {
    "finished": 0,
    "diverged": 3,
    "corrupted": 4,  # the machine computes wrong
    "preempted": 75,  # EX_TEMPFAIL: schedulers requeue
    "interrupted": 130,  # what shells report for Ctrl-C
}
"""Exit status of a run by why it ended."""


class _Terminated(SystemExit):
    """SIGTERM outside of training, which has its own way to stop."""


def run_command(main: Callable[[Sequence[str]], int], *, ends_with_reader: bool = False) -> NoReturn:
    """Run an entry point on `sys.argv`; an error that the user can mend is one line and exit status 2.

    Args:
        ends_with_reader: as `safe_streams`.
    """
    try:
        with _unwound_by_sigterm(), safe_streams(ends_with_reader):
            status = _status_of(main)
    except BrokenPipeError:
        status = 0
    except UserError as error:
        print_to_stderr(f"error: {error}")
        status = EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG):
            raise
        what = error.filename or "cannot write a file"
        print_to_stderr(f"error: {what}: {error.strerror}")
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print_to_stderr("interrupted")
        status = EXIT_OF["interrupted"]
    except _Terminated:
        print_to_stderr("terminated")
        status = EXIT_OF["preempted"]
    sys.exit(status)


def _status_of(main: Callable[[Sequence[str]], int]) -> int | str | None:
    try:
        return main(sys.argv[1:])
    except _Terminated:
        raise
    except SystemExit as ended:  # tyro's, after --help or a usage error
        return ended.code


@contextlib.contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end what runs as an exception does, so that nothing half made is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class _TrainArguments(Config):
    """A run, and what is not saved with it: the processes that train it together, and what they agree to change."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    accept_changes: tuple[str, ...] = ()
    """Fields, such as optimizer.beta2, that may differ from those of the run that goes on, which is refused else."""
    dry_run: bool = False
    """Say what the run would need and take, show the first rows that it would train on, and stop."""


class TrainCommand(NamedTuple):
    """What `train.py` was asked for."""

    config: Config
    """With fields that the user left open still None."""
    name: str
    """That a new run is called after."""
    launch: DistributedConfig
    """How this process finds the others."""
    accept_changes: tuple[str, ...]
    """Fields that may change when a run goes on."""
    dry_run: bool


def parse_train(arguments: Sequence[str], default: Path) -> TrainCommand:
    """Read `[CONFIG.py | RUN | --depth N] [--section.field value ...]`.

    Raises:
        UserError: the file or folder is missing or holds no configuration.
        SystemExit: tyro's, for `--help` (0) and for unknown or malformed options (2).
    """
    import tyro

    config, target, rest = starting_point(arguments, default)
    parsed = tyro.cli(
        _TrainArguments,
        default=_TrainArguments(**fields_of(config)),
        args=rest,
        prog="train.py [CONFIG.py | RUN | --depth N]",
        description=f"Train a GPT. Defaults are those of {target}; a run's folder continues that run.",
    )
    fields = fields_of(parsed)
    launch, accepted, dry = (fields.pop(name) for name in ("distributed", "accept_changes", "dry_run"))
    return TrainCommand(Config(**fields), target.stem, launch, accepted, dry)


def starting_point(arguments: Sequence[str], default: Path) -> tuple[Config, Path, list[str]]:
    """The configuration that options override: of a file, of a run, or of `--depth N`, the dial for all of a model.

    Returns:
        The configuration, the file or folder that it is from (of the dial, its name), and the options.

    Raises:
        UserError: the file or folder is missing or holds no configuration.
    """
    arguments = list(arguments)
    depth = _depth(arguments)
    if depth is not None:
        from gptjax.scaling.depth import of_depth

        return of_depth(depth), Path(f"depth{depth}"), arguments
    target = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else default
    if not target.is_dir():
        return load_config(target), target, arguments
    if not (target / "config.json").is_file():
        raise UserError(f"{target} is a folder without config.json, so no run; give a run or a configuration file")
    config = opened(load_config(target / "config.json"))
    # Devices may have changed since, so the mesh is fitted to them again.
    mesh = dataclasses.replace(config.mesh, data=None)
    return dataclasses.replace(config, run_dir=str(target), mesh=mesh), target, arguments


def _depth(arguments: list[str]) -> int | None:
    """The number of `--depth N`, which is taken out, where it stands first."""
    if not arguments or arguments[0].split("=")[0] != "--depth":
        return None
    word, equals, value = arguments.pop(0).partition("=")
    value = value if equals else arguments.pop(0) if arguments else ""
    if not value.isdecimal():
        raise UserError(f"{word} {value or 'without a number'}: it takes a number of layers, such as --depth 12")
    return int(value)


def fields_of(values: Any) -> dict[str, Any]:
    """A dataclass's fields, one level deep."""
    return {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}


GUESSES_OF_A_DRAFT = 4
"""At a time, where a draft was named and not their number."""


@dataclass(frozen=True)
class SampleArguments:
    """What `sample.py` was asked for."""

    prompt: tuple[str, ...] = ()
    """Text to continue; several make a batch. Empty: a tuned run opens a conversation, another starts a line."""
    message: tuple[str, ...] = ()
    """What a user says, each a conversation of its own that is answered; for a run that has been tuned."""
    system: str = ""
    """What a conversation begins with."""
    num_samples: int = 1
    """Texts per prompt, each with its own random draws."""
    step: str = "last"
    """Checkpoint to use: last, best, or a step's number."""
    json: str | None = None
    """File for one JSON object per text; - is standard output. None: plain text."""
    draft: str | None = None
    """Run whose model guesses tokens, a smaller one with the same tokenizer. None: draft_tokens come from the text."""
    timing: bool = False
    """Generate once more and print how long that took, without compiling: first token, each further one, bandwidth."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)

    def __post_init__(self):
        if self.prompt and (self.message or self.system):
            raise UserError(
                "--prompt is text to continue, --message and --system are parts of a conversation: one of the two works"
            )
        if self.draft is not None and self.message:
            raise UserError("--draft guesses for --prompt alone; leave it out for --message")
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}, but must be at least 1")
        if self.draft is not None and not self.decoding.draft_tokens:
            decoding = dataclasses.replace(self.decoding, draft_tokens=GUESSES_OF_A_DRAFT)
            object.__setattr__(self, "decoding", decoding)


def parse_sample(arguments: Sequence[str]) -> tuple[Path, SampleArguments]:
    """Read `RUN [--prompt TEXT ...] [--temperature ...]`.

    Raises:
        UserError: no run was named.
        SystemExit: tyro's, as for `parse_train`.
    """
    import tyro

    arguments = list(arguments)
    run = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    parsed = tyro.cli(
        tyro.conf.OmitArgPrefixes[SampleArguments],
        args=arguments,
        prog="sample.py RUN",
        description="Generate text with a trained run.",
    )
    if run is None:
        raise UserError("no run given; write: python sample.py RUN --prompt TEXT")
    check_output("--json", parsed.json)
    return Path(run), parsed


def split_named(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first option, and the rest."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return [*arguments[:first]], [*arguments[first:]]


def check_output(option: str, path: str | None) -> None:
    """Check before the work that what it finds can be written; None and `-`, standard output, always can.

    Raises:
        UserError: no file can be made there.
    """
    if path in (None, "-"):
        return
    file = Path(path)
    if file.is_dir():
        problem = "is a folder"
    elif not file.parent.is_dir():
        problem = f"is in {file.parent}, which is no folder that exists"
    elif not os.access(file if file.exists() else file.parent, os.W_OK):
        problem = "cannot be written"
    else:
        return
    raise UserError(f"{option} {path} {problem}; give a file in a folder that exists")


@contextlib.contextmanager
def open_output(path: str) -> Iterator[TextIO]:
    """The file that `--json` names, or standard output for `-`.

    Raises:
        UserError: the file cannot be written.
    """
    if path == "-":
        yield sys.stdout
        return
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None


def write_json(path: str | None, *values: Any) -> None:
    """Write what `--json` asks for, one value a line; None: it does not.

    Raises:
        UserError: as `open_output`.
    """
    if path is None:
        return
    with open_output(path) as file:
        # In another encoding than UTF-8, which JSON has to have, standard output gets ASCII, which is part of most.
        ascii_only = codecs.lookup(file.encoding or "utf-8").name != "utf-8"
        for value in values:
            print(to_json(value, ascii_only=ascii_only), file=file)


def print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def make_table(title: str, *columns: str) -> "Table":
    """A table for people: the first column to the left, figures to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def print_wide(table: "Table") -> None:
    """Print a table whole, however narrow the terminal: what is cut off cannot be read."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    console.width = max(console.width, console.measure(table, options=console.options.update_width(1000)).maximum)
    console.print(table)
