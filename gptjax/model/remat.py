"""What the backward pass finds kept and what it computes again, by the names of `model.remat`."""

from typing import Any

import jax
from jax.ad_checkpoint import Offloadable

ATTENTION = "attention"
"""Name, given by `checkpoint_name`, of what a kernel must keep for its backward pass not to repeat the forward one."""
BLOCK_INPUT = "block_input"
"""Name of the residual stream before a block."""
FUSED_ATTENTION = ("dot_product_attention_fwd_wrapper", "pallas_call")
"""JAX's primitives of kernels that are not ours to mark: cuDNN's, and what is written in Pallas."""

_TO_HOST = Offloadable(src="device", dst="pinned_host")


def _keep_all_but_gathered(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """A policy of `jax.checkpoint`: parameters that devices share are gathered again in the backward pass, or each
    device would hold the whole model. What `fan_out` marks is only another name of its input, and JAX cannot keep it.
    """
    marked = any(x.sharding.spec.reduced for x in inputs)
    return not (marked or primitive.name in ("reshard", "all_gather"))


def _save_attention(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    return primitive.name in FUSED_ATTENTION or (primitive.name == "name" and parameters["name"] == ATTENTION)


def _offload(primitive: Any, *inputs: Any, **parameters: Any) -> bool | Offloadable:
    is_block_input = primitive.name == "name" and parameters["name"] == BLOCK_INPUT
    return _TO_HOST if is_block_input or _save_attention(primitive, *inputs, **parameters) else False


POLICIES = {
    "none": _keep_all_but_gathered,
    "full": None,
    "save_dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_attention": _save_attention,
    "offload": _offload,
}
"""All but `none` also keep each block's input, and gather parameters anew; `offload` keeps nothing on the device."""
