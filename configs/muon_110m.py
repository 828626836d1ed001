"""`modern_110m.py` with Muon for the blocks' matrices; learning rate and weight decay serve Muon and AdamW alike."""

from gptjax.presets import modern

config = modern("110M", optimizer="muon")
