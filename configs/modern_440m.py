"""A Llama-style model of 440M parameters, on 20 tokens for each: a rung of the ladder for scaling studies."""

from gptjax.presets import modern

config = modern("440M")
