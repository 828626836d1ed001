"""Muon: momentum whose every matrix is made orthogonal, for the weight matrices of the blocks (Jordan 2024).

Shape suffixes: L layers, D a matrix's inputs, F its outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.parallel import sharding


def in_block(path: tuple) -> bool:
    """Whether a parameter is one of the blocks': one for each layer, stacked."""
    return "blocks" in [part.key for part in path]


def is_hidden_matrix(path: tuple) -> bool:
    """Whether a parameter is a weight matrix of the blocks, (L, D, F)."""
    return in_block(path) and path[-1].key == "w"


def muon(momentum: float, update_rms: float) -> optax.GradientTransformation:
    """Nesterov momentum, of which each layer's matrix is then made orthogonal and scaled.

    An orthogonal (D, F) matrix has elements of root mean square 1/sqrt(max(D, F)). Scaled to `update_rms`, near 0.2 as
    AdamW's updates have it, its parameters share AdamW's learning rate and weight decay (Liu et al. 2025).

    Args:
        momentum: decay of the sum of gradients. How long the sum is does not matter to its orthogonal matrix.
        update_rms: root mean square of the update's elements.
    """

    def update(gradients_LDF: Any, _: Any = None) -> Any:
        def one(x_LDF: jax.Array) -> jax.Array:
            return update_rms * max(x_LDF.shape[1:]) ** 0.5 * sharding.map_layers(orthogonalize, x_LDF)

        return jax.tree.map(one, gradients_LDF)

    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(update))


def orthogonalize(x_LDF: jax.Array) -> jax.Array:
    """The nearest orthogonal matrix of each layer's, nearly: singular values of about 0.7 to 1.2 in place of its own.

    Five Newton-Schulz steps, whose coefficients lift small singular values at the expense of exactness (Jordan 2024).
    """
    # Without dimension numbers Optax takes only what has two dimensions. Momentum that forgets everything leaves
    # of its Muon the orthogonalization, which it does not export; the momentum itself is summed in its shards before.
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    alone = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=numbers)
    # Approximate as it is, it needs no more than ten bits of mantissa; float32's own would take GPUs eight times as
    # long, and by default TPUs would have seven.
    with jax.default_matmul_precision("high"):
        return alone.update(x_LDF, alone.init(x_LDF))[0].astype(jnp.float32)
