"""Kernels read off a compiled program: their FLOPs are those of the model, their bytes those of the arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from gptjax.model.accounting import training_flops_per_token
from gptjax.model.devices import DEVICES, named
from gptjax.parallel import hlo
from gptjax.scaling.compiled import compile_step
from gptjax.scaling.roofline import Kernel, Rates, by_class, kernels, largest, rates_of, seconds, step_seconds

RATES = Rates(products=1e12, attention=5e11, bytes=1e11, link=1e10, launch=0.0, source="made")
SHAPE = ModelConfig(
    num_layers=3, model_dim=64, num_heads=4, context_length=64, vocab_size=512, compute_dtype="float32", bias=False
)


def compiled(function, *shapes) -> str:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def flops(text: str) -> float:
    return sum(kernel.times * kernel.flops for kernel in kernels(text))


def test_products_are_counted_as_theory_says():
    assert flops(compiled(lambda x, y: x @ y, (32, 64), (64, 16))) == 2 * 32 * 64 * 16
    batched = compiled(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), (3, 8, 16), (3, 24, 16))
    assert flops(batched) == 2 * 3 * 8 * 16 * 24
    assert flops(compiled(lambda x: x + 1, (32, 64))) == 0


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x, w):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ w), None), x, None, length=7)[0]

    assert flops(compiled(loop, (32, 64), (64, 64))) == 7 * 2 * 32 * 64 * 64


def test_a_pass_moves_what_it_reads_and_writes():
    (kernel,) = kernels(compiled(lambda x, y: jnp.tanh(x) * y + 1, (256, 128), (256, 128)))
    assert (kernel.times, kernel.bytes, kernel.flops) == (1, 3 * 4 * 256 * 128, 0)


def test_a_slice_of_a_large_array_is_all_that_is_read():
    text = compiled(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i[0].astype(jnp.int32), 2) * 2, (512, 128), (1,))
    assert sum(kernel.bytes for kernel in kernels(text)) < 4 * 512 * 128


@pytest.mark.parametrize("scanned", [False, True])
def test_a_step_multiplies_what_the_account_says(scanned):
    """All products of a training step, forward and backward, within what attention's blocks and the embedding are."""
    config = dataclasses.replace(SHAPE, scan_layers=scanned)
    training = TrainingConfig(batch_size=8, micro_batch_size=8)
    step = compile_step(config, OptimizerConfig(), training, MeshConfig(data=1), jax.devices()[:1])
    expected = 8 * 64 * training_flops_per_token(config).total
    assert flops(step.program.as_text()) == pytest.approx(expected, rel=0.05)
    assert step.memory()["total_bytes"] > step.memory()["argument_bytes"] > 12 * 100_000


GPU = """HloModule m, is_scheduled=true

%fused (p0: bf16[8,128], p1: bf16[128,64]) -> bf16[8,64] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  %p1 = bf16[128,64]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,64]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], bf16[8,128], bf16[128,64])) -> (s32[], bf16[8,128], bf16[128,64]) {
  %t = (s32[], bf16[8,128]{1,0}, bf16[128,64]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%t), index=1
  %w = bf16[128,64]{1,0} get-tuple-element(%t), index=2
  %gather = (bf16[16,64]{1,0}, bf16[128,64]{1,0}) all-gather-start(%w), replica_groups={{0,1}}, dimensions={0}
  %product = bf16[8,64]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused, metadata={op_name="jit(step)/jvp(GPT)/Block/up/dot_general"}
  %gathered = bf16[128,64]{1,0} all-gather-done(%gather)
  %sum = f32[64]{0} all-reduce(%product), replica_groups={{0,1}}, to_apply=%add
  ROOT %out = (s32[], bf16[8,128]{1,0}, bf16[128,64]{1,0}) tuple(%x, %w)
}

ENTRY %main (a: bf16[8,128], b: bf16[128,64]) -> bf16[8,64] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[128,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %attention = (bf16[2,4,8,64]{3,1,2,0}, f32[2,4,8]{2,1,0}, u8[0]{0}) custom-call(%a, %a, %a), custom_call_target="__cudnn$fmhaSoftmaxBackward", metadata={op_name="jit(step)/attention"}, backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "8", "16"]}, "mask_type": "CAUSAL"}}
  %loop = (s32[], bf16[8,128]{1,0}, bf16[128,64]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %read = bf16[128,64]{1,0} fusion(%b), kind=kLoop, calls=%copied, metadata={op_name="jit(step)/add"}
}
"""  # noqa: E501


def test_what_accelerators_write():
    """Fused attention, asynchronous collectives, loops, and memory on the chip, which is no traffic."""
    found = kernels(GPU)
    assert [(k.kind, k.times) for k in found] == [
        ("attention", 1), ("collectives", 5), ("products", 5), ("collectives", 5), ("optimizer", 1),
    ]  # fmt: skip
    attention, gather, product, reduce, read = found
    assert attention.flops == 10 * 2 * 4 * 8 * 16 * 64 * 0.5
    assert (gather.hidden, reduce.hidden) == (True, False)
    assert gather.bytes == 128 * 64 * 2
    assert (product.flops, product.bytes) == (2 * 8 * 128 * 64, 2 * (8 * 128 + 128 * 64 + 8 * 64))
    assert read.bytes == 128 * 64 * 2, "what lies on the chip is not read from memory"
    alone = step_seconds(found, RATES)
    assert alone == pytest.approx(sum(k.times * seconds(k, RATES) for k in found) - 5 * seconds(gather, RATES))
    rows = by_class(found, RATES)
    assert [row.name for row in rows] == ["products", "attention", "optimizer", "collectives"]
    assert sum(row.kernels for row in rows) == 17
    assert [row.name for row in largest(found, RATES, 2)] == [
        "collectives: all-gather-start",
        "products: jvp(GPT)/Block/up/dot_general",
    ]


def test_a_kernel_takes_the_longer_of_its_two():
    moves, multiplies = Kernel("passes", "", 1, 1e9, 0.0), Kernel("products", "", 1, 1e3, 1e12)
    assert seconds(moves, RATES) == 1e9 / 1e11
    assert seconds(multiplies, RATES) == 1.0
    assert seconds(multiplies._replace(kind="attention"), RATES) == pytest.approx(2.0 + 1e3 / 1e11)
    assert seconds(moves, RATES._replace(launch=1.0)) == pytest.approx(1.01)


def test_every_device_with_a_data_sheet_has_rates():
    for device in DEVICES:
        rates = rates_of(device)
        assert (rates is None) == (device.bytes_per_second is None)
        assert rates is None or (0.5 * device.flops < rates.products < device.flops and rates.source)
    assert "measured" in rates_of(named("h100")).source
    assert "data sheet" in rates_of(named("b200")).source


LOOP = """HloModule m

%cond (t: (s32[], f32[4])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(6)
  %number = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %below = pred[]{:T(512)} compare(%number, %bound), direction=LT
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %y = f32[4,2]{1,0} get-tuple-element(%t), index=2
  %z = f32[8,2]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%a), condition=%cond, body=%body
}
"""


def test_a_loop_of_a_tpu_says_its_trips_in_its_condition():
    assert flops(LOOP) == 6 * 2 * 8 * 4 * 2


def test_types_are_read_with_their_layouts():
    found = hlo.arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[4]{0}, s4[8]{0}, f32[])")
    assert [array.bytes for array in found] == [12, 4, 4, 4]
    assert [array.memory_space for array in found] == [1, 0, 0, 0]
    np.testing.assert_equal([array.shape for array in found], [(2, 3), (4,), (8,), ()])
