"""Steps compiled for accelerators that are not here, by their own compilers, where these are installed."""

import json
import subprocess
import sys

import pytest

from gptjax.commands.plan import main
from gptjax.errors import UserError
from gptjax.model.devices import DEVICES, named
from gptjax.parallel import absent

SMALL = (
    "--model.num-layers 2 --model.model-dim 256 --model.num-heads 4 --model.context-length 512 --model.vocab-size 4096 "
    "--model.no-bias --model.compute-dtype bfloat16 --training.batch-size 16 --training.micro-batch-size 16"
).split()


def plan(*arguments: str) -> dict:
    """A process of its own: the compilers read the environment once."""
    command = [sys.executable, "-m", "gptjax", "plan", *arguments, "--compile", "--json", "-", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_compiler_that_is_missing_is_named_and_a_stand_in_says_so():
    assert absent.why_not(named("tpu-v4")) == (
        "XLA's own compiler can be told of "
        f"{', '.join([*absent.CARDS, *absent.TPUS])}, not of tpu-v4"
    )  # fmt: skip
    found = plan("--device", "tpu-v4")
    assert (found["compiler"], found["fits"]) == ("cpu", None)
    assert found["why_cpu"].endswith("not of tpu-v4")
    assert found["memory_gb"] > 0


def test_what_cannot_be_compiled_for_is_refused():
    with pytest.raises(UserError, match=r"--hlo step\.hlo is for the compiled program: add --compile"):
        main(["--hlo", "step.hlo"])
    with pytest.raises(UserError, match="--compile knows the step that trains all weights on text, not stage grpo"):
        main(["--stage", "grpo", "--compile", "--rl.reward", "exact"])


def test_chips_are_arranged_as_evenly_as_they_can_be():
    assert [absent._torus(count, 2) for count in (1, 4, 8, 16, 256)] == [[1, 1], [2, 2], [2, 4], [4, 4], [16, 16]]
    assert [absent._torus(count, 3) for count in (4, 8, 16, 64)] == [[2, 2, 1], [2, 2, 2], [4, 2, 2], [4, 4, 4]]
    with pytest.raises(UserError, match="no power of two, as TPU slices are; 4 works"):
        absent._torus(6, 2)


def test_every_card_is_a_device_with_what_the_compiler_asks():
    devices = {device.name: device for device in DEVICES}
    for name in absent.CARDS:
        assert devices[name].capability
        assert devices[name].bytes_per_second
        assert f'device_description_str: "{devices[name].kinds[0]}"' in absent._target(devices[name])


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(absent.why_not(named(name)) is not None, reason=f"no compiler for {name}")


@installed("h200")
def test_a_step_for_an_h200():
    """Attention is fused, nothing holds float32 logits but a chunk's reductions, and every product is counted."""
    found = plan("--device", "h200")
    rows = {row["name"]: row for row in found["classes"]}
    assert (found["compiler"], found["fits"]) == ("h200", True)
    assert rows["attention"]["kernels"] == 2 * 2
    tokens = 16 * 512
    assert rows["products"]["teraflops"] == pytest.approx(found["flops"]["matmuls"] * tokens / 1e12, rel=0.05)
    assert rows["passes"]["gigabytes"] < 3
    assert 0 < found["predicted_step_ms"] < 20
    assert 0 < found["predicted_mfu"] < 1


@installed("h200")
def test_eight_of_them_send_what_theory_says():
    found = plan("--device", "h200", "--count", "8", "--mesh.data", "1", "--mesh.fsdp", "8", "--model.scan-layers")
    assert set(found["collective_bytes"]) >= {"all-gather", "reduce-scatter"}
    assert 0 < found["collectives_alone_ms"] < found["predicted_step_ms"]


@installed("tpu-v6e")
def test_a_step_for_four_tpus():
    found = plan("--device", "tpu-v6e", "--count", "4", "--model.scan-layers")
    rows = {row["name"]: row for row in found["classes"]}
    assert found["compiler"] == "tpu-v6e"
    assert rows["products"]["teraflops"] == pytest.approx(found["flops"]["total"] * 4 * 512 / 1e12, rel=0.1)
