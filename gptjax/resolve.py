"""What a configuration leaves open, filled from the devices and the tokenizer; and whether all of it fits."""

import dataclasses
import datetime
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from gptjax.checks import require
from gptjax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from gptjax.errors import UserError
from gptjax.model.accounting import Memory
from gptjax.model.workload import NetworksOf, described, memory_of_pass, networks, sequence_tokens, state_bytes
from gptjax.training.schedule import steps_for

STATE_SHARE = 0.5
"""Of a device's memory that parameters, optimizer state and gradients may take; activations need the rest."""
WIDEST_TENSOR = 8
"""Splitting matrices sends activations twice a block and pass: that pays only within a node, which has 8 devices."""
EVALUATION_SHARE = 0.05
"""FLOPs of an evaluation over those of the training since the last one, where nobody says how much of the held-out text
it reads: that grows with the data, and time does not."""
FEWEST_EVALUATED = 64
"""Sequences that it reads all the same, if there are so many."""


class _Device(Protocol):
    platform: str


class _Tokenizer(Protocol):
    vocab_size: int


def resolve(
    config: Config,
    devices: Sequence[_Device],
    tokenizer: _Tokenizer,
    memory: int | None = None,
    num_rows: int | None = None,
    networks_of: NetworksOf = networks,
) -> Config:
    """Fill every derived field from the devices, the tokenizer and the data, and check that all of it fits.

    Args:
        memory: as `resolve_mesh`.
        num_rows: of the data, in one epoch; None where steps are given.
        networks_of: as `resolve_mesh`.

    Raises:
        UserError: the mesh does not divide the devices, heads or batch, the tokenizer has another vocabulary than the
            model, or a device cannot do what is asked of it.
    """
    model, training = config.model, config.training
    if model.vocab_size is not None and model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; "
            "leave model.vocab_size out to use the tokenizer's"
        )
    model = dataclasses.replace(
        model.filled(),
        vocab_size=model.vocab_size or tokenizer.vocab_size,
        compute_dtype=model.compute_dtype or default_compute_dtype(devices[0].platform),
    )
    if training.steps is None:
        require(num_rows is not None, "training.steps is None, and nothing here has rows of which epochs could be made")
        held = networks_of(dataclasses.replace(config, model=model))
        steps = max(1, math.ceil(steps_for(training, sequence_tokens(held), training.epochs * num_rows)))
        whole = training.steps_per_dispatch if config.stage in ("ppo", "grpo") else 1
        training = dataclasses.replace(training, steps=math.ceil(steps / whole) * whole)
    optimizer = config.optimizer
    if optimizer.decay_steps is None:
        optimizer = dataclasses.replace(optimizer, decay_steps=training.steps)
    training = dataclasses.replace(
        training,
        sequence_length=training.resolved_sequence_length(model),
        micro_batch_size=training.resolved_micro_batch_size,
        batch_ramp_start=training.resolved_batch_ramp_start,
        eval_sequences=evaluation_sequences(training),
    )
    require(config.run_dir is not None, "run_dir is not chosen yet; see gptjax.training.run_dir.next_run_dir")
    config = dataclasses.replace(config, model=model, optimizer=optimizer, training=training)
    mesh, _ = resolve_mesh(config, len(devices), memory, networks_of)
    if model.remat == "offload":
        _require_host_memory(devices[0])
    return with_date(dataclasses.replace(config, mesh=mesh))


def with_date(config: Config) -> Config:
    """The day on which a run begins, where none is given: its rows are the same on whatever day it goes on."""
    today = config.data.chat_date or datetime.date.today().isoformat()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, chat_date=today))


