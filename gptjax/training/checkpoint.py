"""Checkpoints: for each step one folder, with the state's arrays and a JSON of everything else.

What writes takes the manager that `open_checkpoints` gives. What reads takes the folder and leaves it
as it is, so that a run can be sampled while it trains.
"""

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding

from gptjax.config import CheckpointConfig
from gptjax.errors import UserError

PyTree = Any


def open_checkpoints(directory: str | os.PathLike, config: CheckpointConfig) -> ocp.CheckpointManager:
    """A manager that saves into `directory/STEP/` behind the training, and keeps the newest and the best.

    What a killed run left half written is removed. Use it in a `with`: leaving that waits for the save
    under way; so does its `wait_until_finished`.
    """
    return _open(
        directory,
        ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            preservation_policy=_NewestAndBest(config.keep_newest, config.keep_best),
            best_fn=_validation_loss,  # without it Orbax writes no metrics
        ),
    )


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    metadata: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Start to save a step; on return the state may be donated.

    A step that is there already is left as it is, so evaluate before saving.

    Args:
        state: any pytree of arrays, in any sharding.
        metadata: whatever else the run needs to go on, as plain data for JSON.
        metrics: a step whose `val_loss` is among the lowest is kept when newer ones come.

    Raises:
        Exception: what stopped the previous save, which was asynchronous. `manager.check_for_errors`
            raises it too, and costs nothing.
    """
    manager.wait_until_finished()
    if step in manager.all_steps():
        return
    manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(dict(metadata))),
        metrics=dict(metrics or {}),
        force=True,  # else Orbax passes over a step that is older than the newest
    )


def all_steps(directory: str | os.PathLike) -> list[int]:
    """The steps whose checkpoints are complete, in order."""
    with _open(directory) as reader:
        return sorted(reader.all_steps())


def latest_step(directory: str | os.PathLike) -> int:
    """The newest step.

    Raises:
        UserError: there is no checkpoint.
    """
    steps = all_steps(directory)
    if not steps:
        raise UserError(f"there is no checkpoint in {directory}")
    return steps[-1]


def best_step(directory: str | os.PathLike) -> int:
    """The step of the lowest validation loss; of equal ones the first.

    Raises:
        UserError: there is no checkpoint with a validation loss.
    """
    with _open(directory) as reader:
        steps = sorted(reader.all_steps())
        losses = {step: _validation_loss(reader.metrics(step)) for step in steps}
    evaluated = [step for step in steps if losses[step] < math.inf]
    if not evaluated:
        raise UserError(f"no checkpoint in {directory} has a validation loss; without one: {_listed(steps)}")
    return min(evaluated, key=losses.__getitem__)


def restore(directory: str | os.PathLike, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Read a step back, bit for bit, every array straight into its shards.

    Args:
        abstract_state: the saved structure, of `jax.ShapeDtypeStruct`. Its shardings may be over the
            abstract mesh, as `jax.eval_shape` gives them, if the mesh is set; None is the first device.

    Returns:
        The state and the metadata.

    Raises:
        UserError: the step is not there or cannot be read, or a leaf is missing, unexpected, or of another
            shape or type. Nothing is cast.
    """
    target = jax.tree.map(_placed, abstract_state)
    with _open(directory) as reader:
        saved = _saved_arrays(reader, step)
        _require_equal(_leaves(saved), _leaves(_flat(target)), f"checkpoint {step} in {directory}")
    with _open(directory, bytes_at_once=_bytes_at_once(saved, _flat(target))) as reader:
        items = _read(reader, step, state=_arrays(target), metadata=ocp.args.JsonRestore())
    return items.state, items.metadata


def restore_params(directory: str | os.PathLike, step: int, abstract_params: PyTree) -> PyTree:
    """Read the subtree `params` of a saved state, as `restore` does; the optimizer's arrays stay on disk.

    Raises:
        UserError: as `restore`.
    """
    target = jax.tree.map(_placed, {"params": abstract_params})
    with _open(directory) as reader:
        saved = {name: leaf for name, leaf in _saved_arrays(reader, step).items() if name.startswith("params.")}
        _require_equal(_leaves(saved), _leaves(_flat(target)), f"checkpoint {step} in {directory}")
    with _open(directory, bytes_at_once=_bytes_at_once(saved, _flat(target))) as reader:
        return _read(reader, step, state=_arrays(target)).state["params"]


def read_metadata(directory: str | os.PathLike, step: int) -> dict[str, Any]:
    """Read only a step's metadata.

    Raises:
        UserError: the step is not there or cannot be read.
    """
    with _open(directory) as reader:
        _require_step(reader, step)
        return _read(reader, step, metadata=ocp.args.JsonRestore()).metadata


