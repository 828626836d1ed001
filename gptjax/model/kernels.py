"""The kernels of `attention`: which of them can run a call, which is the fastest of those, and all but one of them.

Whether a kernel can run is decided from plain facts, a `Call` and a `Machine`, so that it is known before anything
compiles and can be asked about devices that are not there. No kernel approximates, and none ignores an argument.

Shape suffixes: B batch, T query tokens, S key/value tokens, N query heads, K key/value heads, G query heads per
key/value head, H head dimension, X queries for all G heads, side by side.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.blockwise import blockwise_attention
from gptjax.model.devices import of_kind
from gptjax.model.xla_attention import xla_attention
from gptjax.parallel.precision import compute_dtype

BLOCKWISE_FROM = {"cpu": 2**18, "gpu": 2**24, "tpu": 2**24}
"""Logits of a head on one device from which they are not held all at once, where no kernel of the device's own runs.
On a CPU that is faster from 512 × 512 on (benchmarks/attention_speed.py); elsewhere, not measured, it saves memory."""


class Machine(NamedTuple):
    """What of a device and its software decides which kernels run."""

    platform: str
    """cpu, gpu or tpu."""
    kind: str
    """As its maker calls it."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability; None: no NVIDIA GPU."""
    has_tokamax: bool = False


class Call(NamedTuple):
    """What `attention` is asked for on one device, as far as it is known while tracing."""

    num_queries: int
    num_keys: int
    head_dim: int
    value_dim: int
    dtype: str
    window: int | None = None
    softcap: float = 0.0
    in_order: bool = False
    """Queries and keys are the same tokens; those of a document differ in position as they do in place."""
    documents: bool = False
    """Whether rows hold several documents, which do not see each other."""
    dropout: bool = False


def this_machine() -> Machine:
    """That of the mesh that is set, whose devices need not be here; else of the device on which JAX runs what is told
    nothing else."""
    absent = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if absent is not None and absent.platform != jax.default_backend():
        known = of_kind(absent.device_kind)
        return Machine(absent.platform, absent.device_kind, known.capability if known else None, _has_tokamax())
    default = jax.config.jax_default_device
    device = jax.local_devices(backend=default)[0] if isinstance(default, str) else default or jax.local_devices()[0]
    version = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))  # AMD's is gfx942 or so
    capability = (int(version[1]), int(version[2])) if version else None
    return Machine(device.platform, device.device_kind, capability, _has_tokamax())


def _has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def choose(call: Call, machine: Machine, kernel: str = "auto") -> str:
    """The kernel to run a call with: the one asked for, or of those that can the one that should be fastest.

    Raises:
        UserError: the one asked for cannot.
    """
    if kernel == "auto":
        return next(name for name in _fastest_first(call, machine) if WHY_NOT[name](call, machine) is None)
    reason = WHY_NOT[kernel](call, machine)
    if reason is not None:
        working = [name for name in _fastest_first(call, machine) if WHY_NOT[name](call, machine) is None]
        raise UserError(f"model.attention_kernel {kernel} {reason}; {', '.join(['auto', *working])} can run here")
    return kernel


def _fastest_first(call: Call, machine: Machine) -> Sequence[str]:
    long = call.num_queries * call.num_keys >= BLOCKWISE_FROM[machine.platform]
    return "cudnn", "tokamax", *(("blockwise", "xla") if long else ("xla", "blockwise"))


def training_calls(
    config: ModelConfig, num_tokens: int | None = None, *, documents: bool, context: int
) -> dict[int | None, Call]:
    """The calls of a training step, by their window.

    Args:
        num_tokens: of a sequence; None: context_length.
        documents: whether documents in a row do not see each other.
        context: devices that split each sequence.
    """
    T, H = num_tokens or config.context_length, config.resolved_head_dim
    return {
        window: Call(
            num_queries=T // context,
            num_keys=T,
            head_dim=H,
            value_dim=H,
            dtype=str(compute_dtype(config)),
            window=window,
            softcap=config.attention_softcap,
            in_order=context == 1,
            documents=documents,
            dropout=config.attention_dropout > 0,
        )
        for window in dict.fromkeys(config.layer_windows)
    }


def describe(config: ModelConfig, calls: dict[int | None, Call], machine: Machine) -> str:
    """Which kernels training takes and, on an accelerator, why not a faster one, in a line.

    Raises:
        UserError: `model.attention_kernel` names one that cannot run.
    """
    chosen = {window: choose(call, machine, config.attention_kernel) for window, call in calls.items()}
    reasons: dict[str, None] = {}
    if machine.platform != "cpu" and config.attention_kernel == "auto":
        for window, call in calls.items():
            order = _fastest_first(call, machine)
            faster = order[: order.index(chosen[window])]
            reasons |= dict.fromkeys(f"{name} {WHY_NOT[name](call, machine)}" for name in faster)
    if len(set(chosen.values())) == 1:
        text = next(iter(chosen.values()))
    else:
        text = ", ".join(f"{name} {'for all tokens' if w is None else f'for {w}'}" for w, name in chosen.items())
    return f"{text} ({'; '.join(reasons)})" if reasons else text


