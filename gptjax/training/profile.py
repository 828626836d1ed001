"""Which kernels a step's time goes to: a trace of some steps, and what the largest of them are.

A trace lies in its folder as JAX writes it: `*.xplane.pb` for TensorBoard's profiler, and `perfetto_trace.json.gz` for
https://ui.perfetto.dev. Kernels are told by what the compiled program's text (HLO) says of them.
"""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax.parallel.collectives import KINDS as COLLECTIVES

CONTAINERS = ("while", "call", "conditional")
"""Operations that run others, whose time is counted by itself."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>\S+) = .*?[\])}] (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)")


class Kernel(NamedTuple):
    """All calls of one operation of the compiled program."""

    name: str
    kind: str
    """matmul, attention, optimizer, reduction, elementwise, copy or collective."""
    operation: str
    """Where in the source it comes from, as JAX named it; empty where that is not known."""
    milliseconds: float
    calls: int
    share: float
    """Of the time of all kernels."""


class _Instruction(NamedTuple):
    opcode: str
    operation: str
    inside: frozenset[str]
    """Opcodes and targets of custom calls, its own and those of the computations that it fuses."""


@contextlib.contextmanager
def trace(folder: Path) -> Iterator[None]:
    """Trace what the devices do in the block, whose work must be done when it ends."""
    start_trace(folder)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def start_trace(folder: Path) -> None:
    """As `trace`, until `jax.profiler.stop_trace`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would slow the host and fill the file
    jax.profiler.start_trace(str(folder), create_perfetto_trace=True, profiler_options=options)


def perfetto_file(folder: Path) -> Path:
    """The newest trace for Perfetto in a folder."""
    return max(folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)


def kernels(folder: Path, hlo: str) -> list[Kernel]:
    """The kernels of the newest trace in a folder, those that took longest first.

    On a GPU or TPU a kernel's time is its device's. On a CPU it lasts from its start to its end on whichever threads
    it ran, waiting for a free one included.

    Args:
        hlo: text of the compiled program that ran, as `compiled.as_text()` gives it; of others kernels are told by
            their names alone.
    """
    file = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    with warnings.catch_warnings():  # Python 3.12 has a word for the types of JAX's reader, at their first use
        warnings.simplefilter("ignore", DeprecationWarning)
        nanoseconds, calls, shown = _times(jax.profiler.ProfileData.from_file(str(file)))
    program, total = _instructions(hlo), sum(nanoseconds.values())
    found = []
    for name, duration in nanoseconds.most_common():
        instruction = program.get(name) or _Instruction("", "", frozenset())
        kind = _kind(f"{name} {shown[name]}".lower(), instruction)
        found.append(Kernel(name, kind, instruction.operation, duration / 1e6, calls[name], duration / total))
    return found


def shares(found: Sequence[Kernel]) -> dict[str, float]:
    """Share of the kernels' time for each kind, the largest first."""
    total: Counter[str] = Counter()
    for kernel in found:
        total[kernel.kind] += kernel.share
    return dict(total.most_common())


def report(found: Sequence[Kernel], num_steps: int, largest: int = 10) -> str:
    """The largest kernels and the kinds, in lines for people."""
    lines = [f"the {min(largest, len(found))} largest of {len(found)} kernels, in {num_steps} steps:"]
    for kernel in found[:largest]:
        where = re.sub(r"^jit\(\w+\)/", "", kernel.operation)
        calls, milliseconds = kernel.calls / num_steps, kernel.milliseconds / num_steps
        cost = f"{kernel.share:6.1%}  {milliseconds:9.3f} ms/step  {calls:5.0f} ×"
        lines.append(f"  {cost}  {kernel.kind:11}  {kernel.name}  {where}".rstrip())
    return "\n".join([*lines, "by kind: " + ", ".join(f"{kind} {share:.1%}" for kind, share in shares(found).items())])


