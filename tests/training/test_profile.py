"""Traces of steps: what a kernel is for is read off the program, and a run says where its time goes."""

import dataclasses
import io
import json
from pathlib import Path

import pytest

from gptjax.config import TrainingConfig
from gptjax.config_files import load_config
from gptjax.errors import UserError
from gptjax.stages.train import train
from gptjax.training import profile
from gptjax.training.metrics import Console, read_metrics

HLO = """
%fused_dot (p: f32[4,4]) -> f32[4,4] {
  ROOT %dot.1 = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}
}

%fused_norm (p: f32[4,4]) -> f32[4] {
  ROOT %reduce.1 = f32[4]{0} reduce(%p, %zero), dimensions={1}, to_apply=%add
}

%fused_add (p: f32[4,4]) -> f32[4,4] {
  ROOT %add.1 = f32[4,4]{1,0} add(%p, %p)
}

ENTRY %main (a: f32[4,4]) -> (f32[4,4], f32[4]) {
  %fusion.1 = f32[4,4]{1,0} fusion(%a), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(s)/jvp(GPT)/Block/attention/q/dot"}
  %fusion.2 = f32[4,4]{1,0} fusion(%a), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(s)/jvp(GPT)/Block/attention/dot"}
  %fusion.3 = f32[4]{0} fusion(%a), kind=kInput, calls=%fused_norm, metadata={op_name="jit(s)/transpose(jvp(GPT))/norm/sum"}
  %fusion.4 = f32[4,4]{1,0} fusion(%a), kind=kLoop, calls=%fused_add, metadata={op_name="jit(s)/jvp(GPT)/Block/add"}
  %fusion.5 = f32[4,4]{1,0} fusion(%a), kind=kLoop, calls=%fused_add, metadata={op_name="jit(s)/while/body/mul"}
  %fmha.1 = (bf16[4,4]{1,0}, u8[0]{0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(s)/jvp(GPT)/x"}
  %cublas-gemm.1 = (bf16[4,4]{1,0}, s8[64]{0}) custom-call(%a), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(s)/jvp(GPT)/up/dot"}
  %copy.1 = f32[4,4]{0,1} copy(%a), metadata={op_name="jit(s)/jvp(GPT)/transpose"}
  %all-reduce-start.1 = f32[4,4]{1,0} all-reduce-start(%a), to_apply=%add, metadata={op_name="jit(s)/mul"}
}
"""  # noqa: E501


def test_what_a_kernel_is_for():
    """Its place decides before its computation: attention's own products are attention, its projections' are not."""
    program = profile._instructions(HLO)
    kinds = {name: profile._kind(name, program[name]) for name in program if not name.endswith(("dot.1", "reduce.1"))}
    assert kinds == {
        "add.1": "elementwise",
        "fusion.1": "matmul",
        "fusion.2": "attention",
        "fusion.3": "reduction",
        "fusion.4": "elementwise",
        "fusion.5": "optimizer",
        "fmha.1": "attention",
        "cublas-gemm.1": "matmul",
        "copy.1": "copy",
        "all-reduce-start.1": "collective",
    }


@pytest.mark.parametrize("text", ["3", "3:", "0:2", "3:3", "5:11", "-1:2", "a:b"])
def test_steps_that_cannot_be_profiled_are_refused(text):
    with pytest.raises(UserError, match=r"profile_steps .* 1 ≤ A < B ≤ training.steps 10, such as 7:10"):
        TrainingConfig(steps=10, profile_steps=text)


def test_a_run_traces_its_window(inside):
    """The trace lies in the run, the report names attention's place in the source, and no speed counts these steps."""
    config = load_config("tiny.py")
    training = dataclasses.replace(
        config.training, steps=8, steps_per_dispatch=4, eval_every_steps=0, profile_steps="3:6", log_every_steps=1
    )
    config = dataclasses.replace(config, training=training, run_dir="profiled")
    output = io.StringIO()
    summary = train(config, console=Console(output))
    text = output.getvalue()
    assert summary["stopped"] == "finished"
    assert "kernels, in 3 steps:" in text
    table = [line for line in text.splitlines() if "ms/step" in line]
    assert len(table) == 10
    assert sum(float(line.split("%")[0]) for line in table) <= 100
    kinds = text.split("by kind: ")[1].splitlines()[0]
    for kind in ("matmul", "attention", "optimizer", "collective"):
        assert kind in kinds, kinds
    (file,) = Path("profiled/profile").rglob("perfetto_trace.json.gz")
    assert str(file) in text
    assert summary["seconds"]["profile"] > 0
    speeds = {record["step"]: record["tokens_per_second"] for record in read_metrics("profiled/metrics.jsonl")[:8]}
    assert speeds[4] == speeds[5], "a speed of traced steps was reported"
    assert json.loads(Path("profiled/config.json").read_text())["training"]["profile_steps"] == "3:6"