def why_not_xla(call: Call, machine: Machine) -> str | None:
    """It runs everything."""
    return None


def why_not_blockwise(call: Call, machine: Machine) -> str | None:
    """A dropout mask has as many elements as the logits that it exists to avoid."""
    return "has no attention dropout" if call.dropout else None


def why_not_cudnn(call: Call, machine: Machine) -> str | None:
    """What `jax.nn.dot_product_attention` and the libraries below it need; packed documents have no public way."""
    if machine.capability is None:
        return f"needs an NVIDIA GPU, and this is {machine.kind}"
    if machine.capability < (8, 0):
        return f"needs compute capability 8.0, and {machine.kind} has {'.'.join(map(str, machine.capability))}"
    if call.documents:
        return "cannot separate packed documents"
    return _why_not_fused(call)


def why_not_tokamax(call: Call, machine: Machine) -> str | None:
    """What its Mosaic kernels need; in tokamax 0.0.17 those for TPUs have no window."""
    generation = re.match(r"TPU v?(\d+)", machine.kind)
    if machine.platform == "tpu":
        if generation is None or int(generation[1]) < 5:
            return f"needs a TPU v5 or newer, and this is {machine.kind}"
        if call.window is not None and call.window < call.num_keys:
            return f"has no window on TPUs, and a layer sees {call.window} tokens"
    elif machine.capability is None or machine.capability[0] != 9:
        return f"needs a GPU of compute capability 9 or a TPU, and this is {machine.kind}"
    if not machine.has_tokamax:
        return 'is not installed: pip install "gptjax[tokamax]", on Python 3.12 or newer'
    if call.num_keys % 128:
        return f"needs a multiple of 128 tokens, not {call.num_keys}"
    return _why_not_fused(call, softcap=True)


def _why_not_fused(call: Call, softcap: bool = False) -> str | None:
    if not call.in_order:
        return "needs whole sequences in order: no context axis, no positions of their own"
    if call.dtype != "bfloat16":
        return f"needs model.compute_dtype bfloat16, not {call.dtype}"
    if call.head_dim % 8 or call.head_dim > 128:
        return f"needs a head_dim that is a multiple of 8 up to 128, not {call.head_dim}"
    if call.value_dim != call.head_dim:
        return f"needs values as wide as keys, not {call.value_dim} and {call.head_dim}"
    if call.dropout:
        return "has no attention dropout of ours"
    if call.softcap and not softcap:
        return f"has no softcap, and model.attention_softcap is {call.softcap:g}"
    return None


def _blockwise_attention(q, k, v, q_positions, kv_positions, segments, keep_BNTS, *, window, cap, scale):
    return blockwise_attention(
        q, k, v, q_positions, kv_positions, *(segments or (None, None)), window=window, cap=cap, scale=scale
    )


def _cudnn_attention(q, k, v, q_positions, kv_positions, segments, keep_BNTS, *, window, cap, scale):
    """cuDNN's flash attention. Never with a boolean mask: that becomes a bias, at a sixth of the speed."""
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=_reach(window, k.shape[1]), implementation="cudnn"
    )


def _tokamax_attention(q, k, v, q_positions, kv_positions, segments, keep_BNTS, *, window, cap, scale):
    """Tokamax's Mosaic kernels. Documents are told apart by a mask of B · T · S bytes, which its kernels read."""
    import tokamax

    return tokamax.dot_product_attention(
        q,
        k,
        v,
        mask=None if segments is None else segments[0][:, None, :, None] == segments[1][:, None, None, :],
        scale=scale,
        is_causal=True,
        local_window_size=_reach(window, k.shape[1]),
        logits_soft_cap=cap or None,
        implementation="mosaic",
    )


def _reach(window: int | None, num_keys: int) -> tuple[int, int] | None:
    """Keys to the left and to the right of a query's own that it sees."""
    return None if window is None or window >= num_keys else (window - 1, 0)


RUN: dict[str, Callable[..., jax.Array]] = {
    "xla": xla_attention,
    "blockwise": _blockwise_attention,
    "cudnn": _cudnn_attention,
    "tokamax": _tokamax_attention,
}
"""Each kernel of local arrays, with the arguments of `xla_attention`."""

WHY_NOT: dict[str, Callable[[Call, Machine], str | None]] = {
    "xla": why_not_xla,
    "blockwise": why_not_blockwise,
    "cudnn": why_not_cudnn,
    "tokamax": why_not_tokamax,
}
"""For each kernel what keeps it from running a call, to be read after its name; None: nothing."""
