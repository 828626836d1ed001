"""`python -m gptjax export RUN HF_DIR`: a run as a model of the Hugging Face family."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax import cli
from gptjax.errors import UserError


@dataclass(frozen=True)
class ExportArguments:
    """What `python -m gptjax export` was asked for."""

    step: str = "last"
    """Checkpoint to use: last, best, or a step's number."""
    dtype: str = "float32"
    """Type of the weights: float32, bfloat16 or float16."""
    license: str = "unknown"
    """What the model card says of the licence, in the hub's words, such as apache-2.0."""


def main(arguments: Sequence[str]) -> int:
    """Write a run as a Hugging Face directory, for transformers, vLLM or llama.cpp."""
    import tyro

    named, arguments = cli.split_named(arguments)
    prog = "python -m gptjax export RUN HF_DIR"
    parsed = tyro.cli(ExportArguments, args=arguments, prog=prog, description=main.__doc__)
    if len(named) != 2:
        raise UserError("export takes a run and a directory to make: " + prog)

    from gptjax.parallel import platform

    platform.configure()

    import jax

    from gptjax.interop.transfer import export_run
    from gptjax.parallel.mesh import one_device_mesh
    from gptjax.training.load import load_run

    with jax.set_mesh(one_device_mesh()):
        run = load_run(named[0], parsed.step)
        kind = export_run(run, Path(named[1]), dtype=parsed.dtype, licence=parsed.license, log=cli.print_to_stderr)
    print(f"{named[1]}: model_type {kind}, weights in {parsed.dtype}")
    print(f"next: AutoModelForCausalLM.from_pretrained({named[1]!r}) of transformers")
    return 0
