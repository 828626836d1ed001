"""GPT-2, 774 million parameters (Radford et al. 2019), trained with nanoGPT's settings."""

from gptjax.presets import gpt2

config = gpt2("774M")
