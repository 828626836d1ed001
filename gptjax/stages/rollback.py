"""What a diverged run does before it gives up: back to a checkpoint, and on without the data it diverged on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import orbax.checkpoint as ocp

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.parallel import distributed
from gptjax.stages import resume
from gptjax.training import checkpoint, recovery, run_dir
from gptjax.training.ledger import Ledger
from gptjax.training.loggers import Logger
from gptjax.training.metrics import METRICS_FILE, MetricsLog
from gptjax.training.schedule import Progress
from gptjax.training.state import TrainState


class Rollbacks:
    """The rollbacks of a process, at most so many, with those before it that no checkpoint has come beyond.

    Large runs are brought over a loss spike in just this way (PaLM, Chowdhery et al. 2022): the same batches at other
    parameters do no harm, and neither do these parameters on other batches.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        manager: ocp.CheckpointManager,
        ledger: Ledger,
        loggers: Sequence[Logger],
        tried: Sequence[int],
    ):
        """
        Args:
            tried: the steps that earlier processes went back to in vain, as `resume.tried_rollbacks` has them.
        """
        self._left, self._verify = max(0, config.guard.max_rollbacks - len(tried)), config.checkpoint.verify
        self._directory, self._manager, self._ledger, self._loggers = directory, manager, ledger, loggers
        self._used = [*tried]

    def roll_back(
        self, diverged: Progress, abstract_state: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, Progress] | None:
        """The state of the newest whole checkpoint, or None where there is none or no try is left.

        Where no newer one was saved since it last went back, either the bad data is longer than what was left out, or
        the checkpoint is bad itself: twice as much is left out then, and a third time an older one is taken.

        Newer checkpoints lead to where the run diverged, and the run will reach their steps again: they become
        `STEP.rolled-back`. Later lines of the logs are cut, and one of `metrics.jsonl` tells of it. All processes call
        it.

        Returns:
            The state and its progress, from which sequences that were seen since are left out.
        """
        self._manager.wait_until_finished()
        checkpoints = self._directory / run_dir.CHECKPOINTS
        steps = [step for step in recovery.agreed_steps(checkpoints) if self._used.count(step) < 2]
        if not self._left or not steps:
            return None
        try:
            choice = recovery.choose(checkpoints, lambda _: steps, verify=self._verify)
        except UserError as error:  # all are damaged
            say(str(error))
            return None
        state, metadata = checkpoint.restore(checkpoints, choice.step, abstract_state)
        saved = Progress(**metadata["progress"])
        again = bool(self._used) and choice.step <= self._used[-1]
        newly = (diverged.position - saved.position) * (2 if again else 1)
        progress = saved._replace(left_out=saved.left_out + newly)
        self._left -= 1
        self._used.append(choice.step)
        with distributed.together():
            if distributed.is_first():
                self._tidy(choice, say)
                resume.cut_back(self._directory, saved.step)
                for logger in self._loggers:
                    logger.go_back(saved.step)
                event = {"rolled_back_from": diverged.step, "left_out_sequences": newly, "left_out": progress.left_out}
                MetricsLog(self._directory / METRICS_FILE).write({"step": saved.step, "tokens": saved.tokens} | event)
        self._manager.reload()
        self._ledger.lose(since=metadata["seconds"])
        say(f"back to step {saved.step}, and on without the next {newly:,} sequences; tries left: {self._left}")
        return state, progress

    def _tidy(self, choice: recovery.Choice, say: Callable[[str], None]) -> None:
        checkpoints = self._directory / run_dir.CHECKPOINTS
        for line in recovery.tidy(checkpoints, choice):
            say(line)
        for step in checkpoint.all_steps(checkpoints):
            if step > choice.step:
                aside = recovery.set_aside(checkpoints / str(step), "rolled-back")
                say(f"checkpoint {step} is kept as {aside.name}; nothing uses it any more")
