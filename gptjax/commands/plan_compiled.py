"""`plan --compile`: the step as XLA's compiler for the device makes it: memory, kernels, and the time to expect."""

from pathlib import Path
from typing import Any

from gptjax import cli
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.model.accounting import mfu
from gptjax.model.devices import Device
from gptjax.scaling.plan import Plan

LARGEST = 20
"""Places in the source that are listed."""


def compile_plan(config: Config, plan: Plan, device: Device, hlo_file: str | None) -> dict[str, Any]:
    """Compile the step that train.py would run, for the very device where its compiler is installed, else for CPUs.

    Returns:
        For JSON: `compiler` (the device's name, or cpu), `why_cpu`, `memory_gb` of one device, `estimate_gb` (the
        plan's), `fits`, `collective_bytes` by kind, `compile_seconds`; and of a device's own compiler `classes` and
        `largest` (rows of name, kernels, gigabytes, teraflops, milliseconds), `rates`, `predicted_step_ms`,
        `predicted_tokens_per_second`, `predicted_mfu`, `collectives_alone_ms`.

    Raises:
        UserError: the stage has another step; so many devices form no topology; or the compiler refuses the program.
    """
    if config.stage not in ("pretrain", "sft") or config.lora.rank:
        what = "adapters" if config.lora.rank else f"stage {config.stage}"
        raise UserError(f"--compile knows the step that trains all weights on text, not {what}; leave it out")
    from gptjax.parallel import absent, platform

    platform.configure()
    why_cpu = absent.why_not(device)
    if why_cpu is None:
        absent.prepare()
    else:
        platform.pretend_devices(plan.count)

    import jax

    from gptjax.parallel.collectives import bytes_by_kind
    from gptjax.scaling.compiled import compile_step

    devices = None if why_cpu else absent.devices(device, plan.count)
    try:
        compiled = compile_step(plan.model, config.optimizer, config.training, plan.mesh, devices)
    except jax.errors.JaxRuntimeError as error:
        line = " ".join(str(error).split())
        raise UserError(f"the compiler of {device.name} refuses this step: {line[:400]}") from error
    text, memory = compiled.program.as_text(), compiled.memory()
    if hlo_file is not None:
        Path(hlo_file).write_text(text, encoding="utf-8")
    held = memory["total_bytes"]
    found = {
        "compiler": "cpu" if why_cpu else device.name,
        "why_cpu": why_cpu,
        "memory_gb": held / 1e9,
        "estimate_gb": plan.memory.total / 1e9,
        "fits": None if why_cpu or device.memory_bytes is None else held <= device.memory_bytes,
        **memory,
        "collective_bytes": dict(bytes_by_kind(text)),
        "compile_seconds": compiled.seconds,
    }
    return found if why_cpu else found | _predicted(config, plan, device, text)


def _predicted(config: Config, plan: Plan, device: Device, text: str) -> dict[str, Any]:
    from gptjax.scaling import roofline

    rates = roofline.rates_of(device)
    if rates is None:
        return {}
    found = roofline.kernels(text)
    training = config.training
    tokens = training.batch_size * training.resolved_sequence_length(plan.model)
    seconds = roofline.step_seconds(found, rates)
    alone = [kernel for kernel in found if kernel.kind == "collectives" and not kernel.hidden]
    return {
        "classes": [row._asdict() for row in roofline.by_class(found, rates)],
        "largest": [row._asdict() for row in roofline.largest(found, rates, LARGEST)],
        "collectives_alone_ms": 1e3 * sum(kernel.times * roofline.seconds(kernel, rates) for kernel in alone),
        "rates": rates._asdict(),
        "predicted_step_ms": 1e3 * seconds,
        "predicted_tokens_per_second": tokens / seconds,
        "predicted_mfu": mfu(tokens / seconds, plan.flops.total, plan.count, device.flops),
    }


def show_compiled(plan: Plan, device: Device, found: dict[str, Any]) -> None:
    """Print it."""
    held, estimate = found["memory_gb"], found["estimate_gb"]
    compiler = "XLA's CPU backend" if found["why_cpu"] else f"XLA's own compiler for {device.name}"
    fits = {None: "", True: ", which fits", False: ", which does not fit"}[found["fits"]]
    print(
        f"compiled in {found['compile_seconds']:.0f} s: {compiler} plans {held:.4g} GB a device{fits}, "
        f"{found['argument_bytes'] / 1e9:.4g} of it parameters, optimizer and batch; the estimate above is "
        f"{estimate:.4g} ({100 * (estimate / held - 1):+.0f} %)"
    )
    if found["why_cpu"]:
        print(f"that is a stand-in: {found['why_cpu']}")
    if "classes" not in found:
        return
    for title, rows in (("kernels of a step", found["classes"]), ("what takes longest", found["largest"])):
        table = cli.make_table(title, "", "kernels", "GB", "TFLOP", "ms")
        for row in rows:
            table.add_row(
                row["name"],
                f"{row['kernels']:,}",
                f"{row['gigabytes']:.2f}",
                f"{row['teraflops']:.2f}" if row["teraflops"] else "",
                f"{row['milliseconds']:.2f}",
            )
        cli.print_wide(table)
    if found["collective_bytes"]:
        print(f"collectives with nothing beside them: {found['collectives_alone_ms']:.2f} ms of the step")
    rates = found["rates"]
    print(
        f"predicted: {found['predicted_step_ms']:.2f} ms a step, {found['predicted_tokens_per_second']:,.0f} tokens a "
        f"second, MFU {found['predicted_mfu']:.1%}; at {rates['products'] / 1e12:.0f} TFLOP/s of products, "
        f"{rates['attention'] / 1e12:.0f} of attention, {rates['bytes'] / 1e12:.3g} TB/s ({rates['source']}) and "
        f"{1e6 * rates['launch']:.3g} µs between kernels"
    )