@dataclass(frozen=True)
class _NewestAndBest:
    """Orbax's own policies do not do this: best-of deletes the newest, or keeps all that were not evaluated."""

    newest: int
    best: int

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        del context
        losses = {info.step: _validation_loss(info.metrics) for info in checkpoints}
        steps = sorted(losses)
        evaluated = [step for step in steps if losses[step] < math.inf]
        keep = {*steps[-self.newest :], *sorted(evaluated, key=losses.__getitem__)[: self.best]}
        return [info.step in keep for info in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's, without its questions to JAX's preemption service.

    The service takes the number in the newest question, whoever asks, for how far this process is, and agrees on the
    next one. Orbax asks with the step and the loop counts dispatches since its start: after a save the processes
    would agree on a number that the loop reaches much later, or never.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def _validation_loss(metrics: Mapping[str, float] | None) -> float:
    return (metrics or {}).get("val_loss", math.inf)


def _bytes_at_once(saved: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """How much to read at the same time: a twentieth of what is this process's, but each array's part of it at once.

    Each byte on its way is in memory three times: as read, as an array of the host, and on the device.
    """
    sizes = []
    for name, leaf in wanted.items():
        storage, sharding = saved[name].storage, leaf.sharding
        chunk = storage.chunk_shape if storage else leaf.shape
        # Pieces that were saved are read whole: a shard that ends within one takes that one's rest, too.
        read = [
            part if part % saved_part == 0 else min(-(-size // saved_part), part // saved_part + 2) * saved_part
            for size, part, saved_part in zip(leaf.shape, sharding.shard_shape(leaf.shape), chunk, strict=True)
        ]
        shards = {str(index) for index in sharding.addressable_devices_indices_map(leaf.shape).values()}
        sizes.append(len(shards) * math.prod(read) * leaf.dtype.itemsize)
    return max([*sizes, sum(sizes) // 20])


def _open(
    directory: str | os.PathLike,
    options: ocp.CheckpointManagerOptions | None = None,
    bytes_at_once: int | None = None,
) -> ocp.CheckpointManager:
    state = ocp.PyTreeCheckpointHandler(
        # What training leaves in a mantissa is noise: compressing it saves little, and holds all of it once more.
        use_compression=False,
        # A read as large as this is refused, so a little more.
        restore_concurrent_gb=None if bytes_at_once is None else (1.01 * bytes_at_once + 1) / 1e9,
    )
    try:
        return _Manager(
            Path(directory).absolute(),
            item_handlers={"state": state, "metadata": ocp.JsonCheckpointHandler()},
            options=options or ocp.CheckpointManagerOptions(create=False),
        )
    except (ValueError, OSError) as error:
        raise UserError(f"the checkpoints in {directory} cannot be opened: {_one_line(error)}") from error


def _read(reader: ocp.CheckpointManager, step: int, **items: ocp.args.CheckpointArgs) -> ocp.args.Composite:
    try:
        return reader.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, OSError) as error:
        raise _unreadable(reader, step, _one_line(error)) from error


def _arrays(target: PyTree) -> ocp.args.PyTreeRestore:
    """Read these leaves, and no others."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    elif isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_step(reader: ocp.CheckpointManager, step: int) -> None:
    steps = reader.all_steps()
    if step not in steps:
        raise UserError(f"step {step} is not in {reader.directory}; those that are: {_listed(steps)}")


def _saved_arrays(reader: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What Orbax knows of each array that was saved, by its path."""
    _require_step(reader, step)
    try:
        saved = reader.item_metadata(step).state
    except (ValueError, KeyError, OSError) as error:
        raise _unreadable(reader, step, _one_line(error)) from error
    if saved is None:
        raise _unreadable(reader, step, "it does not say which arrays it holds")
    return _flat(saved.tree)


def _flat(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths."""
    return ocp.tree.to_flat_dict(tree, sep=".")


def _leaves(flat: Mapping[str, Any]) -> dict[str, str]:
    """The shape and type of each leaf."""
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in flat.items()}


def _require_equal(saved: Mapping[str, str], wanted: Mapping[str, str], where: str) -> None:
    for kind, names in (("lacks", wanted.keys() - saved.keys()), ("also holds", saved.keys() - wanted.keys())):
        if names:
            raise UserError(f"{where} is of another model: it {kind} {min(names)}{_and_more(names)}")
    differing = [name for name in sorted(wanted) if saved[name] != wanted[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"{where} is of another model: {name} is saved as {saved[name]}, but {wanted[name]} is asked for"
            f"{_and_more(differing)}"
        )


def _and_more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"


def _unreadable(reader: ocp.CheckpointManager, step: int, reason: str) -> UserError:
    others = {*reader.all_steps()} - {step}
    return UserError(f"checkpoint {step} in {reader.directory} cannot be read ({reason}); others: {_listed(others)}")


def _one_line(error: Exception) -> str:
    """Storage errors run to paragraphs; the first words say what is wrong."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:160] + "…"
