"""What turns logits into the distribution that is sampled: pure functions with Hugging Face's semantics.

Each takes float32 logits (B, C) and its setting as a scalar or as one value per row, which may be traced: rows with
different settings share a batch, and another setting compiles nothing. Removed tokens have logit -inf. At least one
token always stays. None sorts the vocabulary on a CPU, where that takes longer than a small model's token.

Shape suffixes: B batch, V padded vocabulary, C candidates: those that top-k leaves, largest first, or all.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.parallel import sharding
from gptjax.sampling.config import SamplingConfig

Setting = jax.Array | np.ndarray | float
"""A scalar, or (B,) values; of top_k what `ranks` gives."""

FEWEST_RANKS = 16
"""Top-k's ranks are a power of two of at least this many, so that few numbers are compiled."""
ROWS = 128
"""Pieces of a row that are added up side by side when a threshold is searched."""
LOG_SPAN = 30.0
"""Nats below the likeliest in which it is searched: of what is rarer, a whole vocabulary adds up to nothing."""
HALVINGS = 22
"""Of that span."""


class Candidates(NamedTuple):
    """Tokens that may be drawn, and some that may not, with logit -inf."""

    logits_BC: jax.Array
    ids_BC: jax.Array | None
    """Their tokens; None: all in order."""

    def tokens(self, index_B: jax.Array) -> jax.Array:
        """(B,) token at one place in each row, int32."""
        if self.ids_BC is None:
            return index_B.astype(jnp.int32)
        return sharding.pick(self.ids_BC, index_B).astype(jnp.int32)

    def spread(self, values_BC: jax.Array, like_BV: jax.Array) -> jax.Array:
        """(B, V), at each candidate its value and elsewhere 0."""
        if self.ids_BC is None:
            return values_BC

        def put(zeros_BV: jax.Array, values_BC: jax.Array, ids_BC: jax.Array) -> jax.Array:
            return zeros_BV.at[jnp.arange(len(ids_BC))[:, None], ids_BC].set(values_BC)

        return sharding.per_device(put, jnp.zeros_like(like_BV, values_BC.dtype), values_BC, self.ids_BC)


def repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty: Setting) -> jax.Array:
    """Make seen tokens less likely: positive logits are divided, negative multiplied (Keskar et al. 2019, CTRL)."""
    penalty = _column(penalty)
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def temperature(logits_BC: jax.Array, value: Setting) -> jax.Array:
    """`logits / value`, up to a shift of each row; at 0 only the largest stays, the first one of equals."""
    value = _column(value)
    # Shifted first, so that the coldest temperatures cannot overflow.
    shifted_BC = logits_BC - logits_BC.max(axis=-1, keepdims=True)
    greedy_BC = jnp.where(one_hot(likeliest(logits_BC), logits_BC), 0.0, -jnp.inf)
    return jnp.where(value > 0, shifted_BC / jnp.where(value > 0, value, 1.0), greedy_BC)


def ranks(k: int) -> np.ndarray:
    """The setting of `top_k`: for each rank whether it is kept. How many ranks there are is compiled, k is not."""
    return np.arange(max(FEWEST_RANKS, 1 << (k - 1).bit_length())) < k


def top_k(logits_BV: jax.Array, kept: Setting) -> Candidates:
    """Keep the k largest; of those that equal the last, the first. `kept`: (C,) or (B, C), see `ranks`."""
    kept = jnp.asarray(kept)[..., : logits_BV.shape[-1]]
    logits_BC, ids_BC = jax.lax.top_k(logits_BV, kept.shape[-1])
    return Candidates(jnp.where(kept.reshape(-1, kept.shape[-1]), logits_BC, -jnp.inf), ids_BC)


def top_p(logits_BC: jax.Array, p: Setting) -> jax.Array:
    """Keep the fewest largest tokens whose probability reaches p, and what equals the last of them; 1 keeps all.

    Nucleus sampling (Holtzman et al. 2020).
    """
    p = _column(p)
    find = threshold_by_halving if jax.default_backend() == "cpu" else threshold_by_sorting
    weights_BC = jnp.exp(logits_BC - logits_BC.max(axis=-1, keepdims=True))
    return jnp.where((weights_BC >= find(weights_BC, p)) | (p >= 1), logits_BC, -jnp.inf)


