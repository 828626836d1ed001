"""`python -m gptjax import HF_DIR RUN`: a model of the Hugging Face family as a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax import cli
from gptjax.errors import UserError


@dataclass(frozen=True)
class ImportArguments:
    """What `python -m gptjax import` was asked for."""


def main(arguments: Sequence[str]) -> int:
    """Make a run of a Hugging Face directory, to sample, evaluate, tune and train it like any other."""
    import tyro

    named, arguments = cli.split_named(arguments)
    prog = "python -m gptjax import HF_DIR RUN"
    tyro.cli(ImportArguments, args=arguments, prog=prog, description=main.__doc__)
    if len(named) != 2:
        raise UserError("import takes a directory, or OWNER/NAME of the hub, and a run to make: " + prog)

    from gptjax.parallel import platform

    platform.configure()

    import jax

    from gptjax.interop.transfer import find_source, import_model
    from gptjax.parallel.mesh import one_device_mesh

    source, run = find_source(named[0], cli.print_to_stderr), Path(named[1])
    with jax.set_mesh(one_device_mesh()):
        import_model(source, run, cli.print_to_stderr)
    print(f"{run}: the model of {source}, at step 0")
    print(f"next: python sample.py {run} --prompt 'Once upon a time'")
    return 0
