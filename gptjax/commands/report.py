"""`python -m gptjax report STUDY|RUN`: a study or a run as a document."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax.errors import UserError


@dataclass(frozen=True)
class ReportArguments:
    """What `python -m gptjax report` was asked for."""

    out: str | None = None
    """Folder for report.md and its pictures. None: that of the study or run."""


def main(arguments: Sequence[str]) -> int:
    """Write a study or a run up: Markdown with plots, tables, samples, configuration and environment."""
    import tyro

    arguments = list(arguments)
    folder = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    prog = "python -m gptjax report STUDY|RUN"
    parsed = tyro.cli(ReportArguments, args=arguments, prog=prog, description=main.__doc__)
    if folder is None:
        raise UserError("nothing to report on; write: python -m gptjax report studies/NAME, or runs/NAME")

    from gptjax.parallel import platform

    platform.configure()

    from gptjax.config_files import HOW_TO_USE
    from gptjax.evaluation.pictures import require_matplotlib
    from gptjax.evaluation.report import report_run
    from gptjax.scaling.conduct import STUDY_FILE
    from gptjax.scaling.report import report_study
    from gptjax.training.run_dir import CONFIG_FILE, writable

    require_matplotlib()
    place = Path(folder)
    study = (place / STUDY_FILE).is_file()
    if not study and not (place / CONFIG_FILE).is_file():
        hint = f"; {HOW_TO_USE.format(folder)}" if place.suffix == ".gguf" else ""
        raise UserError(f"{folder} is neither a study's folder ({STUDY_FILE}) nor a run ({CONFIG_FILE}){hint}")
    out = Path(parsed.out) if parsed.out else place
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
    print(f"report: {(report_study if study else report_run)(place, out)}")
    return 0
