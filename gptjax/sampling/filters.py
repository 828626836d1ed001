"""What turns logits into the distribution that is sampled: pure functions with Hugging Face's semantics.

Each takes float32 logits (B, V) and its setting as a scalar or as one value per row, which may be
traced: rows with different settings share a batch, and another setting compiles nothing. Removed
tokens have logit -inf. At least one token always stays.

Shape suffixes: B batch, V vocabulary.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gptjax.sampling.config import SamplingConfig

Setting = jax.Array | float
"""A scalar, or (B,) values."""


def repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty: Setting) -> jax.Array:
    """Make seen tokens less likely: positive logits are divided, negative multiplied (Keskar et al. 2019, CTRL)."""
    penalty = _column(penalty)
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def temperature(logits_BV: jax.Array, value: Setting) -> jax.Array:
    """`logits / value`, up to a shift of each row; at 0 only the largest stays, the first one of equals."""
    value = _column(value)
    # Shifted first, so that the coldest temperatures cannot overflow.
    shifted_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    greedy_BV = jnp.where(one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV), 0.0, -jnp.inf)
    return jnp.where(value > 0, shifted_BV / jnp.where(value > 0, value, 1.0), greedy_BV)


def top_k(logits_BV: jax.Array, k: Setting) -> jax.Array:
    """Keep the k largest, and what equals the last of them; 0 keeps all."""
    B, V = logits_BV.shape
    k = _column(k).astype(jnp.int32)
    last = jnp.broadcast_to(jnp.where(k > 0, jnp.minimum(k, V), V) - 1, (B, 1))
    threshold = jnp.take_along_axis(jnp.sort(logits_BV, axis=-1, descending=True), last, axis=-1)
    return jnp.where(logits_BV >= threshold, logits_BV, -jnp.inf)


def top_p(logits_BV: jax.Array, p: Setting) -> jax.Array:
    """Keep the fewest largest tokens whose probability reaches p (Holtzman et al. 2020); 1 keeps all."""
    p = _column(p)
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
    sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    kept = jnp.maximum(1, jnp.sum(before_BV < p, axis=-1, keepdims=True))
    rank_BV = jnp.argsort(order_BV, axis=-1)
    # Rounding may let the cumulative sum reach 1 before the last token.
    return jnp.where((rank_BV < kept) | (p >= 1), logits_BV, -jnp.inf)


def min_p(logits_BV: jax.Array, p: Setting) -> jax.Array:
    """Keep tokens whose probability is at least p times the largest (Nguyen et al. 2024); 0 keeps all."""
    threshold = logits_BV.max(axis=-1, keepdims=True) + jnp.log(_column(p))
    return jnp.where(logits_BV >= threshold, logits_BV, -jnp.inf)


FILTERS = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
"""What follows the repetition penalty, in the order of application, which is Hugging Face's."""


def filter_settings(sampling: SamplingConfig) -> dict[str, float]:
    """The filters that are on, with their settings, as `apply_filters` takes them.

    Which keys there are decides what is compiled; their values do not. Greedy sampling has no `temperature`,
    and none of the filters that never remove the largest logit.
    """
    settings = {}
    if sampling.repetition_penalty != 1:
        settings["repetition_penalty"] = float(sampling.repetition_penalty)
    if sampling.temperature > 0:
        settings["temperature"] = float(sampling.temperature)
        off = {"top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
        settings |= {name: float(getattr(sampling, name)) for name in off if getattr(sampling, name) != off[name]}
    return settings


def apply_filters(logits_BV: jax.Array, seen_BV: jax.Array, settings: Mapping[str, Setting]) -> jax.Array:
    """Apply the repetition penalty, then `FILTERS`, as far as they are named in `settings`."""
    if "repetition_penalty" in settings:
        logits_BV = repetition_penalty(logits_BV, seen_BV, settings["repetition_penalty"])
    for name, keep in FILTERS.items():
        if name in settings:
            logits_BV = keep(logits_BV, settings[name])
    return logits_BV


def one_hot(tokens_B: jax.Array, like_BV: jax.Array) -> jax.Array:
    """(B, V) booleans, true at each row's token, laid out as `like_BV`."""
    column = jax.lax.broadcasted_iota(jnp.int32, like_BV.shape, 1, out_sharding=jax.typeof(like_BV).sharding)
    return column == tokens_B[:, None]


def _column(setting: Setting) -> jax.Array:
    return jnp.asarray(setting).reshape(-1, 1)
