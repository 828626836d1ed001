"""A training step compiled without arrays: what XLA plans of memory, and what it sends."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from gptjax.model.gpt import GPT
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.parametrization import multipliers
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import abstract_state
from gptjax.training.step import make_train_step


class Compiled(NamedTuple):
    """A program and what compiling it took."""

    program: jax.stages.Compiled
    seconds: float

    def memory(self) -> dict[str, int]:
        """Bytes that XLA plans per device: `argument_bytes` (parameters, optimizer state, batch; updated in place),
        `temporary_bytes` (the rest), `total_bytes`."""
        plan = self.program.memory_analysis()
        kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return {
            "argument_bytes": plan.argument_size_in_bytes,
            "temporary_bytes": plan.temp_size_in_bytes,
            "total_bytes": int(kept + plan.temp_size_in_bytes),
        }


def compile_step(
    model_config: ModelConfig,
    optimizer_config: OptimizerConfig,
    training: TrainingConfig,
    mesh: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
) -> Compiled:
    """Compile the program that train.py runs, one step of it, with abstract parameters.

    Args:
        model_config: with vocabulary and type.
        mesh: without open axes.
        devices: as many as the product of the axes; None: JAX's own. They need not be here (`parallel.absent`).
    """
    with jax.set_mesh(make_mesh(mesh, devices)):
        model, optimizer = GPT(model_config), make_optimizer(optimizer_config, multipliers(model_config))
        K, B, T = 1, training.resolved_micro_batch_size, training.resolved_sequence_length(model_config)
        A = training.batch_size // B
        loss = language_model_loss(model, training.z_loss, None, training.loss_chunk_tokens)
        step = make_train_step(loss, optimizer, dropout_seed=None, accumulates=A > 1)
        layout = jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec("stack", "stack", "batch", "keys"))
        batch = {"tokens": jax.ShapeDtypeStruct((K, A, B, T + 1), jnp.int32, sharding=layout)}
        start = time.perf_counter()
        arguments = (batch, np.full(K, A, np.int32), np.ones(K, np.float32), K)
        program = step.lower(abstract_state(model, optimizer), *arguments).compile()
        return Compiled(program, time.perf_counter() - start)
