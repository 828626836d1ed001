"""What a compiled program sends between devices, read off its HLO."""

import math
import re
from collections import Counter
from typing import NamedTuple

from gptjax.parallel import hlo
from gptjax.parallel.hlo import Instruction

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One operation of the program."""

    kind: str
    bytes: int
    """Of the result on one device; of a reduce-scatter, of what goes in."""
    times: int
    """How often it runs in one execution of the program."""
    operation: str
    """Where in the source it comes from, as JAX named it."""


def collectives(text: str) -> list[Collective]:
    """The collectives of an optimized HLO module's text, as `compiled.as_text()` gives it.

    A loop's body counts as often as its known trip count says, and once where there is none. XLA's CPU backend merges
    all-reduces into one with several results, and has no reduce-scatter: an all-reduce and a slice stand for it.
    """
    program = hlo.parse(text)
    times, found = program.executions(), []
    for computation, instructions in program.computations.items():
        for instruction in instructions:
            kind, devices = instruction.opcode.removesuffix("-start"), _group_size(instruction.attributes)
            if kind in KINDS and devices != 1:  # on an axis of one device nothing is sent
                size = result_bytes(instruction) * (devices if kind == "reduce-scatter" else 1)
                found.append(Collective(kind, size, times.get(computation, 1), instruction.source))
    return found


def result_bytes(instruction: Instruction) -> int:
    """Of what a collective gives; the types of some that only start have what goes in before it."""
    given = instruction.arrays
    if instruction.opcode == "all-gather-start":
        given = given[len(given) // 2 :]
    elif instruction.opcode == "collective-permute-start":
        given = given[1:2]
    return sum(array.bytes for array in given)


def bytes_by_kind(text: str) -> Counter[str]:
    """The bytes of all executions together, for each kind that there is."""
    total: Counter[str] = Counter()
    for collective in collectives(text):
        total[collective.kind] += collective.bytes * collective.times
    return total


def _group_size(attributes: str) -> int:
    """Devices that take part together, in each of the forms that XLA writes; 0 where that is all of them."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes):
        sizes = dict(pair.split("=") for pair in match[1].split(","))
        return math.prod(int(sizes[axis.split(":")[0]]) for axis in match[2].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    return 0
