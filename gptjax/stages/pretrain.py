"""Pretraining: raw text in, a run directory out. The first of the stages that share step, loop and checkpoints."""

import dataclasses
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import optax

from gptjax.config import Config, DataConfig
from gptjax.config_files import to_dict
from gptjax.data.loader import RowStream, TokenRows
from gptjax.data.prepare import prepare
from gptjax.data.shards import PreparedData, TokenArray
from gptjax.errors import UserError
from gptjax.model.accounting import mfu, parameter_counts, peak_flops, training_flops_per_token
from gptjax.model.fp8 import require_hardware
from gptjax.model.gpt import GPT
from gptjax.parallel import distributed
from gptjax.parallel.launch import DistributedConfig
from gptjax.parallel.mesh import make_mesh
from gptjax.resolve import memory_bytes, require_fits, resolve, resolve_mesh
from gptjax.stages import callbacks, messages, resume
from gptjax.stages.rollback import Rollbacks
from gptjax.text.tokenizer import Tokenizer
from gptjax.training import checkpoint, lock, run_dir
from gptjax.training.ledger import Ledger
from gptjax.training.loggers import Logger, open_loggers, require_packages
from gptjax.training.loop import Callbacks, Corrupted, Diverged, fit
from gptjax.training.losses import language_model_loss
from gptjax.training.metrics import METRICS_FILE, Console, MetricsLog
from gptjax.training.optimizer import make_optimizer
from gptjax.training.profile import Profiler
from gptjax.training.signals import stop_on_signals
from gptjax.training.state import abstract_state
from gptjax.training.step import TrainStep, make_train_step
from gptjax.training.summary import read_summary, summarize

_OUTCOMES = {Diverged: "diverged", Corrupted: "corrupted"}


def train(
    config: Config,
    *,
    name: str = "run",
    console: Console | None = None,
    launch: DistributedConfig | None = None,
    accept_changes: Collection[str] = (),
    started: float | None = None,
) -> dict[str, Any]:
    """Train a model on the text of `data.path`, or continue the run in `run_dir` exactly where it stood.

    Args:
        config: fields left None are derived; `run_dir` None takes the next free name under `runs/`.
        name: what a new run is called after.
        console: where progress is shown; standard output by default. Of several processes the first alone shows it.
        launch: how this process finds others to train with, before JAX is used; None: it is alone, or connected.
        accept_changes: fields (`section.field`) that may differ from those with which a continued run began. With
            `data.path` among them it goes on, with its old tokenizer, on other text.
        started: when `time.perf_counter` said that the work began, for the run's account; None: now.

    Returns:
        What the run's `summary.json` holds; of several processes, on all but the first only `stopped` and `step`.

    Raises:
        UserError: configuration, data or the run's folder do not fit; before anything is compiled, and
            without changing what is there.
    """
    started = time.perf_counter() if started is None else started
    config = _with_absolute_paths(config)
    if launch is not None:
        distributed.connect(launch, _card(config) | {"accepted changes": [*accept_changes]})
    chosen = config.run_dir or str(run_dir.next_run_dir(name))
    directory = Path(distributed.gather_text(chosen)[0])  # where all look for a free name, the first decides
    config = dataclasses.replace(config, run_dir=str(directory))
    with console or _console() as console:
        continued = (directory / run_dir.CONFIG_FILE).is_file()
        if continued:
            with distributed.together():
                config = resume.merge_with_saved(config, directory, accept_changes, console)
            summary = read_summary(directory)
            if summary and summary["stopped"] == "finished" and summary["step"] >= config.training.steps:
                console.message(f"{directory} is finished: {summary['step']} steps")
                console.message(messages.next_command(directory, config, "finished"))
                return summary
        with distributed.together():
            config = _with_mesh(config, console)
            require_packages(config.training.log_to)
        with run_dir.writable(directory), lock.hold(directory, console.message) as require_folder:
            distributed.check_shared(directory)
            if config.data.path == DataConfig().path:
                console.message("no --data.path: training on the source code of Python's standard library")
            # A run keeps the tokenizer that it was given, wherever the file is by now.
            kept = continued and (config.tokenizer.path or "data.path" in accept_changes)
            tokenizer = Tokenizer.load(directory / run_dir.TOKENIZER_FILE) if kept else config.tokenizer
            with distributed.first_then_others():
                data = prepare(config.data, tokenizer, log=console.message)
            if continued:
                resume.check_same_tokenizer(directory, data.tokenizer)
            config = resolve(config, jax.devices(), data.tokenizer)
            memory = memory_bytes(jax.local_devices()[0])
            require_fits(config.mesh, config.model, config.training, memory, config.optimizer)
            with jax.set_mesh(make_mesh(config.mesh)):
                return _pretrain(config, directory, data, console, require_folder, accept_changes, started)


