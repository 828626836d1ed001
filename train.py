"""Train a GPT: `python train.py [CONFIG.py | RUN | --depth N] [--section.field value ...]`; `--help` lists all."""

import time
from collections.abc import Sequence
from pathlib import Path

from gptjax import cli


def main(arguments: Sequence[str]) -> int:
    started = time.perf_counter()
    command = cli.parse_train(arguments, default=Path(__file__).parent / "configs" / "quickstart.py")

    from gptjax.parallel import platform

    training = command.config.training
    platform.configure(deterministic=training.deterministic, profiled=bool(training.profile_steps))
    if command.dry_run:
        from gptjax.commands.plan import dry_run

        return dry_run(command.config)

    from gptjax.parallel import distributed
    from gptjax.stages.train import train

    with distributed.fail_fast():
        summary = train(
            command.config,
            name=command.name,
            launch=command.launch,
            accept_changes=command.accept_changes,
            started=started,
        )
    return cli.EXIT_OF[summary["stopped"]]


if __name__ == "__main__":
    cli.run_command(main)
