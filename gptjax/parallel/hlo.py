"""A compiled program's text (optimized HLO, as `compiled.as_text()` gives it) as instructions."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:body|to_apply|calls|called_computations=\{|branch_computations=\{)[=%]*([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Array(NamedTuple):
    """The type of one array."""

    dtype: str
    shape: tuple[int, ...]
    memory_space: int
    """0 is the device's main memory; on a TPU 1 is the memory on the chip."""

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype)[0])  # bf16, f8e4m3fn, s4
        return bits * math.prod(self.shape) // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    arguments: str
    """As written; of a parameter its number."""
    attributes: str
    """All that follows the arguments."""

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the instructions whose results it takes."""
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    @property
    def arrays(self) -> list[Array]:
        """What it gives: several arrays where its type is a tuple."""
        return arrays(self.type)

    @property
    def source(self) -> str:
        """Where in the program it comes from, as JAX named it; empty where nobody says."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs: a fusion's, a loop's body, a branch."""
        return tuple(_CALLED.findall(self.attributes))


class Program(NamedTuple):
    """All computations of a module, each in the order in which it runs where the module is scheduled."""

    computations: dict[str, list[Instruction]]
    entry: str

    def trips(self, instruction: Instruction) -> int:
        """How often an instruction runs what it calls.

        Of a loop its text tells (GPUs, CPUs) or its condition, a comparison with a constant (TPUs); else it is once.
        """
        if found := _TRIPS.search(instruction.attributes):
            return int(found[1])
        condition = re.search(r"condition=%?([\w.\-]+)", instruction.attributes)
        if instruction.opcode != "while" or condition is None:
            return 1
        within = [*inside(self, condition[1])]
        bounds = [int(i.arguments) for i in within if i.opcode == "constant" and i.arguments.isdecimal()]
        below = any(i.opcode == "compare" and "direction=LT" in i.attributes for i in within)
        return bounds[0] if below and len(bounds) == 1 else 1

    def executions(self) -> dict[str, int]:
        """How often each computation that is called runs: the product of the trip counts of the loops it is in."""
        callers: dict[str, tuple[str, int]] = {}
        for name, instructions in self.computations.items():
            for instruction in instructions:
                for called in instruction.called:
                    callers[called] = (name, self.trips(instruction))

        @functools.cache
        def count(name: str) -> int:
            if name not in callers:
                return 1
            caller, trips = callers[name]
            return trips * count(caller)

        return {name: count(name) for name in callers}


def parse(hlo: str) -> Program:
    """Read a module's text."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = match["name"]
            computations[current] = []
            entry = current if match["entry"] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(_instruction(match["name"], match["rest"]))
    return Program(computations, entry)


def arrays(type_text: str) -> list[Array]:
    """The arrays of a type, of one or of a tuple of them."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(type_text):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(dtype, tuple(int(n) for n in shape.split(",") if n), int(space[1]) if space else 0))
    return found


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    type_text, call = rest[:end], rest[end:].strip()
    opened = call.index("(")
    closed = _closing(call, opened)
    return Instruction(name, type_text, call[:opened], call[opened + 1 : closed], call[closed + 1 :])


def _closing(text: str, opened: int) -> int:
    """Where the parenthesis ends that opens there."""
    depth = 0
    for place in range(opened, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def inside(program: Program, name: str) -> Iterator[Instruction]:
    """The instructions of a fusion's computation, and of those within it."""
    for instruction in program.computations.get(name, ()):
        yield instruction
        for called in instruction.called:
            yield from inside(program, called)