def _pretrain(
    config: Config,
    directory: Path,
    data: PreparedData,
    console: Console,
    require_folder: Callable[[], None],
    accept_changes: Collection[str],
    started: float,
) -> dict[str, Any]:
    """Everything from the first array to the summary, under the mesh."""
    sources, held_out = _training_rows(data, config), _rows(data.tokens("validation"), "validation split", config)
    _check_prompt(config, data.tokenizer)
    model, optimizer = GPT(config.model), make_optimizer(config.optimizer)
    with stop_on_signals() as stop, ExitStack() as opened:
        state, progress, seconds_before = resume.start(
            *(model, optimizer, config), directory, data, console, accept_changes
        )
        manager = opened.enter_context(checkpoint.open_checkpoints(directory / run_dir.CHECKPOINTS, config.checkpoint))
        loggers: Sequence[Logger] = ()
        with distributed.together():
            if distributed.is_first():
                # The tokenizer first: a folder with a configuration is a run, and a run has a tokenizer.
                run_dir.write_text(directory / run_dir.TOKENIZER_FILE, data.tokenizer.to_json())
                run_dir.save_config(directory, config, run_dir.environment())
                seconds_before = resume.count_lost(directory, progress.step, seconds_before)
                resume.cut_back(directory, progress.step)
                loggers = opened.enter_context(open_loggers(directory, config, progress.step, console.message))
        console.message(messages.description(config, sources, held_out, progress))
        ledger = Ledger(seconds_before, started)
        calls = Callbacks(
            report=callbacks.reporter(config, MetricsLog(directory / METRICS_FILE), loggers, console),
            evaluate=callbacks.evaluator(config, held_out, data.tokenizer),
            sample=callbacks.sampler(config, directory, data.tokenizer, console),
            save=callbacks.saver(config, manager, data, ledger),
            should_stop=callbacks.watcher(stop, manager, require_folder),
        )
        with ledger("evaluation"):
            resume.make_up_evaluation(config, directory, state, progress, calls)
        train_step, share = _compile_step(config, model, optimizer, data.tokenizer), callbacks.share(config)
        profiler = _profiler(config, directory, console)
        # What was changed by hand deserves as many tries as a new run.
        tried = [] if accept_changes else resume.tried_rollbacks(directory, progress.step)
        rollbacks = Rollbacks(config, directory, manager, ledger, loggers, tried)
        stopped = None
        while stopped is None:
            weights, seed = config.data.weights, config.training.seed
            stream = RowStream([*sources.values()], seed, progress.position, weights=weights, share=share)
            arguments = (
                config,
                state,
                progress,
                train_step,
                stream,
                calls,
                ledger,
                _mfu_per_token_rate(config),
                profiler,
            )
            del state  # or a diverged one would stay in memory beside the one that takes its place
            try:
                state, progress = fit(*arguments)
                stopped = stop.outcome or "finished"
            except (Diverged, Corrupted) as error:
                progress, stopped = error.progress, _OUTCOMES[type(error)]
                console.message(f"{stopped}: {error}")
            finally:
                del arguments
                stream.close()
                if profiler is not None:
                    profiler.close()
            if stopped == "diverged":
                back = rollbacks.roll_back(progress, abstract_state(model, optimizer), console.message)
                if back is not None:
                    stopped, (state, progress) = None, back
        with ledger("checkpoint"):
            manager.wait_until_finished()
        require_folder()
    if progress.step == config.training.steps and stopped not in _OUTCOMES.values():
        stopped = "finished"
    summary = {"stopped": stopped, "step": progress.step}
    if distributed.is_first():
        summary = summarize(directory, stopped, progress, ledger, parameter_counts(config.model)["total"])
        run_dir.write_json(directory / run_dir.SUMMARY_FILE, summary)
        console.close()
        console.message(messages.closing(summary, directory, config))
    distributed.gather_text("")  # JAX takes a process for lost that is still writing when the others have ended
    return summary


def _card(config: Config) -> dict[str, Any]:
    """What must be the same on all processes of a run, before any of them starts JAX."""
    folder = os.path.abspath(config.run_dir or "runs")
    return {"configuration": to_dict(config), "folder": folder} | run_dir.software()


def _console() -> Console:
    return Console() if distributed.is_first() else Console(open(os.devnull, "w", encoding="utf-8"))


