"""What a run will cost and give, before it is paid for: memory, time, price and loss, each with what it rests on.

Nothing is allocated and JAX is not imported: parameters, FLOPs and memory are formulas of `model/accounting.py`, speed
is an assumed share of the data sheet's peak, and loss is a published law's. Only the standard library is imported.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

from gptjax.checks import require
from gptjax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from gptjax.model.accounting import (
    FlopsPerToken,
    Traffic,
    cache_elements,
    hidden_weights,
    logits_bytes,
    parameter_counts,
    traffic,
)
from gptjax.model.devices import Device
from gptjax.model.workload import (
    FULL,
    NetworksOf,
    described,
    flops_per_token,
    memory_of_pass,
    networks,
    sequence_tokens,
    state_bytes,
    weight_bytes,
)
from gptjax.resolve import default_compute_dtype, resolve_mesh
from gptjax.scaling.laws import CHINCHILLA, EPOCH, MUENNIGHOFF, LossLaw, counted_parameters
from gptjax.scaling.study import with_vocabulary
from gptjax.training.schedule import final_progress

Remat = Literal["none", "save_dots", "save_attention", "full"]
"""From what recomputes nothing to what recomputes most."""
RECOMPUTED = {"none": 0.0, "save_dots": 0.0, "save_attention": 1.0, "offload": 1.0, "full": 1.0}
"""Forward passes of the blocks' products that the backward pass repeats."""
USABLE = 0.92
"""Share of a device's memory that a program gets: the rest is the driver's, the collectives' and lost to gaps."""
EFFICIENCY = 0.45
"""Model FLOPs over the peak that a step of sound size is assumed to reach: what good code gets on H100s in bfloat16."""
LAWS: tuple[LossLaw, ...] = (EPOCH, CHINCHILLA, MUENNIGHOFF)
"""The first is the one that is planned with; the others show how far published laws are apart."""


class MemoryPlan(NamedTuple):
    """Bytes of one device with one way to save activations."""

    remat: str
    parameters: int
    optimizer: int
    gradients: int
    """All of them: clipping needs their norm before the optimizer takes the first."""
    copies: int
    """Of the blocks' matrices in the compute type, fused as products take them."""
    activations: int
    """As the program is likely to ask for; without logits."""
    logits: int
    fits: bool | None
    """None: it is unknown what a device can hold."""
    largest_micro_batch: int | None
    """Sequences over all devices; 0: not even one a device."""

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.copies + self.activations + self.logits


class Forecast(NamedTuple):
    """A loss by a published law."""

    law: str
    loss: float
    warning: str | None
    """Where the law is extrapolated: its range."""
    interval: tuple[float, float] | None = None
    """The middle 90 % of the law's resamples; None: of published laws nobody has them."""


class Plan(NamedTuple):
    """See the module's first line. Of what nobody knows there is None."""

    device: Device
    count: int
    model: ModelConfig
    """With vocabulary and type."""
    training: TrainingConfig
    parameters: dict[str, int]
    flops: FlopsPerToken
    recomputed_flops: float
    """Of one token, by remat: beside those of `flops`, and not in MFU."""
    mesh: MeshConfig
    mesh_reason: str
    traffic: Traffic
    memory: MemoryPlan
    """With the run's own remat and micro-batch."""
    alternatives: tuple[MemoryPlan, ...]
    """With every remat and the run's micro-batch."""
    suggestion: tuple[str, int] | None
    """The remat that recomputes least and the largest micro-batch that fits with it; None: nothing fits."""
    cache_bytes: int
    """Keys and values of one sequence as long as the context, in the compute type."""
    sequence: str
    """What one sequence of a batch is: its rows and their tokens."""
    tokens: int
    """That the run trains on."""
    efficiency: float
    tokens_per_second: float | None
    step_seconds: float | None
    days: float | None
    device_hours: float | None
    price_usd: float | None
    affordable_tokens: int | None
    """In the hours, or for the money, that there are: whichever is less."""
    optimal_tokens: float
    """That make this model compute-optimal, by the first law."""
    optimal_size: tuple[float, float] | None
    """(N, D) that are best for what the hours or the money buy, by the first law."""
    forecasts: tuple[Forecast, ...]
    affordable_forecasts: tuple[Forecast, ...]


