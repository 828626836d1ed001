"""What a compiled program's kernels move and multiply, and how long that takes a chip at given rates.

A kernel takes as long as the longer of its bytes over the memory's bandwidth and its FLOPs over the rate of products
(Williams et al. 2009), and what launching it takes. Kernels run one after another; a collective is hidden by what runs
between its start and its end. Nothing is executed: all is read off the optimized HLO, in which XLA has decided what is
one kernel.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from gptjax.model.devices import Device
from gptjax.parallel import hlo
from gptjax.parallel.collectives import KINDS, result_bytes
from gptjax.parallel.hlo import Instruction, Program

Class = Literal["products", "attention", "passes", "optimizer", "slices", "collectives"]
CLASSES: tuple[Class, ...] = ("products", "attention", "passes", "optimizer", "slices", "collectives")
"""Products of matrices; fused attention; the model's passes over memory; those of the optimizer and of the guard;
slices and copies of arrays that others run beside; what devices send each other."""

NO_KERNEL = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "partition-id", "iota"}
SLICING = ("dynamic-slice", "dynamic-update-slice", "slice")
FUSED_ATTENTION = re.compile(r"fmha|flash|splash|dot_product_attention")


class Kernel(NamedTuple):
    """What runs as one on the device."""

    kind: Class
    source: str
    """Where in the program it comes from, as JAX named it."""
    times: int
    """How often it runs in one execution."""
    bytes: float
    """Read and written in the device's memory, each time; of a collective, what arrives at a device."""
    flops: float
    """Of products, each time."""
    hidden: bool = False
    """Of a collective, whether something runs beside it."""


class Rates(NamedTuple):
    """What a device does in a second."""

    products: float
    """FLOPs of large products in bfloat16."""
    attention: float
    """FLOPs of fused attention, of which the causal half alone is counted."""
    bytes: float
    """Read and written in its memory."""
    link: float
    """Bytes that arrive from other devices."""
    launch: float
    """Seconds that pass between two kernels."""
    source: str
    """Where these come from, for people."""


MEASURED = {"h100": (713e12, 2.88e12)}
"""FLOPs of a product of 8192 x 8192 x 8192 and bytes of a copy, per second (docs/performance.md, "The first GPU")."""
REACHED = 0.72, 0.86
"""Of an H100's data sheet, what it reaches of the two: taken for devices that nobody has measured."""
ATTENTION = 0.46
"""Of the peak of products, what fused attention with heads of 64 reaches; fitted to an H100's steps at two contexts."""
LAUNCH_SECONDS = 2e-6
"""Assumed. GPT-2's step has some 630 kernels on a GPU: a microsecond more or less is 1 % of it."""


def rates_of(device: Device) -> Rates | None:
    """What a device is taken to do; None where its data sheet does not say."""
    if device.flops is None or device.bytes_per_second is None:
        return None
    products, moved = device.flops * REACHED[0], device.bytes_per_second * REACHED[1]
    source = f"the data sheet of {device.name}, of which an H100 reaches {REACHED[0]:.0%} and {REACHED[1]:.0%}"
    if device.name in MEASURED:
        products, moved = MEASURED[device.name]
        source = f"measured on {device.name} (docs/performance.md)"
    launch = LAUNCH_SECONDS if device.capability else 0.0  # a TPU's core runs a program as a whole
    return Rates(products, device.flops * ATTENTION, moved, device.link or math.inf, launch, source)


class Row(NamedTuple):
    """Kernels together."""

    name: str
    kernels: int
    gigabytes: float
    teraflops: float
    milliseconds: float


def kernels(text: str) -> list[Kernel]:
    """The kernels of an optimized HLO module, in the order in which they first run."""
    program = hlo.parse(text)
    return [*_kernels(program, program.entry, 1)]


def _kernels(program: Program, name: str, times: int) -> Iterable[Kernel]:
    instructions = program.computations[name]
    types = {instruction.name: instruction for instruction in instructions}
    for place, instruction in enumerate(instructions):
        opcode = instruction.opcode
        if opcode in NO_KERNEL or opcode.endswith(("-done", "-update")):
            continue
        if opcode in ("while", "call", "conditional", "async-start"):
            for called in instruction.called[:1] if opcode == "conditional" else instruction.called:
                yield from _kernels(program, called, times * program.trips(instruction))
            continue
        if opcode.removesuffix("-start") in KINDS:
            beside = opcode.endswith("-start") and _beside(instructions, place)
            size = result_bytes(instruction)
            yield Kernel("collectives", instruction.source or opcode, times, size, 0.0, hidden=beside)
            continue
        yield _kernel(program, instruction, types, times)


def _beside(instructions: Sequence[Instruction], start: int) -> bool:
    """Whether a kernel stands between the start of a collective and its end."""
    name = instructions[start].name
    for instruction in instructions[start + 1 :]:
        if name in instruction.operands:
            return False
        if instruction.opcode in ("fusion", "custom-call", "dot", "convolution", "while"):
            return True
    return False


def _kernel(program: Program, instruction: Instruction, types: dict[str, Instruction], times: int) -> Kernel:
    within = [inner for called in instruction.called for inner in hlo.inside(program, called)]
    inside_types = {inner.name: inner for inner in within}
    flops = sum(_product_flops(inner, inside_types) for inner in within) + _product_flops(instruction, types)
    moved = _moved(program, instruction, types)
    source = instruction.source or instruction.opcode
    if instruction.opcode == "custom-call" and FUSED_ATTENTION.search(instruction.attributes):
        return Kernel("attention", source, times, moved, _attention_flops(instruction, types))
    if instruction.opcode in ("fusion-start", "copy-start"):
        return Kernel("slices", source, times, moved, 0.0)
    if flops:
        return Kernel("products", source, times, moved, flops)
    return Kernel("passes" if "jvp" in source else "optimizer", source, times, moved, 0.0)


