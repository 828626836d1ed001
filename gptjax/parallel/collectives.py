"""What a compiled program sends between devices, read off its HLO."""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_OPERATION = re.compile(rf"= (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\((?P<rest>.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls|branch_computations=\{)[=%]*([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One operation of the program."""

    kind: str
    bytes: int
    """Of the result on one device; of a reduce-scatter, of what goes in."""
    times: int
    """How often it runs in one execution of the program."""
    operation: str
    """Where in the source it comes from, as JAX named it."""


def collectives(hlo: str) -> list[Collective]:
    """The collectives of an optimized HLO module's text, as `compiled.as_text()` gives it.

    A loop's body counts as often as its known trip count says, and once where there is none. XLA's CPU backend merges
    all-reduces into one with several results, and has no reduce-scatter: an all-reduce and a slice stand for it.
    """
    times = _executions(hlo)
    found, computation = [], ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _OPERATION.search(line):
            name = re.search(r'op_name="([^"]*)"', match["rest"])
            size, devices = _bytes(match["type"]), _group_size(match["rest"])
            if devices == 1:  # an axis of one device: nothing is sent
                continue
            if match["kind"] == "reduce-scatter":
                size *= devices
            found.append(Collective(match["kind"], size, times.get(computation, 1), name[1] if name else ""))
    return found


def bytes_by_kind(hlo: str) -> Counter[str]:
    """The bytes of all executions together, for each kind that there is."""
    total: Counter[str] = Counter()
    for collective in collectives(hlo):
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


def _bytes(type_text: str) -> int:
    """Of all arrays of a type, each of whose names, such as bf16 or f8e4m3fn, says its bits; only pred does not."""
    return sum(
        (8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]))
        * math.prod(int(n) for n in shape.split(",") if n)
        // 8
        for dtype, shape in _ARRAY.findall(type_text)
    )


def _executions(hlo: str) -> dict[str, int]:
    """How often each computation runs: the product of the trip counts of the loops that it is in."""
    callers: dict[str, tuple[str, int]] = {}
    computation = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
            continue
        trips = _TRIPS.search(line)
        for called in _CALLED.findall(line):
            callers[called] = (computation, int(trips[1]) if trips else 1)

    def count(name: str) -> int:
        if name not in callers:
            return 1
        caller, trips = callers[name]
        return trips * count(caller)

    return {name: count(name) for name in callers}
