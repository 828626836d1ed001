"""What one stage of the recipe has of its own; loop, step, checkpoints and run directory are everybody's."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import optax

from gptjax.config import Config
from gptjax.model.gpt import Params
from gptjax.model.workload import Rows
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.loop import Stream
from gptjax.training.losses import Loss
from gptjax.training.schedule import Progress
from gptjax.training.state import TrainState
from gptjax.training.step import Metrics


class ClosableStream(Stream, Protocol):
    """Rows that may be read ahead of the loop, until it is closed."""

    def close(self) -> None: ...


class Data(NamedTuple):
    """What a stage learns from, before anything is on a device."""

    tokenizer: Tokenizer
    fingerprint: str
    """Of everything that decides the rows: a run goes on with the same."""
    place: str
    """Where it lies, for messages."""
    num_rows: int
    """To train on, in one epoch."""
    rows: Rows
    """What each of these is to the model."""
    content: Any
    """What the stage makes its rows of."""


def as_given(config: Config) -> Config:
    """For stages that ask nothing of a configuration."""
    return config


class Stage(NamedTuple):
    """A stage under a mesh, ready to run."""

    loss: Loss
    optimizer: optax.GradientTransformation
    new_state: Callable[[], TrainState]
    """The state of a run that begins."""
    abstract_state: TrainState
    """Its shapes, types and shardings."""
    stream: Callable[[int], ClosableStream]
    """Training rows from a position on."""
    evaluate: Callable[[TrainState], dict[str, float]]
    sample: Callable[[TrainState, Progress], None]
    description: Callable[[Progress], Sequence[str]]
    """Lines about its data and its evaluation, for the start of a run."""
    frozen: Params | None = None
    """Parameters that are not trained, as `make_train_step` takes them."""
    after: Callable[[Any, Params, Metrics], Any] | None = None
    """As `make_train_step` takes it."""
    finish: Callable[[TrainState], dict[str, Any]] = lambda state: {}
    """Called once by all processes when the run has come to its end; what the summary is to say as well."""
    files: Mapping[str, str] = {}
    """What else the run's folder needs to be used later, by name."""
