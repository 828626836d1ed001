"""GPT-3 175B (Brown et al. 2020, Table 2.1): 300 billion tokens."""

from gptjax.presets import gpt3

config = gpt3("175B")
