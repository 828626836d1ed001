"""What safety costs: saving, checking, restoring, and judging each step.

`python benchmarks/checkpoint_cost.py` trains a model of about 100M parameters by turns in blocks that begin with an
asynchronous save, hashing included, and in blocks that do not: what the first take longer is what a save costs. Blocks
of a third kind save nothing, but hold the state during a step, as every asynchronous save must on a CPU: the step then
writes into fresh memory. It then restores with and without checking the checksums, the files not being in the page
cache, beside a plain reading of the same files; and runs a small model's step by turns with and without the guard.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from gptjax.config import CheckpointConfig, ModelConfig, OptimizerConfig
from gptjax.model.accounting import parameter_counts
from gptjax.model.gpt import GPT
from gptjax.parallel import sharding
from gptjax.parallel.mesh import one_device_mesh
from gptjax.training import checkpoint, recovery, step
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import TrainState, abstract_state, init_state

SAVE_EVERY = 100
LARGE = ModelConfig(num_layers=12, model_dim=768, num_heads=12, context_length=256, vocab_size=20_000, bias=False)
SMALL = ModelConfig(num_layers=4, model_dim=128, num_heads=4, context_length=128, vocab_size=4096)


class Trainer:
    """A state, and the compiled step that advances it on made tokens."""

    def __init__(self, config: ModelConfig, batch_size: int):
        self.model, self.optimizer = GPT(config), make_optimizer(OptimizerConfig())
        made = step.make_train_step(
            language_model_loss(self.model), self.optimizer, dropout_seed=None, accumulates=False, spike_sigmas=6.0
        )
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 1, batch_size, config.context_length + 1))
        batch = {"tokens": sharding.put_batch(tokens.astype(np.int32))}
        self.rest = (batch, np.ones(1, np.int32), np.full(1, 1e-4, np.float32), 1)
        self.state: TrainState = init_state(self.model, self.optimizer, 0)
        self.program = made.lower(self.state, *self.rest).compile()
        self.run(2)

    def run(self, num_steps: int) -> float:
        """Seconds that so many steps take."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self.state, metrics = self.program(self.state, *self.rest)
            jax.block_until_ready(metrics)
        return time.perf_counter() - start


def cost_of_saving(trainer: Trainer, folder: Path, block: int, repeats: int) -> dict[str, float]:
    """Seconds of a step, seconds that a save blocks, and seconds that it costs with all that it slows down."""
    plain, holding, saving, blocking = [], [], [], []
    with checkpoint.open_checkpoints(folder, CheckpointConfig(keep_newest=1, keep_best=0)) as manager:
        for number in range(1, repeats + 1):
            plain.append(trainer.run(block))
            held = [np.asarray(leaf) for leaf in jax.tree.leaves(trainer.state)]
            seconds = trainer.run(1)
            del held
            holding.append(seconds + trainer.run(block - 1))
            start = time.perf_counter()
            checkpoint.save(manager, number, trainer.state, {})
            blocking.append(time.perf_counter() - start)
            trainer.run(block)
            saving.append(time.perf_counter() - start)
            manager.wait_until_finished()

    def extra(seconds: list[float]) -> float:
        return statistics.median(more - without for more, without in zip(seconds, plain, strict=True))

    return {
        "step_seconds": statistics.median(plain) / block,
        "blocking_seconds": statistics.median(blocking),
        "holding_seconds": extra(holding),
        "extra_seconds": extra(saving),
        "overhead": extra(saving) / (SAVE_EVERY * statistics.median(plain) / block),
    }


def cost_of_restoring(trainer: Trainer, folder: Path) -> dict[str, float]:
    """GB/s of the disk, of checking alone, and of restoring without and with it."""
    (number,) = checkpoint.all_steps(folder)
    files = [path for path in (folder / str(number)).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    target = abstract_state(trainer.model, trainer.optimizer)

    def read() -> None:
        for path in files:
            with path.open("rb", buffering=0) as stream:
                while stream.read(2**24):
                    pass

    def check() -> None:
        recovery.choose(folder, checkpoint.steps_by_age)

    def restore() -> None:
        jax.block_until_ready(checkpoint.restore(folder, number, target))

    def check_and_restore() -> None:
        check()
        restore()

    works = {"read": read, "check": check, "restore": restore, "check_and_restore": check_and_restore}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(3):
        for name, work in works.items():
            seconds[name].append(_uncached(files, work))
    speeds = {f"{name}_gb_per_second": size / 1e9 / statistics.median(values) for name, values in seconds.items()}
    return {"gigabytes": size / 1e9} | speeds


def _uncached(files: list[Path], work: Callable[[], None]) -> float:
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cost_of_the_guard(block: int, repeats: int) -> dict[str, float]:
    """How much longer a small model's step takes for being judged; the median of neighbours' ratios."""
    guarded = Trainer(SMALL, 8)
    with mock.patch.object(step, "judge", lambda guard, *_: (jax.numpy.bool_(True), guard)):
        unguarded = Trainer(SMALL, 8)
    ratios = []
    for number in range(repeats):
        first, second = (guarded, unguarded) if number % 2 else (unguarded, guarded)
        times = {id(trainer): trainer.run(block) for trainer in (first, second)}
        ratios.append(times[id(guarded)] / times[id(unguarded)])
    return {"guard": statistics.median(ratios) - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", type=int, default=12, help="steps of a block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, jax.set_mesh(one_device_mesh()):
        guard = cost_of_the_guard(block=20, repeats=8 * options.repeats)
        trainer = Trainer(LARGE, 1)
        saving = cost_of_saving(trainer, Path(name) / "checkpoints", options.block, options.repeats)
        restoring = cost_of_restoring(trainer, Path(name) / "checkpoints")
    figures = {"parameters": parameter_counts(LARGE)["total"], **saving, **restoring, **guard}
    print(
        f"{figures['parameters']:,} parameters, {figures['gigabytes']:.2f} GB, {figures['step_seconds']:.2f} s a step"
    )
    print(
        f"a save blocks for {figures['blocking_seconds']:.2f} s and costs {figures['extra_seconds']:.2f} s: "
        f"{100 * figures['overhead']:.2f} % of {SAVE_EVERY} steps; "
        f"holding the state during a step, without saving, costs {figures['holding_seconds']:.2f} s"
    )
    for label, key in (
        ("plain reading", "read"),
        ("checking", "check"),
        ("restoring", "restore"),
        ("checking and restoring", "check_and_restore"),
    ):
        print(f"{label:24} {figures[f'{key}_gb_per_second']:.2f} GB/s")
    print(f"the guard costs {100 * figures['guard']:+.2f} % of a small model's step")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