def evaluation_sequences(training: TrainingConfig) -> int:
    """`training.eval_sequences`, or as many as `EVALUATION_SHARE` pays for, in whole micro-batches; 0: all there are.

    A sequence's forward pass is a third of its training. Of a batch that grows the first one counts, so that no
    evaluation costs more. All evaluations of a run, the last one too, read the same.
    """
    if training.eval_sequences is not None:
        return training.eval_sequences
    micro = training.resolved_micro_batch_size
    interval = min(training.eval_every_steps or math.inf, training.steps or math.inf)
    paid_for = int(3 * EVALUATION_SHARE * interval * training.resolved_batch_ramp_start)
    return max(-(-FEWEST_EVALUATED // micro), paid_for // micro) * micro


def default_compute_dtype(platform: str) -> Literal["float32", "bfloat16"]:
    """bfloat16 where the hardware has it: XLA's CPU backend mostly widens it to float32 and back."""
    return "float32" if platform == "cpu" else "bfloat16"


def _require_host_memory(device: Any) -> None:
    if device.platform == "cpu":
        reason = "whose memory is the host's"
    else:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if "pinned_host" in kinds:
            return
        reason = f"which has no pinned_host memory, but {', '.join(kinds)}"
    raise UserError(
        "model.remat offload moves activations from the device to the host, and this is a "
        f"{device.platform}, {reason}; save_attention keeps as much, on the device"
    )


def memory_bytes(device: Any) -> int | None:
    """What a device of this process can hold, or None where it does not say: on a CPU, whose memory all share."""
    return (device.memory_stats() or {}).get("bytes_limit")


def resolve_mesh(
    config: Config, num_devices: int, memory: int | None = None, networks_of: NetworksOf = networks
) -> tuple[MeshConfig, str]:
    """Fill the axes that are left open, and check that the mesh divides devices, batch, heads and widths.

    `fsdp` is the smallest that lets the training state (`state_bytes`: with AdamW 16 bytes a parameter that is trained,
    and 4 of one that is not) take at most half of each device's memory; where the batch or the width admits no such
    one, `tensor` helps out. `data` is what is left over. The vocabulary is checked where it is known already.

    Args:
        memory: bytes that one device can hold; None: unknown, and nothing is split that was not asked for.
        networks_of: the models that the stage holds, with what is known of its data.

    Returns:
        The mesh without open axes, and why it is this one.

    Raises:
        UserError: a product or a size that does not divide, with the nearest that does.
    """
    filled, reason = _fill(config, num_devices, memory, networks_of)
    _check(filled, num_devices, config.model, config.training)
    return filled, reason


def require_fits(config: Config, memory: int | None, networks_of: NetworksOf = networks) -> None:
    """Refuse a micro-batch of which even the least that a step must hold is more than a device's memory.

    An estimate (`activation_bytes`) may be wrong where this passes: XLA has the last word when it compiles.

    Args:
        config: its mesh without open axes; vocabulary and compute type may be open still.
        memory: as `resolve_mesh`.
        networks_of: as `resolve_mesh`.

    Raises:
        UserError: it does not fit; says what would.
    """
    if memory is None:
        return
    mesh, training, models = config.mesh, config.training, networks_of(config)
    micro, shards = training.resolved_micro_batch_size, mesh.data * mesh.fsdp
    split = mesh.fsdp * mesh.context * mesh.tensor
    state = state_bytes(models, config.optimizer) / split
    # Without accumulation the gradient comes while activations go.
    held = state_bytes(models, config.optimizer, gradients=micro < training.batch_size) / split

    def activations(size: int) -> Memory:
        return memory_of_pass(models, mesh, size, training.loss_chunk_tokens)

    needed = held + activations(micro).least
    if needed <= memory:
        return
    sizes = training.batch_size, training.resolved_batch_ramp_start
    smaller = [n for n in range(shards, micro, shards) if all(size % n == 0 for size in sizes)]
    fitting = [n for n in smaller if state + activations(n).likely <= memory]
    advice = (
        f"the largest training.micro_batch_size that fits is {fitting[-1]}"
        if fitting
        else f"not even {shards} would: model.remat full, training.loss_chunk_tokens "
        f"{models[0].rows[0].num_tokens}, a shorter training.sequence_length, or more devices for mesh.fsdp help"
    )
    raise UserError(
        f"a micro-batch of {micro} sequences of {described(models)} needs at least {needed / 1e9:.3g} GB on each "
        f"device, {held / 1e9:.3g} GB of it for parameters and optimizer state and the rest for activations, "
        f"but a device has {memory / 1e9:.3g} GB; {advice}"
    )


def refit_mesh(saved: MeshConfig, requested: MeshConfig, num_devices: int) -> MeshConfig:
    """The mesh with which a run goes on: its old one as far as nothing else is asked for, and open where that no longer
    divides the devices."""
    fsdp, tensor = requested.fsdp or saved.fsdp, requested.tensor or saved.tensor
    mesh = dataclasses.replace(requested, fsdp=fsdp, tensor=tensor)
    as_before = dataclasses.replace(mesh, data=None) == dataclasses.replace(saved, data=None)
    fits = num_devices % (fsdp * mesh.context * tensor) == 0
    return MeshConfig() if as_before and not fits else mesh


def _fill(config: Config, num_devices: int, memory: int | None, networks_of: NetworksOf) -> tuple[MeshConfig, str]:
    mesh, model, training = config.mesh, config.model, config.training
    asked = [name for name in ("data", "fsdp", "tensor") if getattr(mesh, name) is not None]
    if mesh.context > 1:
        asked.append("context")
    whole = state_bytes(networks_of(config), config.optimizer)
    small = memory is None or whole <= STATE_SHARE * memory
    for fsdp, tensor in _candidates(mesh, num_devices, model, training, widest_tensor=1 if small else WIDEST_TENSOR):
        others = fsdp * mesh.context * tensor
        data = mesh.data or max(1, num_devices // others)
        filled = dataclasses.replace(mesh, data=data, fsdp=fsdp, tensor=tensor)
        state = whole // others
        if small or state <= STATE_SHARE * memory:
            break
    size = f"{state / 1e9:.3g} GB of parameters, gradients and optimizer state on each device"
    if len(asked) == 4 or num_devices == 1:
        return filled, size
    if memory is None:
        return filled, f"{size}; what memory a device has is unknown"
    half = f"of its {memory / 1e9:.3g} GB"
    verdict = half if state <= STATE_SHARE * memory else f"{half}, more than half: no mesh of these devices does better"
    return filled, f"{size}, {verdict}"


def _candidates(
    mesh: MeshConfig, num_devices: int, model: ModelConfig, training: TrainingConfig, widest_tensor: int
) -> Iterator[tuple[int, int]]:
    """Sizes of `fsdp` and `tensor` that could be taken, the ones that send least first; at least one."""
    micro = training.resolved_micro_batch_size
    found = False
    for tensor in [mesh.tensor] if mesh.tensor else [n for n in range(1, widest_tensor + 1) if _splits(n, model)]:
        for fsdp in [mesh.fsdp] if mesh.fsdp else range(1, num_devices + 1):
            left = num_devices / (fsdp * mesh.context * tensor)
            fits = left == (mesh.data or int(left)) and model.model_dim % (fsdp * mesh.context) == 0
            if fits and micro % (fsdp * int(left)) == 0:
                found = True
                yield fsdp, tensor
    if not found:  # what is wrong is for the checks to say
        yield mesh.fsdp or 1, mesh.tensor or 1


def _splits(n: int, model: ModelConfig) -> bool:
    return all(size % n == 0 for size in (model.num_heads, model.resolved_num_kv_heads, model.resolved_ffn_dim))


def _check(mesh: MeshConfig, num_devices: int, model: ModelConfig, training: TrainingConfig) -> None:
    axes = {"data": mesh.data, "fsdp": mesh.fsdp, "context": mesh.context, "tensor": mesh.tensor}
    product = math.prod(axes.values())
    there_are = f"there {'are' if num_devices > 1 else 'is'} {num_devices} device{'s' * (num_devices > 1)}"
    require(
        product == num_devices,
        f"mesh {' × '.join(f'{name} {size}' for name, size in axes.items())} = {product}, but {there_are}; "
        f"each axis must divide {num_devices}, and their product be {num_devices}",
    )
    shards = mesh.data * mesh.fsdp
    micro = training.resolved_micro_batch_size
    require(
        micro % shards == 0,
        f"a batch of {micro} sequences does not divide over mesh data {mesh.data} × fsdp {mesh.fsdp} = {shards} "
        f"devices; the nearest training.{'micro_batch_size' if training.micro_batch_size else 'batch_size'} that works "
        f"is {max(1, round(micro / shards)) * shards}",
    )
    length = training.resolved_sequence_length(model)
    require(
        not (model.positions == "learned" and length > model.context_length),
        f"training.sequence_length {length} is more than model.context_length {model.context_length}, and the model "
        f"learns no more positions than that; {model.context_length} works",
    )
    if mesh.context > 1:
        pieces = 2 * mesh.context
        name = "training.sequence_length" if training.sequence_length else "model.context_length"
        nearest = max(1, round(length / pieces)) * pieces
        if training.sequence_length and model.positions == "learned" and pieces < nearest > model.context_length:
            nearest -= pieces
        require(
            length % pieces == 0,
            f"mesh.context {mesh.context} cuts a sequence into {pieces} pieces, two for each device, which do not "
            f"divide {name} {length}; the nearest that works is {nearest}",
        )
    fsdp = "fsdp" if mesh.context == 1 else "fsdp × mesh.context"
    _require_divides(fsdp, mesh.fsdp * mesh.context, "model.model_dim", model.model_dim)
    for name, size in (
        ("num_heads", model.num_heads),
        ("num_kv_heads", model.resolved_num_kv_heads),
        ("ffn_dim", model.resolved_ffn_dim),
    ):
        _require_divides("tensor", mesh.tensor, f"model.{name}", size)
    if model.vocab_size is not None:
        _require_divides("tensor", mesh.tensor, "the padded vocab_size", model.padded_vocab_size)


def _require_divides(axis: str, devices: int, name: str, size: int) -> None:
    if size % devices:
        works = max(n for n in range(1, devices) if size % n == 0 and devices % n == 0)
        raise UserError(f"mesh.{axis} {devices} does not divide {name} {size}; the nearest that does is {works}")
