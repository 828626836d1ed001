"""A run of any stage, from its configuration to its summary: what stages share around step, loop and checkpoints."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from gptjax.config import Config
from gptjax.config_files import to_dict
from gptjax.errors import UserError
from gptjax.model.accounting import mfu, parameter_counts, peak_flops
from gptjax.model.fp8 import require_hardware
from gptjax.model.workload import Networks, flops_per_token, sequence_tokens
from gptjax.parallel import distributed
from gptjax.parallel.launch import DistributedConfig
from gptjax.parallel.mesh import make_mesh
from gptjax.resolve import memory_bytes, require_fits, resolve, resolve_mesh, with_date
from gptjax.stages import callbacks, dpo, grpo, messages, ppo, pretrain, resume, reward, sft, start
from gptjax.stages.rollback import Rollbacks
from gptjax.stages.stage import Data, Stage
from gptjax.text.tokenizer import Tokenizer
from gptjax.training import checkpoint, lock, run_dir
from gptjax.training.ledger import Ledger
from gptjax.training.loggers import Logger, open_loggers, require_packages
from gptjax.training.loop import Callbacks, Corrupted, Diverged, fit
from gptjax.training.metrics import METRICS_FILE, Console, MetricsLog
from gptjax.training.profile import Profiler
from gptjax.training.signals import stop_on_signals
from gptjax.training.step import TrainStep, make_train_step
from gptjax.training.summary import read_summary, summarize

STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "grpo": grpo}
"""Each has `configure`, `load_data`, `example_rows` and `open_stage`."""
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
    """Train a model on `data.path` as `stage` says, or continue the run in `run_dir` exactly where it stood.

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
        with distributed.together():
            config = STAGES[config.stage].configure(start.inherit(config, continued, console.message))
        if continued:
            with distributed.together():
                config = resume.merge_with_saved(config, directory, accept_changes, console)
            summary = read_summary(directory)
            if summary and summary["stopped"] == "finished" and summary["step"] >= (config.training.steps or math.inf):
                console.message(f"{directory} is finished: {summary['step']} steps")
                console.message(messages.next_command(directory, config, "finished"))
                return summary
        today = distributed.gather_text(with_date(config).data.chat_date)[0]  # all have the first one's day
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, chat_date=today))
        with distributed.together():
            config = _with_mesh(config, console)
            require_packages(config.training.log_to)
        with run_dir.writable(directory), lock.hold(directory, console.message) as require_folder:
            distributed.check_shared(directory)
            # A run keeps the tokenizer that it was given, wherever the file is by now.
            kept = continued and (config.tokenizer.path or "data.path" in accept_changes)
            tokenizer = Tokenizer.load(directory / run_dir.TOKENIZER_FILE) if kept else None
            stage = STAGES[config.stage]
            with distributed.first_then_others():
                data = stage.load_data(config, tokenizer, console.message)
            if continued:
                resume.check_same_tokenizer(directory, data.tokenizer)
            networks_of = start.networks_of(config, data.rows)
            config = resolve(config, jax.devices(), data.tokenizer, num_rows=data.num_rows, networks_of=networks_of)
            data = data._replace(tokenizer=data.tokenizer.with_vocab_size(config.model.vocab_size))
            require_fits(config, memory_bytes(jax.local_devices()[0]), networks_of)
            with jax.set_mesh(make_mesh(config.mesh)):
                opened = stage.open_stage(config, data, directory, console.message)
                return _run(config, directory, data, opened, console, require_folder, accept_changes, started)


