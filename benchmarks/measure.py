"""What the speed benchmarks share: a configuration from the command line, the machine, and a table with its JSON.

It needs no more than JAX, Flax, Optax and NumPy, so that it runs on images that have nothing else.
"""

import argparse
import ast
import dataclasses
import json
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from gptjax.config import Config, ModelConfig
from gptjax.config_files import load_config, replace_fields
from gptjax.errors import UserError
from gptjax.model.accounting import mfu, peak_flops, training_flops_per_token
from gptjax.resolve import memory_bytes, resolve

ROOT = Path(__file__).parent.parent
SHAKESPEARE_CHARACTERS = 65
"""What the data of configurations with characters has, and nanoGPT's vocabulary there."""


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that all have; `--section.field value` overrides the configuration."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("config", type=Path, help="a configuration file; --section.field value overrides it")
    made.add_argument("--vocab-size", type=int, help="default: the configuration's")
    made.add_argument("--json", help="file for the results, or - for standard output")
    made.add_argument("--profile", type=Path, help="folder for a jax.profiler trace of one measurement")
    return made


def read(made: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Parsed options, and the configuration with its overrides, resolved for this machine's devices."""
    options, config, _ = parse(made, arguments)
    return options, resolved(config, options.vocab_size)


def parse(made: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config, list[str]]:
    """Parsed options, the configuration with its overrides, and their words; no device is asked."""
    left, overrides, written = [], {}, []
    words = iter(arguments)
    for word in words:  # before argparse, which would take an override's value for the configuration
        if re.match(r"--[a-z]+\.[a-z]", word):
            value = next(words, "")
            overrides[word[2:].replace("-", "_")] = _value(value)
            written += [word, value]
        else:
            left.append(word)
    options = made.parse_args(left)
    config = load_config(options.config)
    try:
        config = replace_fields(config, overrides)
    except KeyError as error:
        raise UserError(f"no section {error} in the configuration") from error
    return options, config, written


def resolved(config: Config, vocab_size: int | None) -> Config:
    """As a run would resolve it, with a made vocabulary of the size that its tokenizer asks for."""

    @dataclasses.dataclass
    class MadeTokenizer:
        vocab_size: int

    size = made_vocab_size(config, vocab_size)
    memory = memory_bytes(jax.local_devices()[0])
    return resolve(dataclasses.replace(config, run_dir="none"), jax.devices(), MadeTokenizer(size), memory)


def made_vocab_size(config: Config, asked: int | None) -> int:
    """The size asked for, or the configuration's, or what its tokenizer would find."""
    found = {"char": SHAKESPEARE_CHARACTERS, "byte": 256}.get(config.tokenizer.kind, config.tokenizer.vocab_size)
    return asked or config.model.vocab_size or found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    device = jax.devices()[0]
    return host() | {"device": device.device_kind, "device_count": jax.device_count(), "jax": jax.__version__}


def host() -> dict[str, Any]:
    """The processor, by its maker's name; no device is asked."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"processor": next(names, platform.processor())}


def peak_memory_bytes(program: Any) -> int | None:
    """The most memory that a device has used so far; where it does not count, what the program was planned with."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    plan = program.memory_analysis()
    if plan is None:
        return None
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return int(total - plan.alias_size_in_bytes)


def is_out_of_memory(error: Exception | str) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def speed(
    model: ModelConfig, shape: tuple[int, int], seconds: Sequence[float], device_kind: str, num_devices: int
) -> dict[str, float | None]:
    """What follows from the seconds of a step of (B, T) tokens, one figure for each block; `model` has its type and
    vocabulary."""
    tokens, step, flops = shape[0] * shape[1], spread(seconds), training_flops_per_token(model, shape[1])
    peak, rate = peak_flops(device_kind, model.compute_dtype), tokens / step["median"]
    return {
        "tokens_per_second": rate,
        "tokens_per_second_min": tokens / step["max"],
        "tokens_per_second_max": tokens / step["min"],
        "mfu": mfu(rate, flops.total, num_devices, peak),
        "mfu_causal": mfu(rate, flops.total_causal, num_devices, peak),
        "step_ms": 1000 * step["median"],
        "step_ms_min": 1000 * step["min"],
        "step_ms_max": 1000 * step["max"],
    }


def show(rows: Sequence[dict[str, Any]], columns: dict[str, str], destination: str | None) -> None:
    """Print the rows under their columns, each a title and a format, and write them as JSON.

    Standard output has either the table or the JSON.
    """
    if destination != "-":
        cells = [[*columns], *([_cell(row.get(name), form) for name, form in columns.items()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if destination == "-":
        print(_json(rows))
    write(rows, destination)


def write(rows: Sequence[dict[str, Any]], destination: str | None) -> None:
    """Write the rows measured so far, where a file is asked for: a killed benchmark loses none."""
    if destination and destination != "-":
        Path(destination).write_text(_json(rows) + "\n", encoding="utf-8")


def _json(rows: Sequence[dict[str, Any]]) -> str:
    """One object, or one a line between brackets: what changes from run to run reads well in a diff."""
    lines = [json.dumps(row) for row in rows]
    return lines[0] if len(lines) == 1 else "[\n" + ",\n".join(lines) + "\n]"


def _cell(value: Any, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def run(main: Any) -> None:
    """Run a benchmark; what its user can mend is one line and exit status 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
