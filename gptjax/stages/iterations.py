"""How a run of PPO or GRPO is divided: each dispatch of the loop is one iteration, which nothing cuts in two.

In an iteration answers are drawn with the parameters as they are, judged, and learned from in
`training.steps_per_dispatch` optimizer steps. A checkpoint therefore stands between iterations, and a run that goes on
draws the same answers as one that was not stopped.
"""

import dataclasses
from typing import Any

from gptjax.checks import require
from gptjax.config import Config
from gptjax.errors import UserError


def group_size(config: Config) -> int:
    """Answers that are drawn to each prompt."""
    return config.grpo.group_size if config.stage == "grpo" else 1


def configure(config: Config) -> Config:
    """A dispatch is an iteration, and intervals are whole iterations: the next longer ones.

    Raises:
        UserError: batches do not divide an iteration's answers, or groups do not; the batch is to grow; or the steps to
            be traced are those of the first iteration, which compiles.
    """
    rl, training, group = config.rl, config.training, group_size(config)
    for what, size in (("training.batch_size", training.batch_size), ("the size of a group", group)):
        if rl.answers % size:
            nearest = max(1, round(rl.answers / size)) * size
            raise UserError(f"rl.answers {rl.answers} is not a multiple of {what} {size}; the nearest is {nearest}")
    require(
        training.resolved_batch_ramp_start == training.batch_size,
        f"training.batch_ramp_start {training.batch_ramp_start} is less than training.batch_size "
        f"{training.batch_size}, but an iteration has as many answers as any other; leave it out",
    )
    steps = rl.inner_epochs * rl.answers // training.batch_size

    def whole(interval: int) -> int:
        return -(-interval // steps) * steps

    def with_whole_intervals(section: Any) -> Any:
        """Every field that is an interval, by its name, so that a new one is not forgotten."""
        names = [f.name for f in dataclasses.fields(section) if f.name.endswith("every_steps")]
        return dataclasses.replace(section, **{name: whole(getattr(section, name)) for name in names})

    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    config = dataclasses.replace(
        config, **{name: with_whole_intervals(s) for name, s in sections.items() if dataclasses.is_dataclass(s)}
    )
    traced = training.profile_steps
    if training.profile_window is not None:
        first, last = map(whole, training.profile_window)
        last = max(last, first + steps)
        require(
            training.steps is None or last <= whole(training.steps),
            f"training.profile_steps is {traced!r}, but an iteration has {steps} steps, and the first one compiles; "
            f"with training.steps {last} it works",
        )
        traced = f"{first}:{last}"
    training = dataclasses.replace(
        config.training,
        steps_per_dispatch=steps,
        steps=None if training.steps is None else whole(training.steps),
        profile_steps=traced,
    )
    return dataclasses.replace(config, training=training)
