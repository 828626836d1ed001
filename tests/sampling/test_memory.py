"""A cache that cannot fit is refused with what would."""

import re

import pytest

from gptjax.errors import UserError
from gptjax.sampling import memory
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.sampling.memory import require_cache_fits
from gptjax.sampling.rows import generate_tokens

WHOLE = DecodingConfig()


def test_refused_with_what_fits(make_model, monkeypatch):
    """Weights of a megabyte or so and room for a few rows; what is named as fitting does, and one more does not."""
    config, _ = make_model(attention_pattern=("dense", "local"), context_length=4096)
    monkeypatch.setattr(memory, "_memory_bytes", lambda device: 2_000_000)
    require_cache_fits(config, WHOLE, 2, 4096)
    with pytest.raises(UserError, match=r"64 rows of 4096 tokens take 0\.0336 GB on each cpu") as said:
        require_cache_fits(config, WHOLE, 64, 4096)
    rows, slots = map(
        int, re.search(r"; (\d+) rows of as many tokens or as many rows of (\d+) tokens fit", str(said.value)).groups()
    )
    for fitting in ((rows, 4096), (64, slots)):
        require_cache_fits(config, WHOLE, *fitting)
    for too_much in ((rows + 1, 4096), (64, slots + 1)):
        with pytest.raises(UserError, match="keys and values"):
            require_cache_fits(config, WHOLE, *too_much)
    require_cache_fits(config, DecodingConfig(kv_cache="int8"), rows + 1, 4096)
    monkeypatch.setattr(memory, "_memory_bytes", lambda device: 10_000)
    with pytest.raises(UserError, match="the weights alone do not fit"):
        require_cache_fits(config, WHOLE, 1, 16)


def test_before_anything_runs(model, monkeypatch):
    """Said at the call, not at the first token."""
    monkeypatch.setattr(memory, "_memory_bytes", lambda device: 1_000_000)
    with pytest.raises(UserError, match="keys and values of 1000 rows of"):
        generate_tokens(*model, [[1, 2, 3]] * 1000, SamplingConfig(max_tokens=50), (256,))