def threshold_by_sorting(weights_BC: jax.Array, p_B1: jax.Array) -> jax.Array:
    """(B, 1), the largest weight from which on weights sum to the share p."""
    sorted_BC = jnp.sort(weights_BC, axis=-1, descending=True)
    sums_BC = jnp.cumsum(sorted_BC, axis=-1)
    kept_B = jnp.sum(sums_BC - sorted_BC < p_B1 * sums_BC[:, -1:], axis=-1)
    return sharding.pick(sorted_BC, jnp.maximum(kept_B - 1, 0))[:, None]


def threshold_by_halving(weights_BC: jax.Array, p_B1: jax.Array) -> jax.Array:
    """The same, of weights of at most 1, to a factor of 1e-5: in passes over them that need no order."""
    B, C = weights_BC.shape
    # Sums of columns before sums of rows: XLA vectorizes those on a CPU.
    weights_BYX = jnp.pad(weights_BC, [(0, 0), (0, -C % ROWS)]).reshape(B, ROWS, -1)
    wanted_B = p_B1[:, 0] * weights_BYX.sum(axis=1).sum(axis=-1)

    def halve(_: int, log_bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """What is at least as heavy as the lower bound is enough; what is as heavy as the upper one is not."""
        low_B, high_B = log_bounds
        middle_B = (low_B + high_B) / 2
        heavy_BYX = weights_BYX >= jnp.exp(middle_B)[:, None, None]
        enough_B = jnp.where(heavy_BYX, weights_BYX, 0.0).sum(axis=1).sum(axis=-1) >= wanted_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    ones_B = jnp.ones_like(wanted_B)
    low_B, _ = jax.lax.fori_loop(0, HALVINGS, halve, (-LOG_SPAN * ones_B, 1e-3 * ones_B))
    return jnp.minimum(jnp.exp(low_B), 1.0)[:, None]


def min_p(logits_BC: jax.Array, p: Setting) -> jax.Array:
    """Keep tokens whose probability is at least p times the largest (Nguyen et al. 2024); 0 keeps all."""
    threshold = logits_BC.max(axis=-1, keepdims=True) + jnp.log(_column(p))
    return jnp.where(logits_BC >= threshold, logits_BC, -jnp.inf)


def filter_settings(sampling: SamplingConfig) -> dict[str, Setting]:
    """The filters that are on, with their settings, as `apply_filters` takes them.

    Which keys there are decides what is compiled; their values do not. Greedy sampling has no `temperature`,
    and none of the filters that never remove the largest logit.
    """
    settings: dict[str, Setting] = {}
    if sampling.repetition_penalty != 1:
        settings["repetition_penalty"] = float(sampling.repetition_penalty)
    if sampling.temperature > 0:
        settings["temperature"] = float(sampling.temperature)
        if sampling.top_k:
            settings["top_k"] = ranks(sampling.top_k)
        off = {"top_p": 1.0, "min_p": 0.0}
        settings |= {name: float(getattr(sampling, name)) for name in off if getattr(sampling, name) != off[name]}
    return settings


def apply_filters(logits_BV: jax.Array, seen_BV: jax.Array, settings: Mapping[str, Setting]) -> Candidates:
    """Apply the filters that are named in `settings`, in Hugging Face's order."""
    if "repetition_penalty" in settings:
        logits_BV = repetition_penalty(logits_BV, seen_BV, settings["repetition_penalty"])
    found = top_k(logits_BV, settings["top_k"]) if "top_k" in settings else Candidates(logits_BV, None)
    logits_BC = found.logits_BC
    if "temperature" in settings:  # which keeps the order, so that it may come after top-k
        logits_BC = temperature(logits_BC, settings["temperature"])
    for name, keep in (("top_p", top_p), ("min_p", min_p)):
        if name in settings:
            logits_BC = keep(logits_BC, settings[name])
    return Candidates(logits_BC, found.ids_BC)


def likeliest(logits_BC: jax.Array) -> jax.Array:
    """(B,) index of the largest in each row, the first one of equals: `argmax` in two passes that vectorize."""
    C = logits_BC.shape[-1]
    column_BC = _columns(logits_BC)
    is_top_BC = logits_BC >= logits_BC.max(axis=-1, keepdims=True)
    return jnp.where(is_top_BC, column_BC, C - 1).min(axis=-1)


def one_hot(tokens_B: jax.Array, like_BV: jax.Array) -> jax.Array:
    """(B, V) booleans, true at each row's token, laid out as `like_BV`."""
    return _columns(like_BV) == tokens_B[:, None]


def _columns(like_BV: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, like_BV.shape, 1, out_sharding=jax.typeof(like_BV).sharding)


def _column(setting: Setting) -> jax.Array:
    return jnp.asarray(setting).reshape(-1, 1)