def make_plan(
    config: Config,
    device: Device,
    count: int = 1,
    *,
    hours: float | None = None,
    budget_usd: float | None = None,
    price_usd_per_hour: float | None = None,
    efficiency: float = EFFICIENCY,
    laws: tuple[LossLaw, ...] = LAWS,
    resamples: tuple[LossLaw, ...] = (),
    quadratic: bool = False,
    networks_of: NetworksOf = networks,
) -> Plan:
    """Plan a run on `count` devices.

    Args:
        hours: how long the devices are there.
        budget_usd: what may be spent, at `price_usd_per_hour` for each device.
        efficiency: MFU to assume.
        laws: the first plans; all forecast.
        resamples: of the first law, where it was fitted and not published: its intervals are theirs.
        quadratic: whether attention keeps the weights of all pairs of tokens, as the kernel xla does.
        networks_of: the models that the stage holds, with what is known of its data; rows are otherwise taken for as
            long as they may be.

    Raises:
        UserError: the mesh does not divide the devices, batch or width; the vocabulary is unknown.
    """
    platform = "cpu" if device.flops is None and device.memory_bytes is None else "accelerator"
    dtype = config.model.compute_dtype or default_compute_dtype(platform)
    model = dataclasses.replace(with_vocabulary(config), compute_dtype=dtype)
    training, config = config.training, dataclasses.replace(config, model=model)
    memory = None if device.memory_bytes is None else int(USABLE * device.memory_bytes)
    mesh, reason = resolve_mesh(config, count, memory, networks_of)
    config = dataclasses.replace(config, mesh=mesh)
    micro = training.resolved_micro_batch_size
    held = networks_of(config)
    flops = flops_per_token(held)
    own = _memory(config, networks_of, memory, quadratic)
    alternatives = tuple(
        _memory(
            dataclasses.replace(config, model=dataclasses.replace(model, remat=remat)), networks_of, memory, quadratic
        )
        for remat in get_args(Remat)
    )
    suggestion = next(((m.remat, m.largest_micro_batch) for m in alternatives if m.largest_micro_batch), None)
    rate = None if device.flops is None else count * device.flops * efficiency / flops.total
    # Recomputed products are no model FLOPs, and take their time all the same: 6 of 8 are left, with remat full.
    forward = flops_per_token(tuple(one._replace(lora=FULL) for one in held)).total / 3  # adapters save nothing in it
    again = RECOMPUTED[model.remat] * forward
    if rate is not None:
        rate *= flops.total / (flops.total + again)
    batch_tokens = training.batch_size * sequence_tokens(held)
    require(
        training.steps is not None, "the steps follow from the data's rows: give --training.steps to plan without it"
    )
    tokens = final_progress(training, sequence_tokens(held)).tokens
    seconds = None if rate is None else tokens / rate
    device_hours = None if seconds is None else seconds / 3600 * count
    N = float(counted_parameters(model, laws[0].counts))
    have = _hours(hours, budget_usd, price_usd_per_hour, count)
    affordable = None if have is None or rate is None else int(rate * 3600 * have)
    bought = None if affordable is None else affordable * 6 * N
    return Plan(
        device=device,
        count=count,
        model=model,
        training=training,
        parameters=parameter_counts(model),
        flops=flops,
        recomputed_flops=again,
        mesh=mesh,
        mesh_reason=reason,
        traffic=traffic(model, mesh, micro * held[0].rows[0].count, held[0].rows[0].num_tokens),
        memory=own,
        alternatives=alternatives,
        suggestion=suggestion,
        cache_bytes=cache_elements(model, 1, model.context_length) * (2 if dtype == "bfloat16" else 4),
        sequence=described(held),
        tokens=tokens,
        efficiency=efficiency,
        tokens_per_second=rate,
        step_seconds=None if rate is None else batch_tokens / rate,
        days=None if seconds is None else seconds / 86400,
        device_hours=device_hours,
        price_usd=None if device_hours is None or price_usd_per_hour is None else device_hours * price_usd_per_hour,
        affordable_tokens=affordable,
        optimal_tokens=laws[0].optimal_tokens(N),
        optimal_size=None if bought is None else laws[0].compute_optimal(bought),
        forecasts=_forecasts(model, tokens, laws, resamples),
        affordable_forecasts=() if affordable is None else _forecasts(model, affordable, laws, resamples),
    )


def _hours(hours: float | None, budget: float | None, price: float | None, count: int) -> float | None:
    paid = None if budget is None or price is None else budget / (price * count)
    known = [value for value in (hours, paid) if value is not None]
    return min(known) if known else None


def _forecasts(
    model: ModelConfig, tokens: float, laws: tuple[LossLaw, ...], resamples: tuple[LossLaw, ...]
) -> tuple[Forecast, ...]:
    found = []
    for number, law in enumerate(laws):
        N = counted_parameters(model, law.counts)
        drawn = sorted(draw.loss(N, tokens) for draw in resamples) if number == 0 else []
        bounds = (drawn[int(0.05 * len(drawn))], drawn[math.ceil(0.95 * len(drawn)) - 1]) if drawn else None
        found.append(Forecast(law.name, law.loss(N, tokens), law.outside(N, tokens), bounds))
    return tuple(found)


def _memory(config: Config, networks_of: NetworksOf, memory: int | None, quadratic: bool) -> MemoryPlan:
    held, mesh, training, optimizer = networks_of(config), config.mesh, config.training, config.optimizer
    model, micro = held[0].model, training.resolved_micro_batch_size
    shards, split = mesh.data * mesh.fsdp, mesh.fsdp * mesh.context * mesh.tensor
    weights, all_state = weight_bytes(held) // split, state_bytes(held, optimizer) // split
    kept = state_bytes(held, optimizer, gradients=False) // split
    width = 2 if model.compute_dtype == "bfloat16" else 4
    copies = width * sum(hidden_weights(one.model) for one in held if one.rows) // split

    def parts(size: int) -> tuple[int, int]:
        logits = sum(
            logits_bytes(model, mesh, size * rows.count, training.loss_chunk_tokens, num_tokens=rows.num_tokens)
            for rows in held[0].rows
            if not held[0].values
        )
        likely = memory_of_pass(held, mesh, size, training.loss_chunk_tokens, quadratic=quadratic).likely
        return likely - logits, logits

    def fits(size: int) -> bool:
        return memory is not None and all_state + copies + sum(parts(size)) <= memory

    largest = None
    if memory is not None:
        sizes = [n for n in _divisors(training.batch_size) if n % shards == 0]
        largest = max((n for n in sizes if fits(n)), default=0)
    whether = None if memory is None else fits(micro)
    return MemoryPlan(
        *(model.remat, weights, kept - weights, all_state - kept, copies, *parts(micro)), whether, largest
    )


def _divisors(n: int) -> list[int]:
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})
