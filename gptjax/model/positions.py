"""How tokens get an order: rotary and sinusoidal positions.

Shape suffixes: B batch, T tokens, N heads, H head dimension, D model.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig


def rotary_frequencies(config: ModelConfig, *, local: bool) -> np.ndarray:
    """(rotary_dim / 2,) radians by which each pair of dimensions turns from one token to the next, float32.

    Those of dense layers are scaled as `rope_scaling` says: `linear` divides all of them (Chen et al. 2023); `llama3`
    only the low ones, whose wavelength does not fit `rope_low_frequency` times into `rope_original_length`, and less
    the higher they are (Grattafiori et al. 2024, and Meta's code).
    """
    c, half = config, config.rotary_dim // 2
    base = c.resolved_rope_local_base if local else c.rope_base
    frequency_H = (base ** (-np.arange(half, dtype=np.float32) / np.float32(half))).astype(np.float32)
    if local or c.rope_scaling == "none":
        return frequency_H
    if c.rope_scaling == "linear":
        return frequency_H / np.float32(c.rope_factor)
    times_H = c.rope_original_length * frequency_H / (2 * math.pi)
    kept_H = (times_H - c.rope_low_frequency) / (c.rope_high_frequency - c.rope_low_frequency)
    kept_H = np.clip(kept_H, 0.0, 1.0)
    return (frequency_H * (kept_H + (1 - kept_H) / c.rope_factor)).astype(np.float32)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, frequency_H: np.ndarray) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) of the first dimensions of each head, two for each frequency.

    Dimension i is paired with i + len(frequency_H), as GPT-NeoX and Llama do.
    """
    half = len(frequency_H)
    angle_BTNH = positions_BT.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequency_H)[None, None, None, :]
    cos, sin = jnp.cos(angle_BTNH), jnp.sin(angle_BTNH)
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


def sinusoid(positions_BT: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal position encoding (Vaswani et al. 2017): sines in the even, cosines in the odd dimensions."""
    frequency_D = 10_000.0 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle_BTD = positions_BT.astype(jnp.float32)[:, :, None] * frequency_D[None, None, :]
    pairs_BTD2 = jnp.stack([jnp.sin(angle_BTD), jnp.cos(angle_BTD)], axis=-1)
    return pairs_BTD2.reshape(*positions_BT.shape, -1)[:, :, :dim]
