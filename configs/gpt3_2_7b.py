"""GPT-3 2.7B (Brown et al. 2020, Table 2.1): 300 billion tokens."""

from gptjax.presets import gpt3

config = gpt3("2.7B")
