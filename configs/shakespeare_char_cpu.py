"""nanoGPT's Shakespeare on characters, CPU settings: `--data.path shakespeare.txt`."""

from gptjax.presets import shakespeare_char_cpu

config = shakespeare_char_cpu()
