"""The training loop: feeds the compiled step and calls back at its intervals. It knows no stage.

Shape suffixes: K steps of a dispatch, A accumulated micro-batches, B sequences of a micro-batch (on the host those
that this process's devices need), T tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from gptjax.config import Config
from gptjax.parallel import sharding
from gptjax.training.ledger import Ledger
from gptjax.training.profile import Profiler
from gptjax.training.rerun import run_twice
from gptjax.training.schedule import Progress, batch_size, learning_rate
from gptjax.training.state import TrainState
from gptjax.training.step import Metrics, TrainStep


class Stream(Protocol):
    """Rows in training order."""

    on_policy: bool
    """Whether the model as it is writes the rows, so that the loop waits for its last step before it asks for them."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """What there is to report of the rows taken last."""
        ...

    def take(self, num_rows: int, state: TrainState) -> np.ndarray | Mapping[str, np.ndarray]:
        """Those of the next rows that this process needs: tokens (rows, T+1) int32, or arrays (rows, ...) by name.

        Args:
            state: as it is now, for rows that the model itself writes.
        """
        ...


class Diverged(Exception):
    """The model has left what it was good at: step after step is skipped, or an evaluation is no number."""

    def __init__(self, progress: Progress, reason: str):
        super().__init__(f"step {progress.step}: {reason}")
        self.progress = progress


class Corrupted(Exception):
    """A step that was computed twice from the same state gave two results: nobody knows which is the right one."""

    def __init__(self, progress: Progress, names: Sequence[str]):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        super().__init__(f"step {progress.step}, computed twice from the same state, gave two {names[0]}{others}")
        self.progress = progress


class Callbacks(NamedTuple):
    """What the loop calls, in this order. `evaluate`, `save` and `sample` find all steps so far done and reported."""

    report: Callable[[dict[str, Any]], None]
    """Takes a line of metrics: of training one logging interval late, of an evaluation at once."""
    evaluate: Callable[[TrainState], dict[str, float]]
    """Returns metrics of the state on held-out data."""
    save: Callable[[TrainState, Progress, dict[str, float] | None], None]
    """Saves the state, with its evaluation's metrics where this step has been evaluated."""
    sample: Callable[[TrainState, Progress], None]
    should_stop: Callable[[], bool]
    """Asked after each dispatch; True saves and ends the loop."""


