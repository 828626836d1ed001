"""Sampling settings that cannot work are refused in one line that names the value."""

import math
import subprocess
import sys

import pytest

from gptjax.errors import UserError
from gptjax.sampling.config import SamplingConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("seed", -1),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(UserError, match=rf"^{name} is {value}, but must be [^\n]+$"):
        SamplingConfig(**{name: value})


def test_bounds_are_allowed():
    SamplingConfig(max_tokens=1, temperature=0, top_k=0, top_p=0.0, min_p=1.0, repetition_penalty=0.5)


def test_empty_stop_string():
    with pytest.raises(UserError, match="stop string is empty"):
        SamplingConfig(stop=("END", ""))


def test_one_stop_string_is_not_taken_apart():
    assert SamplingConfig(stop="END").stop == ("END",)


def test_needs_no_jax():
    """A command line is built from these fields before JAX is loaded."""
    code = "import sys; sys.modules['jax'] = None; import gptjax.sampling.config"
    subprocess.run([sys.executable, "-c", code], check=True)
