"""How tokens get an order: rotary and sinusoidal positions.

Shape suffixes: B batch, T tokens, N heads, H head dimension, D model.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.model.layers import scaled


def rotary_frequencies(config: ModelConfig, *, local: bool) -> np.ndarray:
    """(rotary_dim / 2,) radians by which each pair of dimensions turns from one token to the next, float32.

    Those of dense layers are scaled as `rope_scaling` says, and so are those of local layers with `rope_scale_local`:

    - `linear` divides all of them (Chen et al. 2023).
    - `llama3` divides the low ones, whose wavelength does not fit `rope_low_frequency` times into
      `rope_original_length`, and the others less the more often theirs does (Grattafiori et al. 2024, and Meta's code).
    - `yarn` does the same, and goes over from one to the other by the number of the pair (Peng et al. 2023).
    - `longrope` divides each by a number of its own (Ding et al. 2024). Which of its two lists they come from is
      decided by `context_length`, once for all texts: a cache's keys then never change, nor does a row by its batch.
    """
    c, half = config, config.rotary_dim // 2
    base = c.resolved_rope_local_base if local else c.rope_base
    frequency_H = (base ** (-np.arange(half, dtype=np.float32) / np.float32(half))).astype(np.float32)
    if not _is_scaled(c, local):
        return frequency_H
    if c.rope_scaling == "linear":
        return frequency_H / np.float32(c.rope_factor)
    if c.rope_scaling == "longrope":
        is_long = c.context_length > c.rope_original_length
        return frequency_H / np.array(c.rope_long_factors if is_long else c.rope_short_factors, np.float32)
    if c.rope_scaling == "llama3":
        times_H = c.rope_original_length * frequency_H / (2 * math.pi)
        kept_H = (times_H - c.rope_low_frequency) / (c.resolved_rope_high_frequency - c.rope_low_frequency)
    else:
        kept_H = _kept_by_yarn(c, base)
    kept_H = np.clip(kept_H, 0.0, 1.0)
    return (frequency_H * (kept_H + (1 - kept_H) / c.rope_factor)).astype(np.float32)


def _is_scaled(config: ModelConfig, local: bool) -> bool:
    return config.rope_scaling != "none" and (config.rope_scale_local or not local)


def _kept_by_yarn(config: ModelConfig, base: float) -> np.ndarray:
    """(rotary_dim / 2,) the share of each frequency that stays as it is, before clipping it to 0 and 1."""
    c, half = config, config.rotary_dim // 2

    def pair(times: float) -> float:
        """The number of the pair whose wavelength fits so often into the original length."""
        return half * math.log(c.rope_original_length / (2 * math.pi * times)) / math.log(base)

    first, last = pair(c.resolved_rope_high_frequency), pair(c.rope_low_frequency)
    if c.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, c.rotary_dim - 1)
    width = last - first if last != first else 0.001
    return 1 - (np.arange(half, dtype=np.float32) - first) / width


def rotary_factor(config: ModelConfig, *, local: bool) -> float:
    """What rotated dimensions are multiplied by: attention is sharper over longer contexts (Peng et al. 2023)."""
    return config.resolved_rope_attention_factor if _is_scaled(config, local) else 1.0


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, frequency_H: np.ndarray, factor: float = 1.0) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) of the first dimensions of each head, two for each frequency.

    Dimension i is paired with i + len(frequency_H), as GPT-NeoX and Llama do. These are multiplied by `factor`.
    """
    half = len(frequency_H)
    angle_BTNH = positions_BT.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequency_H)[None, None, None, :]
    cos, sin = (scaled(f(angle_BTNH), factor) for f in (jnp.cos, jnp.sin))
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


def sinusoid(positions_BT: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal position encoding (Vaswani et al. 2017): sines in the even, cosines in the odd dimensions."""
    frequency_D = 10_000.0 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle_BTD = positions_BT.astype(jnp.float32)[:, :, None] * frequency_D[None, None, :]
    pairs_BTD2 = jnp.stack([jnp.sin(angle_BTD), jnp.cos(angle_BTD)], axis=-1)
    return pairs_BTD2.reshape(*positions_BT.shape, -1)[:, :, :dim]
