"""Which checkpoint can be used: the newest, or whichever is wanted most, of those that are not damaged.

Of several processes the first alone reads the files, and all learn what it found.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.errors import UserError
from gptjax.parallel import distributed
from gptjax.training.integrity import Verdict, check_manifest, write_manifest
from gptjax.training.manager import ITEMS, all_steps, listed

Order = Callable[[str | os.PathLike], Sequence[int]]
"""Gives a folder's steps, at least one, in the order of preference."""
GLANCE_BYTES = 2**16
"""Of a checkpoint that is only looked at, larger files are compared by their size alone."""


class Choice(NamedTuple):
    """A checkpoint to use, and what was found on the way to it."""

    step: int
    status: str
    """`verified` or `unverified`, as `Verdict` has it; `unread` where nothing was looked at."""
    damaged: dict[int, str]
    """What is wrong with other steps."""

    def lines(self) -> list[str]:
        """What a user should know of it; nothing if all is well."""
        lines = [f"checkpoint {step} is damaged ({reason}); using {self.step}" for step, reason in self.damaged.items()]
        if self.status == "unverified":
            lines.append(f"checkpoint {self.step} is used unverified: it was saved without checksums")
        return lines


def verify_step(directory: str | os.PathLike, step: int, max_bytes: int | None = None) -> Verdict:
    """Check a step's files, as `check_manifest` does; a folder without a manifest must at least look like a checkpoint.

    Raises:
        UserError: as `check_manifest`.
    """
    folder = Path(directory) / str(step)
    verdict = check_manifest(folder, max_bytes)
    lacking = [item for item in ITEMS if not (folder / item).is_dir()]
    if verdict.status == "unverified" and lacking:
        return Verdict("damaged", f"it has neither checksums nor {' and '.join(lacking)}")
    return verdict


def agreed_steps(directory: str | os.PathLike) -> list[int]:
    """The steps that there are, from the newest on, as process 0 sees them: others may see an older list."""
    return distributed.from_first(lambda: all_steps(directory)[::-1])


def choose(
    directory: str | os.PathLike,
    order: Order,
    *,
    verify: bool = True,
    glance: bool = False,
) -> Choice:
    """The first step that is not damaged.

    Args:
        verify: False takes the first as it is.
        glance: look at those after the chosen one, too, without reading all of them.

    Raises:
        UserError: all are damaged; a step holds files that are not its own, or its manifest is of a newer format.
    """
    step, status, damaged = distributed.from_first(
        lambda: _choose(directory, order, glance) if verify else (order(directory)[0], "unread", {})
    )
    return Choice(step, status, {int(number): reason for number, reason in damaged.items()})


def _choose(directory: str | os.PathLike, order: Order, glance: bool) -> Choice:
    steps, verdicts = order(directory), {}
    for step in steps:
        chosen = next((step for step, verdict in verdicts.items() if verdict.status != "damaged"), None)
        if chosen is not None and not glance:
            break
        try:
            verdicts[step] = verify_step(directory, step, None if chosen is None else GLANCE_BYTES)
        except UserError:
            if chosen is None:  # of those that are not needed it is enough to know what can be known
                raise
    damaged = {step: verdict.reason for step, verdict in verdicts.items() if verdict.status == "damaged"}
    if damaged and order(directory) != steps:  # a run that is training has just removed what looked damaged
        return _choose(directory, order, glance)
    if len(damaged) == len(steps):
        reasons = ", ".join(f"{step} ({reason})" for step, reason in damaged.items())
        raise UserError(f"no checkpoint in {directory} can be used, all are damaged: {reasons}")
    chosen = next(step for step in steps if step not in damaged)
    _require_own_files(directory, chosen, verdicts[chosen])
    return Choice(chosen, verdicts[chosen].status, damaged)


def require_usable(directory: str | os.PathLike, step: int, *, verify: bool = True) -> Choice:
    """Check one step, in whose place no other will do.

    Args:
        verify: False only looks whether it is there.

    Raises:
        UserError: it is not there or damaged, and those that are good are listed; otherwise as `choose`.
    """
    steps = all_steps(directory)
    if step not in steps:
        raise UserError(f"step {step} is not in {directory}; those that are: {listed(steps)}")
    if not verify:
        return Choice(step, "unread", {})
    verdict = verify_step(directory, step)
    _require_own_files(directory, step, verdict)
    if verdict.status == "damaged":
        good = [other for other in steps if other != step and verify_step(directory, other).status != "damaged"]
        raise UserError(
            f"checkpoint {step} in {directory} is damaged: {verdict.reason}; those that are not: {listed(good)}"
        )
    return Choice(step, verdict.status, {})


def _require_own_files(directory: str | os.PathLike, step: int, verdict: Verdict) -> None:
    # Somebody has put files into the folder. The state is whole, so this is no reason to lose steps.
    if verdict.status == "foreign":
        raise UserError(f"checkpoint {step} in {directory} holds other files: {verdict.reason}; move them away")


def tidy(directory: str | os.PathLike, choice: Choice) -> Iterator[str]:
    """Before a run goes on from `choice`: put what is damaged aside, and write checksums that are not there.

    A damaged step becomes `STEP.damaged`, where nothing looks for it: the run will come to this step again.

    Yields:
        What a user should know, in lines.

    Raises:
        UserError: a folder cannot be renamed.
    """
    for step, reason in choice.damaged.items():
        aside = set_aside(Path(directory) / str(step), "damaged")
        yield f"checkpoint {step} is damaged ({reason}); using {choice.step}, and keeping it as {aside.name}"
    if choice.status == "unverified":
        line = f"checkpoint {choice.step} is used unverified: it was saved without checksums"
        try:
            write_manifest(Path(directory) / str(choice.step))
            yield f"{line}, and has them from now on"
        except (OSError, UserError) as error:
            yield f"{line}, which cannot be added ({error})"


def set_aside(folder: Path, why: str) -> Path:
    """Rename `STEP` to `STEP.why`, where nothing looks for it: the run will come to this step again.

    Raises:
        UserError: it cannot be renamed.
    """
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (folder.with_name(f"{folder.name}.{why}{ending}") for ending in endings)
    aside = next(name for name in names if not name.exists())
    try:
        return folder.rename(aside)
    except OSError as error:
        raise UserError(f"{folder} cannot be renamed to {aside.name}: {error.strerror}") from error
