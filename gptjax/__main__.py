"""`python -m gptjax COMMAND`: everything that is neither training nor sampling, one file in commands/ each."""

from collections.abc import Sequence

from gptjax import cli
from gptjax.commands import (
    attention,
    coordinates,
    env,
    evaluate,
    export,
    fit,
    import_model,
    plan,
    prepare,
    recipe,
    report,
    study,
    tokenizer,
    verify,
)
from gptjax.errors import UserError

COMMANDS = {
    "prepare": prepare.main,
    "tokenizer": tokenizer.main,
    "evaluate": evaluate.main,
    "attention": attention.main,
    "plan": plan.main,
    "study": study.main,
    "fit": fit.main,
    "coordinates": coordinates.main,
    "recipe": recipe.main,
    "report": report.main,
    "import": import_model.main,
    "export": export.main,
    "verify": verify.main,
    "env": env.main,
}


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