def _moved(program: Program, instruction: Instruction, types: dict[str, Instruction]) -> float:
    """Bytes that a kernel reads and writes; of an array of which it takes or changes a slice alone, the slice."""
    operands = instruction.operands
    read = {name: _in_memory(types[name]) for name in operands if name in types}
    written = _in_memory(instruction)
    if instruction.opcode in SLICING:
        return 2 * _slice_bytes(instruction, types)
    for called in instruction.called:
        inner = program.computations.get(called, [])
        named = {i.name: i for i in inner}
        users: dict[str, list[Instruction]] = defaultdict(list)
        for i in inner:
            for name in i.operands:
                users[name].append(i)
        for parameter in (i for i in inner if i.opcode == "parameter" and int(i.arguments) < len(operands)):
            outer, used_by = operands[int(parameter.arguments)], users[parameter.name]
            if used_by and all(i.opcode in SLICING and i.operands[0] == parameter.name for i in used_by):
                slices = sum(_slice_bytes(i, named) for i in used_by if i.opcode != "dynamic-update-slice")
                read[outer] = min(read.get(outer, 0), slices)
        for i in inner:
            if i.opcode == "dynamic-update-slice":  # written in place
                written -= _in_memory(i) - _slice_bytes(i, named)
    return sum(read.values()) + max(0, written)


def _slice_bytes(instruction: Instruction, types: dict[str, Instruction]) -> int:
    """Of what a slicing instruction takes, or puts in."""
    if instruction.opcode != "dynamic-update-slice":
        return _in_memory(instruction)
    return _in_memory(types[instruction.operands[1]])


def _in_memory(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.memory_space == 0)


def _product_flops(instruction: Instruction, types: dict[str, Instruction]) -> float:
    """Of a product of matrices, as GPUs have it (dot) or TPUs (convolution); 0 of anything else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (types[name].arrays[0].shape for name in instruction.operands[:2])
    out = 2.0 * math.prod(instruction.arrays[0].shape)
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return out * math.prod(left[int(i)] for i in (contracted[1].split(",") if contracted else ()) if i)
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    return out * right[labels[1].index("i")]  # what is spatial to it are batches, each of which meets only its own


def _attention_flops(instruction: Instruction, types: dict[str, Instruction]) -> float:
    """Of fused attention, with the causal half alone: forward two products, backward five."""
    if found := re.search(r'"?flops"?:\s*"?(\d+)', instruction.attributes):  # a Pallas kernel says so itself
        return float(found[1])
    scores = re.search(r'"intermediate_tensor_shape".*?"dimensions":\s*\[([^\]]*)\]', instruction.attributes)
    if scores is None:
        return 0.0
    B, N, T, S = (int(n) for n in re.findall(r"\d+", scores[1]))
    H = instruction.arrays[0].shape[-1]
    half = 0.5 if "CAUSAL" in instruction.attributes else 1.0
    products = 5 if "Backward" in instruction.attributes else 2
    return 2.0 * products * B * N * T * S * H * half


def seconds(kernel: Kernel, rates: Rates) -> float:
    """Of one execution of a kernel alone."""
    if kernel.kind == "collectives":
        return kernel.bytes / rates.link + rates.launch
    if (
        kernel.kind == "attention"
    ):  # its memory and its products hardly overlap: measured at contexts of 1,024 and 16,384
        return kernel.bytes / rates.bytes + kernel.flops / rates.attention + rates.launch
    return max(kernel.bytes / rates.bytes, kernel.flops / rates.products) + rates.launch


def step_seconds(found: Sequence[Kernel], rates: Rates) -> float:
    """Of one execution of the program: of all kernels but those that are hidden behind others, and no less than moving
    all bytes takes."""
    one_by_one = [kernel for kernel in found if not kernel.hidden and kernel.kind != "slices"]
    moved = sum(kernel.times * kernel.bytes for kernel in found if kernel.kind != "collectives")
    return max(sum(kernel.times * seconds(kernel, rates) for kernel in one_by_one), moved / rates.bytes)


def by_class(found: Sequence[Kernel], rates: Rates) -> list[Row]:
    """The kernels of each class together, and how long they take."""
    return [row for name in CLASSES if (row := _row(name, [k for k in found if k.kind == name], rates)).kernels]


def largest(found: Sequence[Kernel], rates: Rates, count: int) -> list[Row]:
    """The places in the source whose kernels take longest."""
    places: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in found:
        places[f"{kernel.kind}: {_place(kernel.source)}"].append(kernel)
    rows = [_row(name, held, rates) for name, held in places.items()]
    return sorted(rows, key=lambda row: -row.milliseconds)[:count]


def _place(source: str) -> str:
    """Without what jit adds, and without numbers, so that layers are one place."""
    return re.sub(r"\d+", "#", re.sub(r"jit\(\w+\)/", "", source))


def _row(name: str, found: Sequence[Kernel], rates: Rates) -> Row:
    return Row(
        name,
        sum(kernel.times for kernel in found),
        sum(kernel.times * kernel.bytes for kernel in found) / 1e9,
        sum(kernel.times * kernel.flops for kernel in found) / 1e12,
        sum(kernel.times * seconds(kernel, rates) for kernel in found) * 1e3,
    )
