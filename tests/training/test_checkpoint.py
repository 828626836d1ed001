import math
import resource
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import CheckpointConfig
from gptjax.errors import UserError
from gptjax.training.checkpoint import (
    all_steps,
    open_checkpoints,
    read_metadata,
    restore,
    restore_params,
    save,
    steps_by_age,
    steps_by_loss,
)
from gptjax.training.integrity import check_manifest


class State(NamedTuple):
    step: jax.Array
    params: Any
    optimizer: Any


def make_state(scale: float = 1.0) -> State:
    """Every type that a run holds, with bit patterns that a cast or a decimal detour would change."""
    table = scale * jax.random.normal(jax.random.key(0), (16, 8))
    params = {
        "embed": {"table": table.at[0, :3].set(jnp.array([jnp.nan, -0.0, 1e-45]))},
        "scale": jnp.linspace(0.1, 0.9, 8, dtype=jnp.bfloat16),
    }
    decayed = optax.masked(optax.adamw(1e-3), {"embed": {"table": True}, "scale": False})
    return State(jnp.int32(2**30 + 1), params, optax.chain(optax.clip_by_global_norm(1.0), decayed).init(params))


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def write(directory: Path, losses: dict[int, float | None], newest: int = 100, best: int = 0) -> None:
    with open_checkpoints(directory, CheckpointConfig(keep_newest=newest, keep_best=best)) as manager:
        for step, loss in losses.items():
            save(manager, step, {"x": jnp.float32(step)}, {}, None if loss is None else {"val_loss": loss})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    directory, state = tmp_path_factory.mktemp("run") / "checkpoints", make_state()
    with open_checkpoints(directory, CheckpointConfig()) as manager:
        save(manager, 20, state, {"position": 640, "tokenizer": "größe \n"})
    return directory, state


def test_a_state_comes_back_bit_for_bit_with_its_metadata(saved):
    directory, state = saved
    restored, metadata = restore(directory, 20, abstract(state))
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert metadata == read_metadata(directory, 20) == {"position": 640, "tokenizer": "größe \n"}
    assert (directory / "20").is_dir()


def test_a_state_moves_between_shardings(tmp_path):
    def mesh(*shape: int) -> jax.sharding.Mesh:
        devices = jax.devices()[: math.prod(shape)]
        return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2, devices=devices)

    def sharded(mesh: jax.sharding.Mesh, table: P) -> State:
        def shard(leaf: jax.Array) -> jax.Array:
            return jax.device_put(leaf, NamedSharding(mesh, table if leaf.ndim == 2 else P()))

        return jax.tree.map(shard, make_state())

    eight, two = mesh(2, 4), mesh(1, 2)
    with jax.set_mesh(eight), open_checkpoints(tmp_path, CheckpointConfig()) as manager:
        save(manager, 1, sharded(eight, P("fsdp", "data")), {})
    with jax.set_mesh(two):
        like = sharded(two, P(None, "fsdp"))
        restored, _ = restore(tmp_path, 1, jax.eval_shape(lambda state: state, like))
        assert bits(restored) == bits(make_state())
        for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
            assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
            assert jax.typeof(leaf) == jax.typeof(expected)


def test_donating_the_state_right_after_save_does_not_touch_what_is_written(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: -x, state), donate_argnums=0)
    with open_checkpoints(tmp_path, CheckpointConfig()) as manager:
        state = {"x": jnp.arange(1_000_000.0)}
        save(manager, 1, state, {})
        jax.block_until_ready(overwrite(overwrite(overwrite(state))))
    restored, _ = restore(tmp_path, 1, {"x": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)})
    np.testing.assert_array_equal(restored["x"], np.arange(1_000_000.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)},
            r"scale is saved as bfloat16\[8\], but float32\[8\] is asked",
        ),
        ({"scale": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}, r"scale is saved as bfloat16\[8\], but bfloat16\[4\] is"),
        ({"embed": {}}, r"it also holds params\.embed\.table$"),
        ({"bias": jax.ShapeDtypeStruct((8,), jnp.float32)}, r"it lacks params\.bias$"),
    ],
    ids=["type", "shape", "key too few", "key too many"],
)
def test_a_parameter_that_does_not_fit_is_named(saved, change, message):
    directory, state = saved
    target = abstract(state)
    target = target._replace(params=target.params | change)
    with pytest.raises(UserError, match=message):
        restore(directory, 20, target)
    with pytest.raises(UserError, match=message):
        restore_params(directory, 20, target.params)


def test_an_optimizer_that_does_not_fit_is_refused(saved):
    directory, state = saved
    target = abstract(state)._replace(optimizer=abstract(optax.sgd(1e-3, momentum=0.9).init(state.params)))
    with pytest.raises(UserError, match=r"it lacks optimizer\.0\.trace\.embed\.table \(and 1 more\)$"):
        restore(directory, 20, target)


