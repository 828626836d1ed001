"""nanoGPT's Shakespeare on characters, GPU settings: `--data.path shakespeare.txt`."""

from gptjax.presets import shakespeare_char_gpu

config = shakespeare_char_gpu()
