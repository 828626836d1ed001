"""GPT, 117 million parameters (Radford et al. 2018): post-norm, and dropout everywhere."""

from gptjax.presets import gpt1

config = gpt1()
