"""`python -m gptjax recipe FILE.py`: a recipe, whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax import cli
from gptjax.errors import UserError


@dataclass(frozen=True)
class RecipeArguments:
    """What `python -m gptjax recipe` was asked for."""

    dir: str | None = None
    """Folder of the runs and the table. None: recipes/NAME, after the file."""


def main(arguments: Sequence[str]) -> int:
    """Train every run of a recipe, from text to a tuned model, and compare them; goes on where it stood."""
    import tyro

    from gptjax.recipe import load_recipe

    arguments = list(arguments)
    file = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    prog = "python -m gptjax recipe FILE.py"
    parsed = tyro.cli(RecipeArguments, args=arguments, prog=prog, description=main.__doc__)
    if file is None:
        raise UserError("no recipe given; write: python -m gptjax recipe configs/recipe_tiny.py")
    recipe = load_recipe(Path(file))

    from gptjax.parallel import platform

    platform.configure()

    from gptjax.stages.recipe import run_recipe

    folder = Path(parsed.dir) if parsed.dir else Path("recipes") / Path(file).stem
    stopped = run_recipe(recipe, folder)
    if stopped != "finished":
        print(f"go on with: python -m gptjax recipe {file} --dir {folder}")
    return cli.EXIT_OF[stopped]