def test_reading_parameters_leaves_the_optimizer_on_disk(tmp_path):
    noise = jax.random.bits(jax.random.key(0), (2, 2**18), jnp.uint32)  # 2 MiB that do not compress
    state = State(jnp.int32(1), {"w": jnp.ones(64)}, {"mu": noise[0], "nu": noise[1]})
    with open_checkpoints(tmp_path, CheckpointConfig()) as manager:
        save(manager, 1, state, {})

    def bytes_read() -> int:
        (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return metric["values"][0]["value"]

    restore(tmp_path, 1, abstract(state))
    before = bytes_read()
    params = restore_params(tmp_path, 1, abstract(state.params))
    after_params = bytes_read()
    restore(tmp_path, 1, abstract(state))
    assert bits(params) == bits(state.params)
    assert after_params - before < 2**16 < 2**21 < bytes_read() - after_params


@pytest.mark.parametrize(
    ("losses", "newest", "best", "kept"),
    [
        ({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, 1, 1, [1, 4]),  # rising: neither the newest nor the best may go
        ({1: 4.0, 2: 3.0, 3: 2.0}, 1, 1, [3]),
        ({1: None, 2: 1.0, 3: None, 4: None}, 1, 1, [2, 4]),  # without a loss: only while newest
        ({1: None, 2: None, 3: None}, 2, 3, [2, 3]),
        ({1: math.nan, 2: 2.0, 3: 1.0, 4: 3.0}, 1, 1, [3, 4]),
        ({1: 1.0, 2: 2.0, 3: 3.0}, 1, 0, [3]),
        ({3: 1.0, 1: 2.0, 2: 3.0}, 2, 1, [2, 3]),  # the step counts, not the order of writing
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, losses, newest, best, kept):
    write(tmp_path, losses, newest, best)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == kept == all_steps(tmp_path)


def test_retention_goes_on_over_a_restart(tmp_path):
    write(tmp_path, {1: 1.0, 2: 2.0}, newest=1, best=1)
    write(tmp_path, {3: 3.0}, newest=1, best=1)
    assert all_steps(tmp_path) == [1, 3]


def test_steps_by_age_and_by_loss(tmp_path):
    write(tmp_path, {5: 2.0, 10: 1.0, 15: 1.0, 20: math.nan, 25: None})
    assert steps_by_age(tmp_path) == [25, 20, 15, 10, 5]
    assert steps_by_loss(tmp_path) == [10, 15, 5]


def test_a_step_is_saved_once(tmp_path):
    with open_checkpoints(tmp_path, CheckpointConfig()) as manager:
        for value in (1.0, 2.0):
            save(manager, 5, {"x": jnp.float32(value)}, {})
    restored, _ = restore(tmp_path, 5, {"x": jax.ShapeDtypeStruct((), jnp.float32)})
    assert restored["x"] == 1.0


def test_what_is_not_there_is_said(tmp_path):
    assert all_steps(tmp_path / "none") == []
    with pytest.raises(UserError, match=r"there is no checkpoint in .*none"):
        steps_by_age(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    write(tmp_path, {3: None, 20: None})
    with pytest.raises(UserError, match=r"step 7 is not in .*; those that are: 3, 20"):
        restore(tmp_path, 7, {"x": jax.ShapeDtypeStruct((), jnp.float32)})
    with pytest.raises(UserError, match=r"step 7 is not in .*; those that are: 3, 20"):
        read_metadata(tmp_path, 7)
    with pytest.raises(UserError, match=r"has a validation loss; without one: 3, 20"):
        steps_by_loss(tmp_path)


def test_temporary_folders_of_a_killed_run_go_when_writing_and_stay_when_reading(tmp_path):
    write(tmp_path, {1: None})
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    (leftover / "state").mkdir(parents=True)
    (leftover / "state" / "half").write_bytes(b"\0" * 100)
    assert all_steps(tmp_path) == [1]
    assert leftover.exists()
    write(tmp_path, {3: None})
    assert all_steps(tmp_path) == [1, 3]
    assert not leftover.exists()


def test_a_step_that_is_removed_is_gone_before_its_first_file(tmp_path, monkeypatch):
    """Killed while it removes, a run leaves a whole step, under a name that is no step's; the next start removes it."""
    removing = []

    def killed(folder: Path, **_: Any) -> None:
        if folder.exists():
            removing.append((all_steps(tmp_path), [check_manifest(step).status for step in folder.iterdir()]))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        write(tmp_path, {1: None, 2: None}, newest=1)
    assert removing[0] == ([2], ["verified"])
    assert (tmp_path / "removed" / "1").is_dir()
    write(tmp_path, {3: None}, newest=1)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["3"]


def test_a_failed_save_is_raised_by_the_next_and_leaves_the_older_steps(tmp_path):
    state = {"x": jax.random.normal(jax.random.key(0), (2**18,))}
    with open_checkpoints(tmp_path, CheckpointConfig(keep_newest=5)) as manager:
        save(manager, 1, state, {})
        manager.wait_until_finished()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # as a full disk, for this process alone
        try:
            save(manager, 2, state, {})
            with pytest.raises(UserError, match=r"could not be saved in .* \(File too large\); those .* stay: 1$"):
                save(manager, 2, state, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        save(manager, 2, state, {})
    assert all_steps(tmp_path) == [1, 2]
    assert bits(restore(tmp_path, 2, abstract(state))[0]) == bits(state)


@pytest.mark.parametrize("part", ["state", "metadata"])
def test_a_truncated_checkpoint_is_one_clear_line(tmp_path, part):
    write(tmp_path, {1: None, 2: None})
    for path in (tmp_path / "2" / part).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"checkpoint 2 in .* cannot be read \(.*\); others: 1$"):
        restore(tmp_path, 2, {"x": jax.ShapeDtypeStruct((), jnp.float32)})
