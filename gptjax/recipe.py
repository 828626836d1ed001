"""The whole road from text to a tuned model, as data: runs that start from one another.

Only the standard library is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gptjax.checks import require
from gptjax.config import Config
from gptjax.config_files import run_file


@dataclass(frozen=True)
class Recipe:
    """Runs in the order in which they are trained. A recipe's file assigns one to `recipe`.

    Where a run starts from another, or is rewarded by it, `model.init_from`, `rl.reward` and `ppo.critic_from` hold the
    other's name.
    """

    runs: Mapping[str, Config]

    def __post_init__(self):
        require(len(self.runs) > 0, "the recipe has no runs")
        before: set[str] = set()
        for name, config in self.runs.items():
            require(name.isidentifier(), f"the recipe has a run {name!r}; names are words, for they name folders")
            source = config.model.init_from
            require(
                not source or source in before,
                f"run {name} of the recipe starts from {source!r}, which is none of those before it: "
                f"{', '.join(sorted(before)) or 'none'}",
            )
            before.add(name)

    def placed(self, name: str, folder: Path) -> Config:
        """The configuration of a run, with folders in place of the names of others."""
        config = self.runs[name]

        def place(value: str) -> str:
            return str(folder / value) if value in self.runs else value

        return replace(
            config,
            model=replace(config.model, init_from=place(config.model.init_from)),
            rl=replace(config.rl, reward=place(config.rl.reward)),
            ppo=replace(config.ppo, critic_from=place(config.ppo.critic_from)),
            run_dir=str(folder / name),
        )


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a Python file that assigns `recipe`.

    Raises:
        UserError: the file is missing, or holds no recipe.
    """
    require(path.is_file(), f"no recipe {path}; configs/recipe_tiny.py is one")
    recipe = run_file(path).get("recipe")
    require(isinstance(recipe, Recipe), f"{path} does not assign `recipe = Recipe(...)`")
    return recipe
