"""A Llama-style model of 240M parameters, on 20 tokens for each: a rung of the ladder for scaling studies."""

from gptjax.presets import modern

config = modern("240M")
