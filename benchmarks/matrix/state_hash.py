"""`python state_hash.py RUN STEP DATA FSDP TENSOR`: sha256 of all bytes of a checkpoint, restored onto such a mesh."""

import hashlib
import sys
from pathlib import Path

import jax
import numpy as np

from gptjax.config import MeshConfig
from gptjax.model.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.training import checkpoint
from gptjax.training.optimizer import make_optimizer
from gptjax.training.run_dir import CHECKPOINTS, load_run_config
from gptjax.training.state import abstract_state

run, step, *axes = sys.argv[1:]
config, _ = load_run_config(run)
sizes = dict(zip(("data", "fsdp", "tensor"), map(int, axes or (1, 1, 1)), strict=True))
devices = jax.devices()[: sizes["data"] * sizes["fsdp"] * sizes["tensor"]]
with jax.set_mesh(make_mesh(MeshConfig(**sizes), devices)):
    target = abstract_state(GPT(config.model), make_optimizer(config.optimizer))
    state, _ = checkpoint.restore(Path(run) / CHECKPOINTS, int(step), target)
digest = hashlib.sha256()
for leaf in jax.tree.leaves(state):
    digest.update(np.asarray(leaf).tobytes())
print(digest.hexdigest())