def _with_absolute_paths(config: Config) -> Config:
    """A run that is continued from another folder finds its data and its tokenizer."""
    data, tokenizer = config.data, config.tokenizer
    paths = tuple(path if "://" in path else os.path.abspath(path) for path in data.path)
    data = dataclasses.replace(data, path=paths, prepared_dir=os.path.abspath(data.prepared_dir))
    if tokenizer.path:
        tokenizer = dataclasses.replace(tokenizer, path=os.path.abspath(tokenizer.path))
    return dataclasses.replace(config, data=data, tokenizer=tokenizer)


def _with_mesh(config: Config, console: Console) -> Config:
    """Choose the mesh and say why; what does not fit the devices is refused before the data is read."""
    devices = jax.devices()
    # The vocabulary is not known before the data is.
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size)
    memory = memory_bytes(jax.local_devices()[0])
    mesh, reason = resolve_mesh(config.mesh, len(devices), model, config.training, memory, config.optimizer)
    if len(devices) > 1:
        console.message(f"mesh {messages.axes(mesh)}: {reason}")
    messages.attention_kernels(dataclasses.replace(config, mesh=mesh))  # refuses one that is forced and cannot run
    if config.model.fp8:
        require_hardware(devices[0])
    require_fits(mesh, config.model, config.training, memory, config.optimizer)
    if config.guard.rerun_every_steps and devices[0].platform == "gpu" and not config.training.deterministic:
        raise UserError(
            "guard.rerun_every_steps compares bit for bit, which on a GPU needs training.deterministic; "
            "give both, or guard.rerun_every_steps 0"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    if config.training.deterministic and devices[0].platform == "gpu" and "deterministic_ops" not in flags:
        raise UserError(
            "training.deterministic needs XLA's flags before JAX starts; train.py sets them, elsewhere call "
            "gptjax.parallel.platform.configure(deterministic=True) first"
        )
    return dataclasses.replace(config, mesh=mesh)


def _check_prompt(config: Config, tokenizer: Tokenizer) -> None:
    """A sample that fails at the first interval would cost the steps before it."""
    prompt = config.training.sample_prompt
    try:
        ids = tokenizer.encode(prompt)
        tokenizer.require_lossless(prompt, ids)
    except UserError as error:
        raise UserError(f"training.sample_prompt {prompt!r}: {error}") from None
    num_tokens = len(ids)
    if num_tokens >= config.model.context_length:
        raise UserError(
            f"training.sample_prompt has {num_tokens} tokens, which leaves none of model.context_length "
            f"{config.model.context_length} to write; at most {config.model.context_length - 1} work"
        )


def _training_rows(data: PreparedData, config: Config) -> dict[str, TokenRows]:
    """The rows of each source, or, where there are no weights, of all of them as one, by what they are called."""
    if not config.data.weights:
        return {" ".join(data.index.paths): _rows(data.tokens("train"), "train split", config)}
    names = [" ".join(source.paths) for source in data.index.sources]
    return {
        f"{number}: {name}": _rows(tokens, f"train split of {name}", config)
        for number, (name, tokens) in enumerate(zip(names, data.tokens_by_source("train"), strict=True), start=1)
    }


def _rows(tokens: TokenArray, what: str, config: Config) -> TokenRows:
    try:
        return TokenRows(tokens, config.model.context_length)
    except UserError as error:
        fraction = config.data.validation_fraction
        raise UserError(f"{what} (data.validation_fraction {fraction:g}): {error}") from None


def _compile_step(
    config: Config, model: GPT, optimizer: optax.GradientTransformation, tokenizer: Tokenizer
) -> TrainStep:
    c, training = config.model, config.training
    drops = c.embedding_dropout or c.attention_dropout or c.residual_dropout
    return make_train_step(
        language_model_loss(model, training.z_loss, callbacks.separator(config, tokenizer), training.loss_chunk_tokens),
        optimizer,
        dropout_seed=training.seed if drops else None,
        accumulates=training.batch_size > training.resolved_micro_batch_size,
        steps_per_dispatch=training.steps_per_dispatch,
        spike_sigmas=config.guard.spike_sigmas,
    )


def _profiler(config: Config, directory: Path, console: Console) -> Profiler | None:
    window = config.training.profile_window
    folder = directory / run_dir.PROFILE if distributed.is_first() else None
    return None if window is None else Profiler(window, folder, console.message)


def _mfu_per_token_rate(config: Config) -> float | None:
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind, config.model.compute_dtype)
    return mfu(1.0, training_flops_per_token(config.model).total, jax.device_count(), peak)
