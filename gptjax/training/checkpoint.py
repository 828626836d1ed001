"""Checkpoints: for each step one folder, with the state's arrays and a JSON of everything else.

What writes takes the manager that `open_checkpoints` gives. What reads takes the folder and leaves it
as it is, so that a run can be sampled while it trains.
"""

import contextlib
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding

from gptjax.config import CheckpointConfig
from gptjax.errors import UserError
from gptjax.parallel import distributed
from gptjax.training.manager import (
    REMOVED,
    NewestAndBest,
    all_steps,
    clear_failure,
    listed,
    one_line,
    open_manager,
    remove_removed,
    remove_unfinished,
    validation_loss,
    write_manifests,
)

PyTree = Any

SAVE_SECONDS = 24 * 3600
"""How long processes wait, behind the training, for the slowest to write and for process 0 to sum up what all wrote."""


@contextlib.contextmanager
def open_checkpoints(directory: str | os.PathLike, config: CheckpointConfig) -> Iterator[ocp.CheckpointManager]:
    """A manager that saves into `directory/STEP/` behind the training, and keeps the newest and the best.

    What a killed run left half written is removed. Leaving the `with` waits for the save under way; so does
    the manager's `wait_until_finished`.

    Raises:
        UserError: the folder cannot be opened; on leaving, as `save`.
    """
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        todelete_subdir=REMOVED,
        preservation_policy=NewestAndBest(config.keep_newest, config.keep_best),
        best_fn=validation_loss,  # without it Orbax writes no metrics
        # Called behind the training, by the first process, when all is written and just before the step gets its
        # name: a step that is there has its checksums.
        async_options=ocp.options.AsyncOptions(
            timeout_secs=SAVE_SECONDS, post_finalization_callback=lambda: write_manifests(directory)
        ),
    )
    remove_removed(directory)
    manager = open_manager(directory, options)
    try:
        yield manager
    except BaseException:
        if distributed.num_processes() == 1:  # of several, those that go on are waited for in vain
            with contextlib.suppress(Exception):  # a save that fails as well says less than what came first
                manager.close()
        raise
    else:
        manager.close()
    finally:
        remove_unfinished(directory)  # once more: after one thread has failed, others go on writing for a while


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
        UserError: the previous save, which was asynchronous, or this one's beginning failed: the disk is full, say.
    """
    manager.wait_until_finished()
    if step in manager.all_steps():
        return
    with clear_failure(manager):
        manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(dict(metadata))),
            metrics=dict(metrics or {}),
            force=True,  # else Orbax passes over a step that is older than the newest
        )


def raise_failed_save(manager: ocp.CheckpointManager) -> None:
    """Raise what stopped the save behind the training, if it is over; costs some microseconds and waits for nothing.

    Orbax's `check_for_errors` finds nothing, as its own thread has asked before.

    Raises:
        UserError: as `save`.
    """
    if not manager.is_saving_in_progress():
        manager.wait_until_finished()
    elif manager.failures and distributed.num_processes() > 1:
        with clear_failure(manager):
            raise manager.failures[0]


def steps_by_age(directory: str | os.PathLike) -> list[int]:
    """The steps, from the newest on.

    Raises:
        UserError: there is no checkpoint.
    """
    steps = all_steps(directory)
    if not steps:
        raise UserError(f"there is no checkpoint in {directory}")
    return steps[::-1]


def steps_by_loss(directory: str | os.PathLike) -> list[int]:
    """The steps that have a validation loss, from the lowest on; of equal ones the first.

    A loss that cannot be read may be any, so its step comes first.

    Raises:
        UserError: there is no checkpoint with a validation loss.
    """
    with open_manager(directory) as reader:
        losses = {step: _saved_loss(reader, step) for step in all_steps(directory)}
    evaluated = [step for step in losses if losses[step] < math.inf]
    if not evaluated:
        raise UserError(f"no checkpoint in {directory} has a validation loss; without one: {listed(losses)}")
    return sorted(evaluated, key=losses.__getitem__)


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
    with open_manager(directory) as reader:
        saved = _saved_arrays(reader, step)
        _require_equal(_leaves(saved), _leaves(_flat(target)), f"checkpoint {step} in {directory}")
    with open_manager(directory, bytes_at_once=_bytes_at_once(saved, _flat(target))) as reader:
        items = _read(reader, step, state=_arrays(target), metadata=ocp.args.JsonRestore())
    return items.state, items.metadata


def restore_params(
    directory: str | os.PathLike, step: int, abstract_params: PyTree, place: Sequence[str] = ("params",)
) -> PyTree:
    """Read the subtree at `place` of a saved state, as `restore` does; the optimizer's arrays stay on disk.

    Raises:
        UserError: as `restore`.
    """
    target = jax.tree.map(_placed, abstract_params)
    for name in reversed(place):
        target = {name: target}
    prefix = ".".join(place) + "."
    with open_manager(directory) as reader:
        saved = {name: leaf for name, leaf in _saved_arrays(reader, step).items() if name.startswith(prefix)}
        _require_equal(_leaves(saved), _leaves(_flat(target)), f"checkpoint {step} in {directory}")
    with open_manager(directory, bytes_at_once=_bytes_at_once(saved, _flat(target))) as reader:
        found = _read(reader, step, state=_arrays(target)).state
    for name in place:
        found = found[name]
    return found


def read_metadata(directory: str | os.PathLike, step: int) -> dict[str, Any]:
    """Read only a step's metadata.

    Raises:
        UserError: the step is not there or cannot be read.
    """
    with open_manager(directory) as reader:
        _require_step(reader, step)
        return _read(reader, step, metadata=ocp.args.JsonRestore()).metadata


def _saved_loss(reader: ocp.CheckpointManager, step: int) -> float:
    try:
        return validation_loss(reader.metrics(step))
    except (ValueError, TypeError, AttributeError, OSError):
        return -math.inf


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


def _read(reader: ocp.CheckpointManager, step: int, **items: ocp.args.CheckpointArgs) -> ocp.args.Composite:
    try:
        return reader.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, OSError) as error:
        raise _unreadable(reader, step, one_line(error)) from error


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
        raise UserError(f"step {step} is not in {reader.directory}; those that are: {listed(steps)}")


def _saved_arrays(reader: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What Orbax knows of each array that was saved, by its path."""
    _require_step(reader, step)
    try:
        saved = reader.item_metadata(step).state
    except (ValueError, KeyError, OSError) as error:
        raise _unreadable(reader, step, one_line(error)) from error
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


def _unreadable(reader: ocp.CheckpointManager, step: int, reason: str) -> UserError:
    others = {*reader.all_steps()} - {step}
    return UserError(f"checkpoint {step} in {reader.directory} cannot be read ({reason}); others: {listed(others)}")
