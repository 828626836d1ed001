"""`python -m gptjax prepare SOURCE ...`: text to token shards, once."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from gptjax import cli
from gptjax.config import DataConfig, TokenizerConfig


@dataclass(frozen=True)
class PrepareArguments:
    """What `python -m gptjax prepare` was asked for."""

    out: str | None = None
    """Folder for shards, index and tokenizer. None: the one under data.prepared_dir where train.py looks."""
    json: str | None = None
    """File for the folder and its index as one JSON object; - is standard output. None: none."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


def parse(arguments: Sequence[str]) -> PrepareArguments:
    """Read `SOURCE ... [--out DIR] [--data.field value ...] [--tokenizer.field value ...]`.

    Raises:
        SystemExit: tyro's, as for `cli.parse_train`.
    """
    import tyro

    sources = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    data = DataConfig(path=tuple(sources)) if sources else DataConfig()
    return tyro.cli(
        PrepareArguments,
        default=PrepareArguments(data=data),
        args=arguments[len(sources) :],
        prog="python -m gptjax prepare SOURCE ...",
        description="Turn text into token shards that train.py --data.path opens.",
    )


def main(arguments: Sequence[str]) -> int:
    """Turn text into token shards that `train.py --data.path` opens."""
    parsed = parse(arguments)
    cli.check_output("--json", parsed.json)

    from gptjax.data import prepare as preparation

    log = print if parsed.json != "-" else cli.print_to_stderr
    prepared = preparation.prepare(parsed.data, parsed.tokenizer, parsed.out, log=log)
    cli.write_json(parsed.json, {"folder": str(prepared.folder)} | dataclasses.asdict(prepared.index))
    return 0