def _times(data: Any) -> tuple[Counter[str], Counter[str], dict[str, str]]:
    """Nanoseconds and calls of each operation, and the kernel's own name."""
    ends, started = {}, []
    for plane in data.planes:
        lines = list(plane.lines)
        if plane.name.startswith("/device:"):
            # A GPU has a line for each stream, a TPU one for its operations; others repeat them as steps and modules.
            streams = [line for line in lines if line.name.startswith("Stream")]
            lines = streams or [line for line in lines if line.name == "XLA Ops"]
        for line in lines:
            for event in line.events:
                stats = dict(event.stats)
                name = event.name.split(" = ")[0].lstrip("%")
                if name.startswith("end: "):  # of an operation of the CPU that went on after it was launched
                    ends[stats.get("_c")] = event.start_ns
                elif "hlo_op" in stats or plane.name.startswith("/device:"):
                    operation = str(stats.get("hlo_op", name))
                    started.append((operation, name, event.start_ns, event.duration_ns, stats.get("_p")))
    nanoseconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    shown = {}
    for operation, name, start, duration, identity in started:
        if not operation.startswith(CONTAINERS):
            nanoseconds[operation] += max(duration, ends.get(identity, start) - start)
            calls[operation] += 1
            shown[operation] = name
    return nanoseconds, calls, shown


def _instructions(hlo: str) -> dict[str, _Instruction]:
    """The instructions of a program's text by name."""
    rows: dict[str, tuple[str, str, str, str]] = {}
    members: dict[str, list[str]] = {}
    computation = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            rest = match["rest"]
            operation, called, target = (
                found[1] if (found := re.search(pattern, rest)) else ""
                for pattern in (r'op_name="([^"]*)"', r"calls=%?([\w.\-]+)", r'custom_call_target="([^"]*)"')
            )
            rows[match["name"]] = match["opcode"], operation, called, target
            members.setdefault(computation, []).append(match["name"])

    def inside(name: str) -> frozenset[str]:
        opcode, _, called, target = rows[name]
        within = (inside(member) for member in members.get(called, ()))
        return frozenset({opcode, target}).union(*within)

    return {name: _Instruction(opcode, operation, inside(name)) for name, (opcode, operation, *_) in rows.items()}


def _kind(name: str, instruction: _Instruction) -> str:
    """What a kernel is for: its place in the source decides, then what it computes, then its name in lower case."""

    def has(*words: str) -> bool:
        return any(word in text for word in words for text in instruction.inside)

    operation = instruction.operation
    if has(*COLLECTIVES) or "nccl" in name or name.startswith(COLLECTIVES):
        return "collective"
    if has("fmha", "mosaic", "splash") or re.search("fmha|sdpa|flash|attention", name):
        return "attention"
    if "/attention/" in operation and not re.search(r"/(q|k|v|kv|qkv|out)/", operation):
        return "attention"  # what is neither of its projections
    if operation.startswith("jit(") and "jvp(" not in operation:
        return "optimizer"  # neither forward nor backward
    if has("dot", "convolution", "gemm", "cublas", "matmul") or re.search("gemm|nvjet|cutlass|dot|matmul", name):
        return "matmul"
    if has("reduce", "reduce-window", "scatter") or "reduce" in name:
        return "reduction"
    if instruction.opcode in ("copy", "copy-start", "copy-done", "transpose", "bitcast") or re.match(
        "memcpy|copy", name
    ):
        return "copy"
    return "elementwise"


class Profiler:
    """Traces the steps of a run's window, and says which kernels were largest. Of several processes the first alone
    traces; all cut their dispatches where the window begins and ends.
    """

    def __init__(self, window: tuple[int, int], folder: Path | None, say: Callable[[str], None]):
        """
        Args:
            window: the last step before those that are traced, and the last of these.
            folder: where the trace goes; None: another process traces.
            say: takes lines for people.
        """
        self.window, self._folder, self._say = window, folder, say
        self._since: int | None = None

    def begin(self, step: int) -> None:
        """Start the trace after this step, which must be done."""
        if self._folder is not None:
            start_trace(self._folder)
        self._since = step

    @property
    def is_running(self) -> bool:
        return self._since is not None

    def end(self, step: int, program: Callable[[], str]) -> None:
        """End the trace after this step, which must be done; `program` gives the text of the compiled step."""
        num_steps = step - self._since
        self.close()
        if self._folder is not None:
            # Compiling may be work that processes share: one alone would wait for the others.
            hlo = program() if jax.process_count() == 1 else ""
            self._say(report(kernels(self._folder, hlo), num_steps))
            self._say(f"trace: {perfetto_file(self._folder)} (open it at https://ui.perfetto.dev)")

    def close(self) -> None:
        """Leave no trace running, whatever happened."""
        if self._since is not None and self._folder is not None:
            jax.profiler.stop_trace()
        self._since = None
