"""Whether a cache fits, said before anything is allocated."""

import os

import jax

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.accounting import cache_elements, parameter_counts
from gptjax.parallel import sharding
from gptjax.parallel.precision import compute_dtype
from gptjax.sampling.config import DecodingConfig


def require_cache_fits(
    config: ModelConfig, decoding: DecodingConfig, num_rows: int, num_slots: int, draft: ModelConfig | None = None
) -> None:
    """Refuse a cache that no device has the memory for beside the weights, of which each holds its share.

    Args:
        num_rows: rows of the batch.
        num_slots: tokens of each row, prompt and all that may follow.
        draft: a model that guesses and so has weights and a cache, too.

    Raises:
        UserError: it does not fit; says what would.
    """
    device = jax.local_devices()[0]
    memory = _memory_bytes(device)
    models = [config] if draft is None else [config, draft]

    def weight_bytes(config: ModelConfig) -> float:
        each = 1 if decoding.weights == "int8" else compute_dtype(config).itemsize
        return parameter_counts(config)["total"] * each / sharding.num_shards("heads")

    def cache_bytes(config: ModelConfig, rows: int, slots: int) -> float:
        heads = config.resolved_head_dim
        # A scale of four bytes stands beside each head's eight-bit numbers.
        each = (heads + 4) / heads if decoding.kv_cache == "int8" else compute_dtype(config).itemsize
        elements = cache_elements(config, rows, slots, decoding.call_tokens)
        return elements * each / sharding.num_shards("row_heads")

    def needed(rows: int, slots: int) -> float:
        return sum(cache_bytes(model, rows, slots) for model in models)

    weights = sum(map(weight_bytes, models))
    free = memory - weights

    if needed(num_rows, num_slots) <= free:
        return
    rows = int(free // needed(1, num_slots)) if free > 0 else 0
    slots = int(num_slots * free / needed(num_rows, num_slots)) if free > 0 else 0
    while slots and needed(num_rows, slots) > free:  # windows make it less than proportional
        slots -= 1
    advice = [f"{rows} rows of as many tokens"] * (rows > 0) + [f"as many rows of {slots} tokens"] * (slots > 0)
    raise UserError(
        f"keys and values of {num_rows} rows of {num_slots} tokens take {needed(num_rows, num_slots) / 1e9:.3g} GB on "
        f"each {device.platform}, which has {memory / 1e9:.3g} GB, {weights / 1e9:.3g} GB of it for weights; "
        + (f"{' or '.join(advice)} fit" if advice else "the weights alone do not fit")
    )


def _memory_bytes(device: jax.Device) -> int:
    """What the device can hold; a CPU's is that of the machine."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
