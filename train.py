"""Train a GPT: `python train.py [CONFIG.py | RUN] [--section.field value ...]`; `--help` lists every field."""

from collections.abc import Sequence
from pathlib import Path

from gptjax import cli


def main(arguments: Sequence[str]) -> int:
    config, name, launch = cli.parse_train(arguments, default=Path(__file__).parent / "configs" / "quickstart.py")

    from gptjax.parallel import platform

    platform.configure(deterministic=config.training.deterministic)

    from gptjax.parallel import distributed
    from gptjax.stages.pretrain import train

    with distributed.fail_fast():
        summary = train(config, name=name, launch=launch)
    codes = {"diverged": cli.EXIT_DIVERGED, "preempted": cli.EXIT_PREEMPTED, "interrupted": cli.EXIT_INTERRUPTED}
    return codes.get(summary["stopped"], 0)


if __name__ == "__main__":
    cli.run_command(main)
