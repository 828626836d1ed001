"""`python -m gptjax COMMAND`: everything that is neither training nor sampling."""

import dataclasses
import json
from collections.abc import Sequence

from gptjax import cli
from gptjax.errors import UserError


def prepare(arguments: Sequence[str]) -> int:
    """Turn text into token shards that `train.py --data.path` opens."""
    parsed = cli.parse_prepare(arguments)

    from gptjax.data import prepare as preparation

    log = print if parsed.json != "-" else cli.print_to_stderr
    prepared = preparation.prepare(parsed.data, parsed.tokenizer, parsed.out, log=log)
    if parsed.json is not None:
        with cli.open_output(parsed.json) as file:
            print(json.dumps({"folder": str(prepared.folder)} | dataclasses.asdict(prepared.index)), file=file)
    return 0


COMMANDS = {"prepare": prepare}


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    listing = "\n".join(f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items())
    usage = f"usage: python -m gptjax COMMAND [-h] [OPTIONS]\n\n{listing}"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    raise UserError(f"no command {arguments[0]!r}; there are: {', '.join(COMMANDS)}")


if __name__ == "__main__":
    cli.run_command(main)
