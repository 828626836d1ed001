"""Train a GPT: `python train.py [CONFIG.py | RUN] [--section.field value ...]`; `--help` lists every field."""

import time
from collections.abc import Sequence
from pathlib import Path

from gptjax import cli


def main(arguments: Sequence[str]) -> int:
    started = time.perf_counter()
    config, name, launch, accepted = cli.parse_train(
        arguments, default=Path(__file__).parent / "configs" / "quickstart.py"
    )

    from gptjax.parallel import platform

    platform.configure(deterministic=config.training.deterministic)

    from gptjax.parallel import distributed
    from gptjax.stages.pretrain import train

    with distributed.fail_fast():
        summary = train(config, name=name, launch=launch, accept_changes=accepted, started=started)
    return cli.EXIT_OF[summary["stopped"]]


if __name__ == "__main__":
    cli.run_command(main)