def fit(
    config: Config,
    state: TrainState,
    progress: Progress,
    train_step: TrainStep,
    stream: Stream,
    callbacks: Callbacks,
    ledger: Ledger,
    mfu_per_token_rate: float | None,
    profiler: Profiler | None = None,
    sequence_tokens: int | None = None,
) -> tuple[TrainState, Progress]:
    """Train from `progress` to `training.steps`, or until asked to stop.

    Nothing in the loop waits for the device, except where an interval ends: metrics are fetched when the
    next interval's steps are already dispatched, and before an evaluation, sample or checkpoint.

    Args:
        config: resolved.
        stream: positioned at `progress.position`.
        mfu_per_token_rate: MFU at one token a second; None where the device's peak is unknown.
        profiler: traces the steps of its window, which no speed counts; None: no step is traced.
        sequence_tokens: of one sequence of a batch; None: as many as a row of text has.

    Raises:
        Diverged: `guard.max_skipped` steps in a row were skipped, which is noticed where an interval ends; or an
            evaluation is not finite.
        Corrupted: a step that was computed twice gave two results.
    """
    training, guard, intervals = config.training, config.guard, _intervals(config)
    history = _History(callbacks.report, ledger, mfu_per_token_rate, guard.max_skipped)
    compiled, owed = False, False
    metrics: Metrics = {}

    def data_kind() -> str | None:
        # Reading while the device still computes costs nothing: only then is it no waiting.
        return "data" if _is_done(metrics) else None

    while progress.step < training.steps:
        boundary = _next_boundary(progress.step, (*intervals, guard.rerun_every_steps), training.steps)
        if profiler is not None:
            boundary = min([boundary, *(step for step in profiler.window if step > progress.step)])
            if compiled and not profiler.is_running and profiler.window[0] <= progress.step < profiler.window[1]:
                with ledger("profile"):
                    history.pause(progress, metrics)
                    profiler.begin(progress.step)
        num_steps = min(training.steps_per_dispatch, boundary - progress.step)
        if stream.on_policy:
            jax.block_until_ready(metrics)
            history.settle(progress)
        with ledger("rollout" if stream.on_policy else data_kind):
            batch, counts_K, rates_K, progress = next_batch(config, stream, progress, num_steps, state, sequence_tokens)
        if compiled and guard.rerun_every_steps and progress.step % guard.rerun_every_steps == 0:
            state, metrics, differing = run_twice(train_step, state, batch, counts_K, rates_K, num_steps)
            if differing:
                raise Corrupted(progress, differing)
        elif compiled:
            state, metrics = train_step(state, batch, counts_K, rates_K, num_steps)
        else:
            with ledger("compile"):
                state, metrics = train_step(state, batch, counts_K, rates_K, num_steps)
                jax.block_until_ready(metrics)
            compiled = True
            history.start(progress)
        if profiler is not None and profiler.is_running and progress.step >= profiler.window[1]:
            jax.block_until_ready(metrics)
            arguments = (state, batch, counts_K, rates_K, num_steps)
            with ledger("profile"):
                profiler.end(
                    progress.step, lambda arguments=arguments: train_step.lower(*arguments).compile().as_text()
                )
            del arguments
            history.start(progress)

        preempted = callbacks.should_stop() and progress.step < training.steps
        logs, evaluates, saves, samples = (is_due(interval, progress.step, training.steps) for interval in intervals)
        saves |= owed
        if logs or preempted:
            last = {name: values[num_steps - 1] for name, values in metrics.items()}
            history.add(progress, float(rates_K[num_steps - 1]), last, stream.metrics)
        if evaluates or samples or saves or preempted:
            learns = history.rest(progress, {name: values[num_steps - 1] for name, values in metrics.items()})
            # What may be ruined is no checkpoint: a save waits for a step that counts.
            owed = saves and not learns and progress.step < training.steps
        if preempted:  # at once: whoever asked does not wait for an evaluation
            with ledger("checkpoint"):
                callbacks.save(state, progress, None)
            break
        evaluation = None
        if evaluates:
            with ledger("evaluation"):
                evaluation = callbacks.evaluate(state)
            callbacks.report({"step": progress.step, "tokens": progress.tokens, **evaluation})
            if not math.isfinite(evaluation.get("val_loss", 0.0)):
                raise Diverged(progress, f"the validation loss is {evaluation['val_loss']}")
        if saves and not owed:
            with ledger("checkpoint"):
                callbacks.save(state, progress, evaluation)
        if samples:
            with ledger("sample"):
                callbacks.sample(state, progress)
    return state, progress


def _intervals(config: Config) -> tuple[int, int, int, int]:
    """Steps between lines of metrics, evaluations, checkpoints and samples."""
    training = config.training
    return (
        training.log_every_steps,
        training.eval_every_steps,
        config.checkpoint.every_steps,
        training.sample_every_steps,
    )


def is_due(interval: int, step: int, steps: int) -> bool:
    """Whether an interval ends at this step; all do at the last, and 0 never does before."""
    return step == steps or (interval > 0 and step % interval == 0)


