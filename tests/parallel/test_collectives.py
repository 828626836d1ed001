"""Collectives are what the theory says: read off the compiled step of eight devices, kinds and bytes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, ModelConfig, OptimizerConfig
from gptjax.model.accounting import parameter_counts, traffic
from gptjax.model.gpt import GPT
from gptjax.parallel import sharding
from gptjax.parallel.collectives import bytes_by_kind, collectives
from gptjax.parallel.mesh import make_mesh
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import abstract_state
from gptjax.training.step import make_train_step

BATCH, T = 8, 64
GPT2 = {"num_layers": 2, "model_dim": 64, "num_heads": 8, "context_length": T, "vocab_size": 384}
LLAMA = GPT2 | {
    "norm": "rmsnorm",
    "positions": "rope",
    "feed_forward": "swiglu",
    "bias": False,
    "tie_embeddings": False,
    "qk_norm": True,
}
MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 1, "tensor": 8},
    {"data": 1, "context": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
]


def compiled_step(config, axes, options=None) -> str:
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        model, optimizer = GPT(config), make_optimizer(OptimizerConfig())
        loss = language_model_loss(model)
        step = make_train_step(loss, optimizer, dropout_seed=None, accumulates=False)
        layout = jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec("stack", "stack", "batch", "keys"))
        tokens = jax.ShapeDtypeStruct((1, 1, BATCH, T + 1), jnp.int32, sharding=layout)
        arguments = ({"tokens": tokens}, np.ones(1, np.int32), np.ones(1, np.float32), 1)
        return step.lower(abstract_state(model, optimizer), *arguments).compile(options).as_text()


@functools.cache
def float32_step(config, **axes) -> str:
    """A program that several tests read is compiled once."""
    return compiled_step(config, axes)


def partitioned_step(config, axes, folder) -> str:
    """The step's HLO as the partitioner leaves it: later on, XLA's CPU backend makes float32 of bfloat16."""
    compiled_step(config, axes, {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"})
    (text,) = folder.glob("*train_step*after_spmd-partitioning*.txt")
    return text.read_text(encoding="utf-8")


@pytest.fixture
def uncached():
    """Nothing goes into the cache of compiled programs: what comes out of it is not compiled, and leaves no HLO."""
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def by_mesh(*meshes):
    return pytest.mark.parametrize("axes", meshes, ids=lambda axes: "-".join(f"{k}{v}" for k, v in axes.items()))


by_family = pytest.mark.parametrize("switches", [GPT2, LLAMA], ids=["gpt2", "llama"])


@by_mesh(*MESHES)
@by_family
def test_bytes_are_those_of_the_formula(switches, axes):
    """Each kind within 2 % of `traffic`, which is derived by hand, and no other kind."""
    config = ModelConfig(**switches, compute_dtype="float32")
    assert_theory(config, axes, float32_step(config, **axes))


@by_mesh(*MESHES)
@by_family
def test_gradients_are_summed_in_float32(switches, axes, tmp_path, uncached):
    """In bfloat16, too, although parameters are gathered, and activations summed, in that: the bytes are those of
    `traffic`, and without tensor parallelism no sum is in bfloat16."""
    config = ModelConfig(**switches, compute_dtype="bfloat16")
    text = partitioned_step(config, axes, tmp_path)
    assert_theory(config, axes, text)
    sums = re.findall(r"= (\w+)\[\S* all-reduce\(", text)
    assert len(sums) > 20
    assert ("bf16" in sums) == ("tensor" in axes)


def assert_theory(config, axes, text):
    found = bytes_by_kind(text)
    mesh = MeshConfig(**{"fsdp": 1, "tensor": 1} | axes)
    theory = traffic(config, mesh, BATCH)
    expected = {
        "all-gather": theory.parameters + theory.keys_values,
        "all-reduce": theory.gradients + theory.activations,
        "reduce-scatter": theory.keys_values,
    }
    assert set(found) == {kind for kind, size in expected.items() if size}
    assert {kind: found[kind] for kind in found} == {kind: pytest.approx(expected[kind], rel=0.02) for kind in found}


def test_data_parallelism_reduces_each_gradient_once():
    """With copies of the model nothing is sent but every parameter's gradient, the tied table's from both its uses."""
    config = ModelConfig(**GPT2, compute_dtype="float32")
    found = collectives(float32_step(config, data=8))
    assert {c.kind for c in found} == {"all-reduce"}
    counts = parameter_counts(config)
    assert sum(c.bytes for c in found) == pytest.approx(4 * (counts["total"] + counts["embedding"]), rel=0.001)


def test_saved_products_are_not_summed_again():
    """`save_dots` keeps the results of products, and with them the sums over devices, from the backward pass."""
    configs = (ModelConfig(**GPT2, remat=r, compute_dtype="float32") for r in ("none", "save_dots", "full"))
    none, save_dots, full = (bytes_by_kind(float32_step(config, data=1, tensor=8)) for config in configs)
    assert none == save_dots != full


def test_tensor_parallelism_reduces_twice_a_block_and_pass():
    """Attention and feed-forward each send their output forward and their input's gradient back, once."""
    found = collectives(float32_step(ModelConfig(**LLAMA, compute_dtype="float32"), data=1, tensor=8))
    whole = BATCH * T * LLAMA["model_dim"] * 4
    blocks = [c for c in found if "Block" in c.operation and c.bytes >= whole]  # less are norms of heads
    assert sum(c.bytes for c in blocks) // whole == 4 * LLAMA["num_layers"]
    forward = [c for c in blocks if "transpose" not in c.operation]
    assert sum(c.bytes for c in forward) // whole == 2 * LLAMA["num_layers"]


HLO = """
%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[4]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add, metadata={op_name="jit(f)/inner"}
}
%cond.1 (p: (s32[], f32[4])) -> pred[] {
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %g = ((bf16[2,3]{1,0}, f32[2]{0}), (bf16[8,3]{1,0}, f32[8]{0})) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %q = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %s = f32[3]{0} reduce-scatter(%b), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
  %o = f32[9]{0} all-reduce(%c), replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_hlo_is_read():
    """Loops count by their trips, starts by their result, reduce-scatters by what goes in, groups of one not at all."""
    found = collectives(HLO)
    assert [(c.kind, c.bytes, c.times) for c in found] == [
        ("all-reduce", 16, 5),
        ("all-gather", 80, 1),
        ("collective-permute", 20, 1),
        ("reduce-scatter", 48, 1),
    ]
    assert found[0].operation == "jit(f)/inner"
    assert bytes_by_kind(HLO) == {"all-reduce": 80, "all-gather": 80, "collective-permute": 20, "reduce-scatter": 48}
