"""`python -m gptjax plan CONFIG`: what a run will need, take, cost and reach."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax import cli
from gptjax.commands.plan_compiled import compile_plan, show_compiled
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model.devices import Device, named
from gptjax.plain_files import read_json
from gptjax.scaling.laws import LossLaw, short
from gptjax.scaling.plan import EFFICIENCY, LAWS, USABLE, Forecast, MemoryPlan, Plan, make_plan

if TYPE_CHECKING:
    from gptjax.stages.dry_run import FirstRows

DEFAULT = Path(__file__).parents[2] / "configs" / "quickstart.py"
SHOWN_CHARACTERS = 1500
"""Of each row."""


@dataclass(frozen=True)
class PlanArguments(Config):
    """What `python -m gptjax plan` was asked for, beside the run."""

    device: str = "h100"
    """Accelerator, by its short name: h100, h200, a100-80, b200, tpu-v5e and others."""
    count: int = 1
    """Accelerators."""
    peak_tflops: float | None = None
    """Of a device that is in no table: dense bfloat16 TFLOP/s."""
    memory_gb: float | None = None
    """The same: its memory, in GB."""
    bandwidth: float | None = None
    """The same: GB/s of its memory."""
    hours: float | None = None
    """How long the devices are there. None: as long as the run takes."""
    budget_usd: float | None = None
    """What may be spent. None: nobody asks."""
    price_usd_per_hour: float | None = None
    """Of one device."""
    law: str | None = None
    """JSON file of `python -m gptjax fit --json`, whose law forecasts. None: published laws."""
    mfu: float = EFFICIENCY
    """Share of the peak that a step is assumed to reach."""
    compile: bool = False
    """Compile the step for the device, which need not be here: memory, kernels, and the time to expect."""
    hlo: str | None = None
    """File for the compiled program's text (optimized HLO), with --compile."""
    json: str | None = None
    """File for everything as one JSON object; - is standard output. None: tables."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("count", "peak_tflops", "memory_gb", "bandwidth", "hours", "budget_usd", "price_usd_per_hour"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}, but must be positive")
        if not 0 < self.mfu <= 1:
            raise UserError(f"mfu is {self.mfu}, but must be a fraction of the peak, such as {EFFICIENCY}")
        if self.budget_usd is not None and self.price_usd_per_hour is None:
            raise UserError("budget-usd needs price-usd-per-hour, of one device")


def main(arguments: Sequence[str]) -> int:
    """Plan a run before it is paid for: memory, speed, days, price, tokens and the loss to expect."""
    import tyro

    config, target, rest = cli.starting_point(arguments, DEFAULT)
    parsed = tyro.cli(
        PlanArguments,
        default=PlanArguments(**cli.fields_of(config)),
        args=rest,
        prog="python -m gptjax plan [CONFIG.py | RUN | --depth N]",
        description=f"{main.__doc__} Defaults are those of {target}.",
    )
    cli.check_output("--json", parsed.json)
    if parsed.hlo is not None and not parsed.compile:
        raise UserError(f"--hlo {parsed.hlo} is for the compiled program: add --compile")
    cli.check_output("--hlo", parsed.hlo)
    options = {name: value for name, value in cli.fields_of(parsed).items() if name not in cli.fields_of(config)}
    config = Config(**{name: value for name, value in cli.fields_of(parsed).items() if name not in options})
    described = (parsed.peak_tflops, parsed.memory_gb, parsed.bandwidth)
    device = named(parsed.device) if described == (None,) * 3 else _described(*described)
    laws, resamples = (LAWS, ()) if parsed.law is None else _fitted(parsed.law)
    plan = make_plan(
        config,
        device,
        parsed.count,
        hours=parsed.hours,
        budget_usd=parsed.budget_usd,
        price_usd_per_hour=parsed.price_usd_per_hour,
        efficiency=parsed.mfu,
        laws=laws,
        resamples=resamples,
        quadratic=config.model.attention_kernel == "xla",
    )
    compiled = compile_plan(config, plan, device, parsed.hlo) if parsed.compile else None
    cli.write_json(parsed.json, _as_json(plan) | (compiled or {}) | {"compiled": compiled})
    if parsed.json != "-":
        if target.name.startswith("depth") and not target.exists():
            from gptjax.scaling.depth import explain

            print("\n".join(explain(config)))
        show(plan)
        if compiled is not None:
            show_compiled(plan, device, compiled)
    return 0


def _described(peak_tflops: float | None, memory_gb: float | None, bandwidth: float | None) -> Device:
    if peak_tflops is None or memory_gb is None or bandwidth is None:
        raise UserError("--peak-tflops, --memory-gb and --bandwidth (in GB/s) describe a device together")
    return Device("described", (), peak_tflops * 1e12, bandwidth * 1e9, memory_gb * 1e9)


def _fitted(path: str) -> tuple[tuple[LossLaw, ...], tuple[LossLaw, ...]]:
    """The law of a fit, and those of its resamples."""
    try:
        card = read_json(Path(path))
        known = {"name": "your fit", "source": path, "counts": card["counts"]}
        ranges = {name: tuple(card[name]) for name in ("parameters_range", "tokens_range")}
        coefficients = [card[name] for name in ("E", "A", "B", "alpha", "beta")]
        if None in coefficients:
            raise UserError(f"{path} has no term of parameters, or none of tokens; a plan needs a fit with both")
        law = LossLaw(*coefficients, **known, **ranges)
        return (law,), tuple(LossLaw(*row, **known, **ranges) for row in card["resamples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no JSON of `python -m gptjax fit --json`: {error}") from error


def show(plan: Plan) -> None:
    """Print it as tables."""
    counts = plan.parameters
    parts = ", ".join(f"{name.replace('_', ' ')} {short(count)}" for name, count in counts.items() if name != "total")
    print(f"parameters: {short(counts['total'])} ({counts['total']:,}): {parts}")
    flops = plan.flops
    print(
        f"FLOPs a token: {flops.total:.4g} ({flops.matmuls:.3g} products with weights, {flops.attention:.3g} "
        f"attention); {flops.total_causal:.4g} without the masked half; remat {plan.model.remat} computes "
        f"{plan.recomputed_flops:.3g} more"
    )
    axes = " × ".join(f"{name} {size}" for name in ("data", "fsdp", "context", "tensor")
                      if (size := getattr(plan.mesh, name)) > 1)  # fmt: skip
    print(f"mesh: {axes or 'one device'} ({plan.mesh_reason})")
    if sum(plan.traffic):
        print(f"collectives: {sum(plan.traffic) / 1e9:.3g} GB a device and micro-batch")
    _show_memory(plan)
    _show_costs(plan)
    _show_losses(plan)


def _show_memory(plan: Plan) -> None:
    device, micro = plan.device, plan.training.resolved_micro_batch_size
    holds = "unknown memory" if device.memory_bytes is None else f"{device.memory_bytes / 1e9:.4g} GB"
    rows = f"micro-batch of {micro} × {plan.sequence}"
    title = f"GB on each of {plan.count} {device.name} ({holds}), {rows}, {plan.model.compute_dtype}"
    table = cli.make_table(
        title, "remat", "parameters", "optimizer", "gradients", "copies", "activations", "logits", "together", "fits",
        "largest micro-batch",
    )  # fmt: skip
    for row in dict.fromkeys((plan.memory, *plan.alternatives)):
        table.add_row(*_memory_row(row, plan.memory))
    cli.print_wide(table)
    print(f"a cache of keys and values takes {plan.cache_bytes / 1e9:.3g} GB for each sequence of "
          f"{plan.model.context_length:,} tokens")  # fmt: skip
    if device.memory_bytes is not None:
        if plan.suggestion is None:
            print("nothing fits: more devices for mesh.fsdp or mesh.tensor, or training.loss_chunk_tokens, help")
        else:
            remat, largest = plan.suggestion
            print(
                f"suggested: model.remat {remat}, training.micro_batch_size {min(largest, plan.training.batch_size)} "
                f"(what fits in {USABLE:.0%} of the memory and recomputes least)"
            )


def _memory_row(row: MemoryPlan, own: MemoryPlan) -> tuple[str, ...]:
    parts = (row.parameters, row.optimizer, row.gradients, row.copies, row.activations, row.logits, row.total)
    fits = "unknown" if row.fits is None else "yes" if row.fits else "no"
    largest = "unknown" if row.largest_micro_batch is None else str(row.largest_micro_batch or "none")
    return (f"{row.remat}{' (the run)' if row is own else ''}", *(f"{part / 1e9:.3g}" for part in parts), fits, largest)


def _show_costs(plan: Plan) -> None:
    if plan.tokens_per_second is None:
        print(f"time: unknown, as the peak of {plan.device.name} is; --peak-tflops says it to `python -m gptjax plan`")
    else:
        print(
            f"time, an estimate at an assumed MFU of {plan.efficiency:.0%} less what is recomputed: "
            f"{plan.tokens_per_second:,.0f} tokens a second, {plan.step_seconds:.3g} s a step, "
            f"{plan.days:.3g} days for {short(plan.tokens)} tokens, {plan.device_hours:,.3g} device-hours"
            + ("" if plan.price_usd is None else f", {plan.price_usd:,.0f} USD")
        )
        measured = measured_mfu(plan.device)
        print(
            f"measured on it: {'; '.join(measured)}" if measured else f"measured on {plan.device.name}: nothing yet "
            "(benchmarks/results/)"
        )  # fmt: skip
    ratio = plan.tokens / plan.optimal_tokens
    print(f"compute-optimal for this size: {short(plan.optimal_tokens)} tokens ({plan.forecasts[0].law}); the run has "
          f"{ratio:.3g} times as many")  # fmt: skip
    if plan.affordable_tokens is not None:
        N, D = plan.optimal_size
        print(
            f"what there is buys {short(plan.affordable_tokens)} tokens of this model; with the same FLOPs "
            f"{short(N)} parameters on {short(D)} tokens would be best"
        )


def _show_losses(plan: Plan) -> None:
    rows = [("the run", plan.tokens, plan.forecasts)]
    if plan.affordable_tokens is not None:
        rows.append(("what there is", plan.affordable_tokens, plan.affordable_forecasts))
    laws = [forecast.law for forecast in plan.forecasts]
    table = cli.make_table("loss to expect, nats a token of the law's own text", "", "tokens", *laws)
    for name, tokens, forecasts in rows:
        table.add_row(name, short(tokens), *map(_forecast, forecasts))
    cli.print_wide(table)
    if plan.forecasts[0].interval is None:
        print("without intervals, as published laws have none; --law takes your own: python -m gptjax fit --json FILE")
    for warning in dict.fromkeys(f.warning for f in (*plan.forecasts, *plan.affordable_forecasts) if f.warning):
        print(f"warning: {warning}")


def _forecast(forecast: Forecast) -> str:
    bounds = forecast.interval
    return f"{forecast.loss:.3f}" + ("" if bounds is None else f" ({bounds[0]:.3f} to {bounds[1]:.3f})")


def measured_mfu(device: Device) -> list[str]:
    """What `benchmarks/results/` of a checkout has of this device: the best MFU of each shape that was trained."""
    folder, best = Path(__file__).parents[2] / "benchmarks" / "results", {}
    for path in sorted(folder.glob("*.json")):
        rows = read_json(path)
        for row in rows if isinstance(rows, list) else [rows]:
            if not isinstance(row, dict) or row.get("device") not in device.kinds:
                continue
            if isinstance(row.get("mfu"), float) and "step_ms" in row and row.get("arm", "ours").startswith("ours"):
                shape = f"{Path(row['config']).stem}, batch {row['batch_size']}, context {row['context_length']:,}"
                best[shape] = max(best.get(shape, 0.0), row["mfu"])
    return [f"MFU {mfu:.1%} ({shape})" for shape, mfu in best.items()]


def _as_json(plan: Plan) -> dict[str, Any]:
    from gptjax.config_files import to_dict

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {name: plain(part) for name, part in value._asdict().items()}
        if hasattr(value, "__dataclass_fields__"):
            return to_dict(value)
        return [plain(part) for part in value] if isinstance(value, tuple | list) else value

    card = plain(plan)
    card["flops"] |= {"total": plan.flops.total, "total_causal": plan.flops.total_causal}
    for row, memory in zip((card["memory"], *card["alternatives"]), (plan.memory, *plan.alternatives), strict=True):
        row["total"] = memory.total
    return card


def dry_run(config: Config) -> int:
    """Print the plan of a run on this machine's devices and the first rows that it would train on."""
    import dataclasses

    import jax

    from gptjax.model.devices import of_kind
    from gptjax.model.kernels import choose, this_machine, training_calls
    from gptjax.resolve import memory_bytes, resolve
    from gptjax.stages import start
    from gptjax.stages.dry_run import first_rows
    from gptjax.stages.messages import of_length

    rows = first_rows(config, log=print)
    devices = jax.devices()
    config = dataclasses.replace(rows.config, run_dir=config.run_dir or "runs")
    networks_of = start.networks_of(config, rows.data.rows)
    resolved = resolve(config, devices, rows.data.tokenizer, num_rows=rows.data.num_rows, networks_of=networks_of)
    known = of_kind(devices[0].device_kind) or Device(devices[0].device_kind, (), None, None, None)
    memory = memory_bytes(devices[0])
    device = known if memory is None else known._replace(memory_bytes=memory / USABLE)
    documents = config.separates_documents
    calls = training_calls(resolved.model, resolved.sequence_length, documents=documents, context=resolved.mesh.context)
    chosen = {choose(call, this_machine(), resolved.model.attention_kernel) for call in calls.values()}
    show(make_plan(resolved, device, len(devices), quadratic="xla" in chosen, networks_of=networks_of))
    print(*of_length(resolved), sep="\n")
    show_rows(rows)
    print("dry run: nothing was trained, and no run was begun")
    return 0


def show_rows(rows: "FirstRows") -> None:
    """Print rows of tokens as text, with what is not learned dim."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for number, (tokens_T, mask_T) in enumerate(zip(rows.tokens_BT, rows.loss_mask_BT, strict=True)):
        learned = int(mask_T.sum())
        print(f"row {number}: {len(tokens_T) - 1} tokens in, {learned} learned; what is not is dim")
        text, start = Text(), 0
        for end in range(1, len(tokens_T) + 1):
            if end == len(tokens_T) or mask_T[end] != mask_T[start]:
                piece = rows.data.tokenizer.decode(tokens_T[start:end].tolist(), skip_special_tokens=False)
                text.append(piece, style="" if mask_T[start] else "dim")
                start = end
        shown = text[:SHOWN_CHARACTERS]
        console.print(shown)
        if len(text) > SHOWN_CHARACTERS:
            print(f"… {len(text) - SHOWN_CHARACTERS} characters more")
