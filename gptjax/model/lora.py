"""Low-rank adapters (Hu et al. 2021): the blocks' matrices as they are, plus a product of two thin ones.

Only the thin ones are trained. They are a tree of their own, stacked over layers as the blocks are, with which a
model's parameters are joined to be used, or into which they are merged.

Shape suffixes: L layers, D inputs, F outputs, R rank.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.parallel import sharding
from gptjax.parallel.precision import precision
from gptjax.tuning_config import LoraConfig

PARTS = {"attention": ("q", "k", "v", "out"), "feed_forward": ("gate", "up", "down")}
"""Where in a block the matrices are that can have an adapter."""
AXES = {"q": ("embed", "heads"), "k": ("embed", "kv_heads"), "v": ("embed", "kv_heads"), "out": ("heads", "embed")}
AXES |= {"gate": ("embed", "ffn"), "up": ("embed", "ffn"), "down": ("ffn", "embed")}
"""Logical axes of their dimensions."""


class Lora(NamedTuple):
    """A matrix with its adapter: w + a b."""

    w: jax.Array
    a: jax.Array
    b: jax.Array
    """With the scale in it."""


def draw_adapters(blocks: Any, lora: LoraConfig, key: jax.Array) -> Any:
    """Adapters of a model's blocks: `a` normal with deviation 1/sqrt(D), `b` zero, so that nothing is changed yet.

    Args:
        blocks: the model's, or their shapes.
    """
    adapters: dict[str, dict[str, Any]] = {}
    for part, names in PARTS.items():
        for name in names:
            if name not in lora.targets or name not in blocks[part]:
                continue
            (L, D, F), (axis, out) = blocks[part][name]["w"].shape, AXES[name]
            own = jax.random.fold_in(key, [*AXES].index(name))
            a_LDR = jax.random.normal(own, (L, D, lora.rank), out_sharding=sharding.spec("stack", axis, "rank"))
            b_LRF = sharding.reshard(jnp.zeros((L, lora.rank, F)), "stack", "rank", out)
            adapters.setdefault(part, {})[name] = {"a": a_LDR * D**-0.5, "b": b_LRF}
    return adapters


def join(params: Any, trained: Any, lora: LoraConfig) -> Any:
    """Parameters whose adapted matrices are `Lora`, as the model takes them; gradients go to what is trained.

    Args:
        trained: `adapters`, and parameters that take the place of the model's own.
    """
    scale, blocks = lora.alpha / lora.rank, dict(params["blocks"])
    for part, layers in trained["adapters"].items():
        blocks[part] = dict(blocks[part])
        for name, adapter in layers.items():
            matrix = Lora(blocks[part][name]["w"], adapter["a"], scale * adapter["b"])
            blocks[part][name] = blocks[part][name] | {"w": matrix}
    return params | {name: leaf for name, leaf in trained.items() if name != "adapters"} | {"blocks": blocks}


def merge(params: Any) -> Any:
    """Parameters as any model's: each `Lora` becomes the matrix that it stands for."""

    def merged(leaf: Any) -> Any:
        if not isinstance(leaf, Lora):
            return leaf
        product = jnp.einsum("ldr,lrf->ldf", leaf.a, leaf.b, precision=precision(leaf.a), out_sharding=_layout(leaf.w))
        return leaf.w + product

    return jax.tree.map(merged, params, is_leaf=lambda leaf: isinstance(leaf, Lora))


def _layout(w: jax.Array) -> jax.P | None:
    return jax.typeof(w).sharding.spec if sharding.has_mesh() else None
