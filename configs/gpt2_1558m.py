"""GPT-2, 1.558 billion parameters (Radford et al. 2019), trained with nanoGPT's settings."""

from gptjax.presets import gpt2

config = gpt2("1558M")
