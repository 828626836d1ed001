"""What a diverged run does before it gives up: back to a checkpoint, and on without the data it diverged on."""

from collections.abc import Callable
from pathlib import Path

import orbax.checkpoint as ocp

from gptjax.errors import UserError
from gptjax.parallel import distributed
from gptjax.stages import resume
from gptjax.training import checkpoint, recovery, run_dir
from gptjax.training.ledger import Ledger
from gptjax.training.metrics import METRICS_FILE, MetricsLog
from gptjax.training.schedule import Progress
from gptjax.training.state import TrainState


class Rollbacks:
    """The rollbacks of a run, at most so many.

    Large runs are brought over a loss spike in just this way (PaLM, Chowdhery et al. 2022): the same batches at other
    parameters do no harm, and neither do these parameters on other batches.
    """

    def __init__(self, most: int, directory: Path, manager: ocp.CheckpointManager, ledger: Ledger):
        self._left, self._directory, self._manager, self._ledger = most, directory, manager, ledger
        self._used: list[int] = []

    def roll_back(
        self, diverged: Progress, abstract_state: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, Progress] | None:
        """The state of the newest whole checkpoint, or None where there is none or no try is left.

        Where no newer one was saved since it last went back, either the bad data is longer than what was left out, or
        the checkpoint is bad itself: twice as much is left out then, and a third time an older one is taken.

        Newer checkpoints are removed, because they lead to where the run diverged, and the run will reach their steps
        again; so are later lines of its logs, and one of `metrics.jsonl` tells of it. All processes call it.

        Returns:
            The state and its progress, from which sequences that were seen since are left out.
        """
        self._manager.wait_until_finished()
        checkpoints = self._directory / run_dir.CHECKPOINTS
        steps = [step for step in checkpoint.all_steps(checkpoints)[::-1] if self._used.count(step) < 2]
        if not self._left or not steps:
            return None
        try:
            chosen = recovery.choose(checkpoints, lambda _: steps).step
        except UserError as error:  # all are damaged
            say(str(error))
            return None
        self._left -= 1
        again = bool(self._used) and chosen <= self._used[-1]
        self._used.append(chosen)
        state, metadata = checkpoint.restore(checkpoints, chosen, abstract_state)
        for step in [step for step in self._manager.all_steps() if step > chosen]:
            self._manager.delete(step)
        self._ledger.lose(since=metadata["seconds"])
        saved = Progress(**metadata["progress"])
        newly = (diverged.position - saved.position) * (2 if again else 1)
        progress = saved._replace(left_out=saved.left_out + newly)
        say(f"back to step {progress.step}, and on without the next {newly:,} sequences; {self._left} tries are left")
        if distributed.is_first():
            resume.cut_back(self._directory, progress.step)
            event = {"rolled_back_from": diverged.step, "left_out_sequences": newly}
            MetricsLog(self._directory / METRICS_FILE).write({"step": saved.step, "tokens": saved.tokens} | event)
        return state, progress
