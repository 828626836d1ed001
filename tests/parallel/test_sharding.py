"""The sharding table and the mesh: collisions, the absence of a mesh, and where a batch's rows go."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig
from gptjax.errors import UserError
from gptjax.parallel import sharding
from gptjax.parallel.mesh import AXES, make_mesh, one_device_mesh

RANDOM = np.random.default_rng(0)


def test_spec_reads_the_table(mesh):
    assert sharding.spec("batch", "sequence", "heads", "head_dim") == P(("data", "fsdp"), "context", "tensor", None)
    assert sharding.spec("embed", "ffn") == P(("fsdp", "context"), "tensor")
    with sharding.whole_sequences():
        assert sharding.spec("batch", "sequence") == P(("data", "fsdp"), None)


@pytest.mark.parametrize(
    "axes", [("heads", "vocab"), ("batch", "embed"), ("ffn", "keys", "ffn"), ("sequence", "embed")]
)
def test_spec_refuses_a_mesh_axis_used_twice(axes):
    """Two dimensions cannot be split over the same devices; it is refused without a mesh, too."""
    with pytest.raises(ValueError, match="twice"):
        sharding.spec(*axes)


def test_table_names_only_axes_of_the_mesh():
    entries = [entry for entry in sharding.TABLE.values() if entry]
    assert {name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)} <= set(AXES)


def test_without_a_mesh_nothing_is_laid_out():
    x = jax.numpy.ones((4, 4))
    assert not sharding.has_mesh()
    assert sharding.spec("embed", "ffn") is None
    assert sharding.reshard(x, "embed", "ffn") is x
    np.testing.assert_array_equal(sharding.put_batch(np.eye(4, dtype=np.int32)), np.eye(4))


def test_gather_makes_a_parameter_whole_along_fsdp_only(mesh):
    stored = sharding.reshard(jax.numpy.arange(32.0).reshape(4, 8), "embed", "ffn")
    used = sharding.gather(stored, "embed", "ffn")
    assert jax.typeof(stored).sharding.spec == P(("fsdp", "context"), "tensor")
    assert jax.typeof(used).sharding.spec == P(None, "tensor")
    np.testing.assert_array_equal(used, stored)


def test_put_batch_splits_rows_and_keeps_order(mesh):
    """Rows go to the batch shards in order, whole, and tensor devices hold copies."""
    tokens_KABT = np.arange(3 * 2 * 8 * 5, dtype=np.int32).reshape(3, 2, 8, 5)
    batch = sharding.put_batch(tokens_KABT)
    assert jax.typeof(batch).sharding.spec == P(None, None, ("data", "fsdp"), None)
    np.testing.assert_array_equal(batch, tokens_KABT)
    for shard in batch.addressable_shards:
        data, fsdp, _, _ = np.argwhere(mesh.devices == shard.device)[0]
        first = 2 * (2 * data + fsdp)
        np.testing.assert_array_equal(shard.data, tokens_KABT[:, :, first : first + 2])


@pytest.mark.parametrize(
    "axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}]
)
@pytest.mark.parametrize("names", [("stack", "embed", "ffn"), ("stack", "heads", "embed")])
def test_layers_are_shared_out_whole(axes, names):
    """Three layers, and ten: each device gets as many whole matrices as any other or nothing but zeros, and the results
    come back in order, laid out as the stack was, though they depend on a whole matrix."""
    seen = []

    def accumulate(x_LDF):
        seen.append(x_LDF.shape)
        return x_LDF.cumsum(axis=1).cumsum(axis=2)

    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1} | axes))):
        for num_layers, share in ((3, 1), (10, 2)):
            stack = RANDOM.normal(size=(num_layers, 8, 16)).astype(np.float32)
            stored = jax.device_put(stack, sharding.spec(*names))
            found = jax.jit(lambda x: sharding.map_layers(accumulate, x))(stored)
            assert found.sharding.is_equivalent_to(stored.sharding, 3)
            np.testing.assert_allclose(found, stack.cumsum(1).cumsum(2), rtol=1e-4, atol=1e-4)
            assert seen[-1] == (share, 8, 16)


def test_mesh_has_all_axes_and_all_devices():
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "context": 1, "tensor": 2}
    assert set(mesh.devices.flat) == set(jax.devices())
    assert dict(one_device_mesh().shape) == dict.fromkeys(AXES, 1)
    with pytest.raises(UserError, match=r"data 2 × fsdp 2 × context 1 × tensor 1 = 4 devices, but there are 8"):
        make_mesh(MeshConfig(data=2, fsdp=2))
