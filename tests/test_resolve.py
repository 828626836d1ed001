"""What is filled from the devices and the tokenizer, and what is refused because it does not fit them."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest

from gptjax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from gptjax.config_files import to_dict
from gptjax.errors import UserError
from gptjax.model.accounting import parameter_counts
from gptjax.model.workload import Rows, memory_of_pass, networks, sequence_tokens, state_bytes
from gptjax.presets import gpt3
from gptjax.resolve import evaluation_sequences, refit_mesh, require_fits, resolve, resolve_mesh
from gptjax.training.schedule import final_progress
from gptjax.tuning_config import LoraConfig

CPUS = [SimpleNamespace(platform="cpu")] * 8
TOKENIZER = SimpleNamespace(vocab_size=300)
ONE = MeshConfig(data=1, fsdp=1, tensor=1)
SMALL = {"model_dim": 32, "num_heads": 4, "vocab_size": 300}


def of(model, batch_size, mesh=None, *, optimizer=None, **training):
    """A configuration to judge."""
    training = TrainingConfig(batch_size=batch_size, **training)
    optimizer = optimizer or OptimizerConfig()
    return Config(model=model, mesh=mesh or MeshConfig(), optimizer=optimizer, training=training)


@pytest.mark.parametrize(
    ("mesh", "model", "batch", "words"),
    [
        (MeshConfig(data=3), {}, 8, ["data 3", "8 devices"]),
        (MeshConfig(fsdp=3), {}, 8, ["fsdp 3", "8 devices"]),
        (MeshConfig(data=8, context=2), {}, 8, ["data 8", "context 2", "= 16", "8 devices"]),
        (MeshConfig(), {}, 12, ["12 sequences", "8", "training.batch_size", "nearest"]),
        (MeshConfig(fsdp=8), {"model_dim": 36}, 8, ["mesh.fsdp 8", "model_dim 36", "nearest that does is 4"]),
        (MeshConfig(fsdp=2, context=4), {"model_dim": 36}, 8, ["mesh.fsdp × mesh.context 8", "model_dim 36", "is 4"]),
        (MeshConfig(context=8), {"context_length": 100}, 8, ["context 8", "16 pieces", "context_length 100", "is 96"]),
        (MeshConfig(context=8), {}, {"sequence_length": 100}, ["16 pieces", "training.sequence_length 100", "is 96"]),
        (MeshConfig(context=8), {"context_length": 110}, {"sequence_length": 110}, ["sequence_length 110", "is 96"]),
        (MeshConfig(), {"context_length": 64}, {"sequence_length": 80}, ["sequence_length 80", "context_length 64"]),
        (MeshConfig(tensor=8), {}, 8, ["mesh.tensor 8", "num_heads 4", "4"]),
        (MeshConfig(tensor=4), {"num_kv_heads": 2}, 8, ["num_kv_heads 2", "2"]),
        (MeshConfig(tensor=4), {"ffn_dim": 6}, 8, ["ffn_dim 6", "that does is 2"]),
    ],
)
def test_refuses_a_mesh_that_does_not_divide(mesh, model, batch, words):
    """Which dimension, which axis, and what would divide."""
    training = TrainingConfig(**(batch | {"batch_size": 8} if isinstance(batch, dict) else {"batch_size": batch}))
    with pytest.raises(UserError) as error:
        resolve_mesh(Config(mesh=mesh, model=ModelConfig(**SMALL | model), training=training), 8)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (8, 1, 1, 1)),
        ({"fsdp": 2}, (4, 2, 1, 1)),
        ({"fsdp": 2, "tensor": 4}, (1, 2, 1, 4)),
        ({"context": 4}, (2, 1, 4, 1)),
        ({"data": 2}, (2, 4, 1, 1)),  # what is not asked for must make up the devices
    ],
)
def test_open_axes_make_up_the_devices(asked, expected):
    """Where the memory of a device is unknown, as on a CPU, nothing is split that was not asked for."""
    mesh, reason = resolve_mesh(of(ModelConfig(**SMALL), 8, MeshConfig(**asked)), 8)
    assert (mesh.data, mesh.fsdp, mesh.context, mesh.tensor) == expected
    assert "unknown" in reason


@pytest.mark.parametrize(
    ("size", "devices", "memory", "batch", "expected"),
    [
        ("125M", 8, 80e9, 256, (8, 1, 1, 1)),  # 2 GB: copies
        ("1.3B", 8, 80e9, 512, (8, 1, 1, 1)),  # 21 GB of 40
        ("2.7B", 8, 80e9, 512, (4, 2, 1, 1)),  # 42 GB do not fit 40
        ("6.7B", 8, 80e9, 512, (2, 4, 1, 1)),
        ("175B", 512, 80e9, 512, (4, 128, 1, 1)),
        ("175B", 512, 80e9, 64, (4, 16, 1, 8)),  # a batch of 64 leaves no other way than to split matrices
    ],
)
def test_the_least_is_split_that_fits_half_of_the_memory(size, devices, memory, batch, expected):
    """16 bytes a parameter may take half: `fsdp` grows until they do, then `tensor`."""
    config = gpt3(size)
    model = ModelConfig(**{**vars(config.model), "vocab_size": 50257})
    mesh, reason = resolve_mesh(of(model, batch), devices, int(memory))
    assert (mesh.data, mesh.fsdp, mesh.context, mesh.tensor) == expected
    state = 16 * parameter_counts(model)["total"]
    assert state / (mesh.fsdp * mesh.tensor) <= memory / 2
    if mesh.fsdp > 1 and mesh.tensor == 1:
        assert state / (mesh.fsdp / 2) > memory / 2
    assert "of its 80 GB" in reason


def test_muon_keeps_less():
    """A model that AdamW's moments make just too large for half of a device is not split with Muon, and one that is
    refused for them is let through."""
    model, muon = gpt2(num_layers=48, model_dim=1600, num_heads=25), OptimizerConfig(kind="muon")
    for optimizer, fsdp in ((OptimizerConfig(), 2), (muon, 1)):
        mesh, _ = resolve_mesh(of(model, 8, optimizer=optimizer), 2, 45 * 10**9)
        assert mesh.fsdp == fsdp
    model = dataclasses.replace(model, remat="full")
    with pytest.raises(UserError, match=r"18\.7 GB of it"):
        require_fits(of(model, 1, ONE), 18 * 10**9)
    require_fits(of(model, 1, ONE, optimizer=muon), 18 * 10**9)


def test_says_when_no_mesh_fits():
    model = ModelConfig(**{**vars(gpt3("175B").model), "vocab_size": 50257})
    _, reason = resolve_mesh(of(model, 8), 2, 80 * 10**9)
    assert "more than half" in reason


def test_a_run_takes_another_mesh_on_other_devices():
    """What a run was trained on stands where the devices allow it and the user says nothing else."""
    saved = MeshConfig(data=2, fsdp=4, tensor=1)
    again = MeshConfig(fsdp=4, tensor=1)  # as the command line reads it from a run
    assert refit_mesh(saved, again, 8) == again
    assert refit_mesh(saved, again, 4) == again
    assert refit_mesh(saved, again, 2) == MeshConfig()
    assert refit_mesh(saved, MeshConfig(), 8) == again
    assert refit_mesh(saved, MeshConfig(fsdp=8, tensor=1), 2) == MeshConfig(fsdp=8, tensor=1)  # and is refused


def test_resolve_leaves_nothing_open_and_changes_nothing_twice():
    """A saved configuration means the same on any machine: no field is None, and resolving again is no change."""
    config = resolve(Config(run_dir="runs/a"), CPUS, TOKENIZER)

    def leaves(values):
        for value in values.values():
            yield from leaves(value) if isinstance(value, dict) else [value]

    assert None not in list(leaves(to_dict(config)))
    assert config.model.vocab_size == 300
    assert config.model.compute_dtype == "float32"
    assert config.mesh.data == 8
    assert config.optimizer.decay_steps == config.training.steps
    assert resolve(config, CPUS, TOKENIZER) == config
    assert resolve(Config(run_dir="a"), [SimpleNamespace(platform="gpu")], TOKENIZER).model.compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1184),  # 3 · 5 % of 250 · 32 is 1200, in whole micro-batches of 32
        ({"batch_size": 1}, 64),
        ({"eval_every_steps": 1, "batch_size": 96, "micro_batch_size": 48}, 96),  # 64 in micro-batches
        ({"eval_every_steps": 0, "steps": 10_000}, 48_000),  # one evaluation, at the end
        ({"steps": 100}, 480),  # the same, though intervals would be longer
        ({"batch_size": 64, "micro_batch_size": 8, "batch_ramp_start": 8, "batch_ramp_tokens": 10**6}, 296),
        ({"eval_sequences": 0}, 0),
        ({"eval_sequences": 7}, 7),
    ],
)
def test_an_evaluation_reads_what_training_pays_for(fields, expected):
    """A twentieth of the FLOPs since the last one, of which a forward pass is a third, but for a few sequences."""
    training = TrainingConfig(**fields)
    assert evaluation_sequences(training) == expected
    config = resolve(Config(training=training, run_dir="a"), CPUS[:1], TOKENIZER)
    assert config.training.eval_sequences == expected


def gpt2(**changes):
    return ModelConfig(**{"vocab_size": 50257, "compute_dtype": "bfloat16"} | changes)


def test_refuses_a_batch_that_cannot_fit():
    """Before anything compiles: with the estimate, what a device has, and the largest micro-batch that divides the
    batch and fits. GPT-2 small with 512 sequences of 1024 tokens would hold 53 GB of logits alone."""
    with pytest.raises(UserError) as error:
        require_fits(of(gpt2(), 512, ONE), 80 * 10**9)
    text = str(error.value)
    assert "512 sequences" in text
    assert "a device has 80 GB" in text
    works = int(text.rsplit(" ", 1)[1])
    assert works == 128
    require_fits(of(gpt2(), 512, ONE, micro_batch_size=works), 80 * 10**9)


@pytest.mark.parametrize(
    ("changes", "training"),
    [
        ({"remat": "full"}, {"loss_chunk_tokens": 8192}),  # 12 block inputs of 0.8 GB
        ({}, {"micro_batch_size": 16}),
        ({}, {"sequence_length": 128}),
        ({"vocab_size": None, "remat": "full"}, {}),  # of an unknown vocabulary there is no bound
    ],
)
def test_what_takes_less_memory_is_let_through(changes, training):
    require_fits(of(gpt2(**changes), 512, ONE, **training), 80 * 10**9)


def test_what_no_micro_batch_mends():
    """A model whose state alone is too large, and a device whose memory nobody knows."""
    model = gpt2(num_layers=48, model_dim=1600, num_heads=25)
    with pytest.raises(UserError, match=r"not even 1 would: model\.remat full"):
        require_fits(of(model, 8, ONE), 8 * 10**9)
    require_fits(of(model, 8, ONE), None)


def test_offload_needs_memory_of_the_host():
    """A CPU has no other, and a device may lack what can be copied from; JAX would silently do nothing on the one."""

    def gpu(*kinds):
        memories = [SimpleNamespace(kind=kind) for kind in kinds]
        return [SimpleNamespace(platform="gpu", addressable_memories=lambda: memories)]

    config = Config(model=ModelConfig(remat="offload"), run_dir="a")
    assert resolve(config, gpu("device", "pinned_host"), TOKENIZER).model.remat == "offload"
    for devices, word in ((CPUS, "a cpu"), (gpu("device"), "pinned_host")):
        with pytest.raises(UserError, match=f"offload.*{word}.*save_attention"):
            resolve(config, devices, TOKENIZER)


def test_resolve_refuses_another_vocabulary():
    with pytest.raises(UserError, match=r"299.*300"):
        resolve(Config(model=ModelConfig(vocab_size=299), run_dir="a"), CPUS, TOKENIZER)


def stage_of(stage, model, batch_size=8, **sections):
    """A stage to judge, on one device, that computes a row at once and keeps as little of it as it can."""
    training = {"micro_batch_size": 1, "loss_chunk_tokens": 512}
    return dataclasses.replace(of(model, batch_size, ONE, **training), stage=stage, **sections)


def test_adapters_fit_where_training_does_not():
    """LoRA of 8.0e9 parameters keeps 32 GB and no moments of them: a device of 80 GB holds it, not full training."""
    shape = {"num_layers": 32, "model_dim": 4096, "num_heads": 32, "num_kv_heads": 8, "ffn_dim": 14336}
    model = gpt2(**shape, vocab_size=128256, feed_forward="swiglu", tie_embeddings=False, bias=False, remat="full")
    adapted = stage_of("sft", model, lora=LoraConfig(rank=8))
    require_fits(adapted, 80 * 10**9)
    alone = dataclasses.replace(adapted, training=TrainingConfig(batch_size=8), mesh=MeshConfig())
    assert resolve_mesh(alone, 8, 80 * 10**9)[0].fsdp == 1
    with pytest.raises(UserError, match=r"\d+ GB of it for parameters and optimizer state"):
        require_fits(stage_of("sft", model), 80 * 10**9)


def test_all_models_of_a_stage_are_counted():
    """PPO holds a critic, an average, a reference and a judge beside its policy, and a reward model learns from as many
    rows as a prompt has answers."""
    model = gpt2(num_layers=32, model_dim=2560, num_heads=32, remat="full")
    one, critic = 4 * parameter_counts(model)["total"], dataclasses.replace(model, value_head=True)
    require_fits(stage_of("sft", model), 50 * 10**9)
    with pytest.raises(UserError, match="state"):
        require_fits(stage_of("ppo", model), 80 * 10**9)
    held = state_bytes(networks(stage_of("ppo", model), judge=critic), OptimizerConfig(), gradients=False)
    assert held == pytest.approx((3 + 3 + 1 + 1 + 1) * one, rel=1e-3)
    reward, nine = stage_of("reward", gpt2()), networks(stage_of("reward", gpt2()), Rows(9, 1024))
    least = [memory_of_pass(models, ONE, 4).least for models in (networks(reward, Rows(1, 1024)), nine)]
    assert least[1] == pytest.approx(9 * least[0])
    assert sequence_tokens(nine) == 9 * 1024


def test_epochs_count_the_rows_that_a_growing_batch_sees():
    """An epoch is one whatever the batch grows from, and however many tokens a sequence has."""
    ramp = {"micro_batch_size": 4, "batch_ramp_start": 4, "batch_ramp_tokens": 1_000_000}
    training = TrainingConfig(steps=None, epochs=1, batch_size=64, **ramp)
    model, rows = ModelConfig(**SMALL | {"context_length": 128}), Rows(2, 32)
    for stage, tokens in (("pretrain", 128), ("dpo", 64)):
        config = Config(stage=stage, model=model, training=training, run_dir="x", mesh=ONE)
        known = functools.partial(networks, rows=rows if stage == "dpo" else None)
        steps = resolve(config, CPUS[:1], TOKENIZER, num_rows=10_000, networks_of=known).training.steps
        seen = [final_progress(dataclasses.replace(training, steps=n), tokens).sequences for n in (steps - 1, steps)]
        assert seen[0] < 10_000 <= seen[1]