def _run(
    config: Config,
    directory: Path,
    data: Data,
    stage: Stage,
    console: Console,
    require_folder: Callable[[], None],
    accept_changes: Collection[str],
    started: float,
) -> dict[str, Any]:
    """Everything from the first array to the summary, under the mesh."""
    held = start.networks_of(config, data.rows)(config)
    with stop_on_signals() as stop, ExitStack() as opened:
        state, progress, seconds_before = resume.start(config, stage, directory, data, console, accept_changes)
        manager = opened.enter_context(checkpoint.open_checkpoints(directory / run_dir.CHECKPOINTS, config.checkpoint))
        loggers: Sequence[Logger] = ()
        with distributed.together():
            if distributed.is_first():
                # The tokenizer first: a folder with a configuration is a run, and a run has a tokenizer.
                for name, text in [*data.tokenizer.texts().items(), *stage.files.items()]:
                    run_dir.write_text(directory / name, text)
                run_dir.save_config(directory, config, run_dir.environment())
                seconds_before = resume.count_lost(directory, progress.step, seconds_before)
                resume.cut_back(directory, progress.step)
                loggers = opened.enter_context(open_loggers(directory, config, progress.step, console.message))
        console.message(messages.description(config, held, progress, stage.description(progress)))
        ledger = Ledger(seconds_before, started)
        calls = Callbacks(
            report=callbacks.reporter(config, MetricsLog(directory / METRICS_FILE), loggers, console),
            evaluate=stage.evaluate,
            sample=stage.sample,
            save=callbacks.saver(config, manager, data, ledger),
            should_stop=callbacks.watcher(stop, manager, require_folder),
        )
        with ledger("evaluation"):
            resume.make_up_evaluation(config, directory, state, progress, calls)
            if progress.step == 0 and config.model.init_from and config.training.sample_every_steps:
                calls.sample(state, progress)  # what it says before it learns
        train_step = _compile_step(config, stage)
        profiler = _profiler(config, directory, console)
        # What was changed by hand deserves as many tries as a new run.
        tried = [] if accept_changes else resume.tried_rollbacks(directory, progress.step)
        rollbacks = Rollbacks(config, directory, manager, ledger, loggers, tried)
        stopped = None
        while stopped is None:
            stream = stage.stream(progress.position)
            arguments = (
                config,
                state,
                progress,
                train_step,
                stream,
                calls,
                ledger,
                _mfu_per_token_rate(config, held),
                profiler,
                sequence_tokens(held),
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
                back = rollbacks.roll_back(progress, stage.abstract_state, console.message)
                if back is not None:
                    stopped, (state, progress) = None, back
        with ledger("checkpoint"):
            manager.wait_until_finished()
        require_folder()
    if progress.step == config.training.steps and stopped not in _OUTCOMES.values():
        stopped = "finished"
    more = {}
    if stopped == "finished":
        with ledger("evaluation"):
            more = stage.finish(state)
    summary = {"stopped": stopped, "step": progress.step}
    if distributed.is_first():
        summary = summarize(directory, stopped, progress, ledger, parameter_counts(config.model)["total"]) | more
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
    """A run that is continued from another folder finds its data, its tokenizer, and the runs that it leans on."""

    def placed(path: str) -> str:
        return os.path.abspath(path) if path and "://" not in path else path

    data, ppo, reward = config.data, config.ppo, config.rl.reward
    file, colon, function = reward.rpartition(":")
    if file.endswith(".py"):
        reward = placed(file) + colon + function
    elif os.path.isdir(reward):
        reward = placed(reward)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init_from=placed(config.model.init_from)),
        tokenizer=dataclasses.replace(config.tokenizer, path=placed(config.tokenizer.path)),
        data=dataclasses.replace(
            data,
            path=tuple(map(placed, data.path)),
            prepared_dir=os.path.abspath(data.prepared_dir),
            chat_template=placed(data.chat_template),
        ),
        rl=dataclasses.replace(config.rl, reward=reward),
        ppo=dataclasses.replace(
            ppo, critic_from=placed(ppo.critic_from), pretraining_path=tuple(map(placed, ppo.pretraining_path))
        ),
    )


def _with_mesh(config: Config, console: Console) -> Config:
    """Choose the mesh and say why; what does not fit the devices is refused before the data is read."""
    devices = jax.devices()
    # The vocabulary is not known before the data is.
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size)
    memory = memory_bytes(jax.local_devices()[0])
    networks_of = start.networks_of(config)
    mesh, reason = resolve_mesh(dataclasses.replace(config, model=model), len(devices), memory, networks_of)
    if len(devices) > 1:
        console.message(f"mesh {messages.axes(mesh)}: {reason}")
    messages.attention_kernels(dataclasses.replace(config, mesh=mesh))  # refuses one that is forced and cannot run
    if config.model.fp8:
        require_hardware(devices[0])
    require_fits(dataclasses.replace(config, mesh=mesh), memory, networks_of)
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


def _compile_step(config: Config, stage: Stage) -> TrainStep:
    c, training = config.model, config.training
    drops = c.embedding_dropout or c.attention_dropout or c.residual_dropout
    return make_train_step(
        stage.loss,
        stage.optimizer,
        dropout_seed=training.seed if drops else None,
        accumulates=training.batch_size > training.resolved_micro_batch_size,
        steps_per_dispatch=training.steps_per_dispatch,
        spike_sigmas=config.guard.spike_sigmas,
        after=stage.after,
        frozen=stage.frozen,
    )


def _profiler(config: Config, directory: Path, console: Console) -> Profiler | None:
    window = config.training.profile_window
    folder = directory / run_dir.PROFILE if distributed.is_first() else None
    return None if window is None else Profiler(window, folder, console.message)


def _mfu_per_token_rate(config: Config, held: Networks) -> float | None:
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind, config.model.compute_dtype)
    return mfu(1.0, flops_per_token(held).total, jax.device_count(), peak)
