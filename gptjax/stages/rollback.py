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
        self._tried: set[int] = set()

    def roll_back(
        self, diverged: Progress, abstract_state: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, Progress] | None:
        """The state of the newest whole checkpoint that this has not gone back to yet, or None where none or no try is
        left.

        Newer checkpoints are removed, because they lead to where the run diverged, and the run will reach their steps
        again; so are later lines of its logs, and one of `metrics.jsonl` tells of it. All processes call it.

        Returns:
            The state and its progress, from which sequences that were seen since are left out.
        """
        self._manager.wait_until_finished()
        checkpoints = self._directory / run_dir.CHECKPOINTS
        steps = [step for step in checkpoint.all_steps(checkpoints)[::-1] if step not in self._tried]
        if not self._left or not steps:
            return None
        try:
            chosen = recovery.choose(checkpoints, lambda _: steps).step
        except UserError as error:  # all are damaged
            say(str(error))
            return None
        self._left -= 1
        self._tried.add(chosen)
        state, metadata = checkpoint.restore(checkpoints, chosen, abstract_state)
        for step in [step for step in self._manager.all_steps() if step > chosen]:
            self._manager.delete(step)
        self._ledger.lose(since=metadata["seconds"])
        saved = Progress(**metadata["progress"])
        progress = saved._replace(left_out=diverged.position - saved.sequences)
        newly = progress.left_out - saved.left_out
        say(f"back to step {progress.step}, and on without the {newly:,} sequences since; {self._left} tries are left")
        if distributed.is_first():
            resume.cut_back(self._directory, progress.step)
            event = {"rolled_back_from": diverged.step, "left_out_sequences": newly}
            MetricsLog(self._directory / METRICS_FILE).write({"step": saved.step, "tokens": saved.tokens} | event)
        return state, progress