def _next_boundary(step: int, intervals: Iterable[int], steps: int) -> int:
    """The next step after `step` at which an interval ends: a dispatch is cut there, never shifted."""
    return min([steps, *((step // interval + 1) * interval for interval in intervals if interval)])


def next_batch(
    config: Config,
    stream: Stream,
    progress: Progress,
    num_steps: int,
    state: TrainState,
    sequence_tokens: int | None = None,
):
    """The arguments of `train_step` for the next steps, and the progress after them; tokens as `fit` has them."""
    training = config.training
    K, B = training.steps_per_dispatch, training.resolved_micro_batch_size
    A = training.batch_size // B
    counts_K, rates_K = np.zeros((K,), np.int32), np.zeros((K,), np.float32)
    for k in range(num_steps):
        size = batch_size(training, progress)
        counts_K[k] = size // B
        rates_K[k] = learning_rate(config.optimizer, progress)
        progress = progress.advance(size, sequence_tokens or config.sequence_length)
    rows = stream.take(int(counts_K.sum()) * B, state)
    rows = rows if isinstance(rows, Mapping) else {"tokens": rows}

    def laid_out(values: np.ndarray) -> jax.Array:
        steps_KAB = np.zeros((K, A, len(sharding.local_rows(B)), *values.shape[1:]), values.dtype)
        micro_batches, start = values.reshape(-1, *steps_KAB.shape[2:]), 0
        for k in range(num_steps):
            steps_KAB[k, : counts_K[k]] = micro_batches[start : start + counts_K[k]]
            start += counts_K[k]
        return sharding.put_batch(steps_KAB, B, lead=2)

    return {name: laid_out(values) for name, values in rows.items()}, counts_K, rates_K, progress


_KNOWN = ("loss", "grad_norm", "weight", "skipped", "skipped_in_a_row", "next_kl_coefficient")
"""Metrics that are reported otherwise or not at all; the others have the names that their stage gives them."""


class _History:
    """Metrics on their way from the device: held for one interval, so that fetching them waits for nothing."""

    def __init__(self, report: Callable, ledger: Ledger, mfu_per_token_rate: float | None, max_skipped: int):
        self._report, self._ledger, self._mfu_per_token_rate = report, ledger, mfu_per_token_rate
        self._max_skipped = max_skipped
        self._paused = False
        self._held: tuple[Progress, float, Metrics, dict[str, float]] | None = None
        self._speed: dict[str, float | None] = {"tokens_per_second": None, "mfu": None, "data_wait_fraction": None}

    def start(self, progress: Progress) -> None:
        """Measure speed from here on: the steps so far are done, and the time so far is not counted."""
        self._tokens = progress.tokens
        self._seconds = self._ledger.seconds
        self._paused = False

    def pause(self, progress: Progress, metrics: Metrics) -> None:
        """Wait for the newest step, whose metrics these are, and measure no speed until `start`."""
        jax.block_until_ready(metrics)
        self._measure(progress)
        self._paused = True

    def add(self, progress: Progress, rate: float, metrics: Metrics, of_rows: Mapping[str, float]) -> None:
        """Hold these metrics, and report those that were held."""
        held, self._held = self._held, (progress, rate, metrics, dict(of_rows))
        if held is not None:
            fetched = jax.device_get(held[2])
            # Where the device keeps up with the host, the newest steps are done by now as well, and count.
            self._measure(progress if _is_done(metrics) else held[0])
            self._emit(*held[:2], fetched, held[3], progress)

    def settle(self, progress: Progress) -> None:
        """Where rows are drawn by the model, all steps before are done: what is drawn next counts to the next step."""
        if self._held is not None and self._held[0] == progress:
            self._measure(progress)

    def rest(self, progress: Progress, metrics: Metrics) -> bool:
        """Wait for the newest step, whose metrics these are, report what is held, and say whether the step counted."""
        metrics = jax.device_get(metrics)
        self._measure(progress)
        if self._held is not None:
            self._emit(*self._held[:2], jax.device_get(self._held[2]), self._held[3], progress)
            self._held = None
        self._require_learning(progress, metrics)
        return metrics["skipped_in_a_row"] == 0

    def _emit(
        self, progress: Progress, rate: float, metrics: Metrics, of_rows: dict[str, float], newest: Progress
    ) -> None:
        own = {name: float(value) for name, value in metrics.items() if name not in _KNOWN}
        self._report(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "loss": float(metrics["loss"]),
                "learning_rate": rate,
                "grad_norm": float(metrics["grad_norm"]),
                "skipped_steps": int(metrics["skipped"]),
                **own,
                **of_rows,
                **self._speed,
                "seconds": self._ledger.wall_seconds,
            }
        )
        self._require_learning(newest, metrics)

    def _require_learning(self, newest: Progress, metrics: Mapping[str, Any]) -> None:
        """Look at the fetched metrics of one step; `newest` is as far as the data has been used."""
        in_a_row = int(metrics["skipped_in_a_row"])
        if in_a_row >= self._max_skipped:
            numbers = f"the loss is {metrics['loss']:.4g}, the gradient's norm {metrics['grad_norm']:.4g}"
            raise Diverged(newest, f"{in_a_row} steps in a row were skipped; {numbers}")

    def _measure(self, done: Progress) -> None:
        """The speed since the last measurement; it stands where no further step is done since."""
        tokens = done.tokens - self._tokens
        if self._paused or tokens <= 0:  # tokens < 0: what is held is of before `start`
            return
        now, before = self._ledger.seconds, self._seconds
        data_seconds = now["data"] - before["data"]
        seconds = now["step"] - before["step"] + now["rollout"] - before["rollout"] + data_seconds
        speed, per_rate = tokens / seconds, self._mfu_per_token_rate
        self._speed = {
            "tokens_per_second": speed,
            "mfu": None if per_rate is None else speed * per_rate,
            "data_wait_fraction": data_seconds / seconds,
        }
        self.start(done)


def _is_done(metrics: Metrics) -> bool:
    return all(value.is_ready() for value in metrics.values())
