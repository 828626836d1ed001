"""What the tensors of Hugging Face's families are called, and which of our parameters they hold, as data."""

from collections.abc import Mapping
from typing import NamedTuple


class Tensor(NamedTuple):
    """One of their tensors, and the parameters of ours that it holds."""

    theirs: str
    """Its name, with {} for the number of the layer."""
    ours: tuple[str, ...]
    """Paths in our parameters; several stand side by side along their outputs."""
    transposed: bool = False
    """Whether outputs come first, as torch's Linear has them."""
    by_head: bool = False
    """Whether several are interleaved head by head."""


def linear(theirs: str, *ours: str, by_head: bool = False) -> tuple[Tensor, ...]:
    """Weight and bias of torch's Linear."""
    return (
        Tensor(f"{theirs}.weight", tuple(f"{path}/w" for path in ours), transposed=True, by_head=by_head),
        Tensor(f"{theirs}.bias", tuple(f"{path}/b" for path in ours), by_head=by_head),
    )


def conv1d(theirs: str, *ours: str) -> tuple[Tensor, ...]:
    """The same of GPT-2's Conv1D, whose inputs come first."""
    return tuple(
        Tensor(f"{theirs}.{a}", tuple(f"{path}/{b}" for path in ours)) for a, b in (("weight", "w"), ("bias", "b"))
    )


def norm(theirs: str, ours: str) -> tuple[Tensor, ...]:
    return Tensor(f"{theirs}.weight", (f"{ours}/scale",)), Tensor(f"{theirs}.bias", (f"{ours}/b",))


GPT2_TENSORS = (
    Tensor("transformer.wte.weight", ("embedding",)),
    Tensor("transformer.wpe.weight", ("positions",)),
    *norm("transformer.h.{}.ln_1", "blocks/attention_norm"),
    *conv1d("transformer.h.{}.attn.c_attn", "blocks/attention/q", "blocks/attention/k", "blocks/attention/v"),
    *conv1d("transformer.h.{}.attn.c_proj", "blocks/attention/out"),
    *norm("transformer.h.{}.ln_2", "blocks/feed_forward_norm"),
    *conv1d("transformer.h.{}.mlp.c_fc", "blocks/feed_forward/up"),
    *conv1d("transformer.h.{}.mlp.c_proj", "blocks/feed_forward/down"),
    *norm("transformer.ln_f", "final_norm"),
    Tensor("lm_head.weight", ("head",)),
)

NEOX_TENSORS = (
    Tensor("gpt_neox.embed_in.weight", ("embedding",)),
    *norm("gpt_neox.layers.{}.input_layernorm", "blocks/attention_norm"),
    *linear(
        "gpt_neox.layers.{}.attention.query_key_value",
        *("blocks/attention/q", "blocks/attention/k", "blocks/attention/v"),
        by_head=True,
    ),
    *linear("gpt_neox.layers.{}.attention.dense", "blocks/attention/out"),
    *norm("gpt_neox.layers.{}.post_attention_layernorm", "blocks/feed_forward_norm"),
    *linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "blocks/feed_forward/up"),
    *linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "blocks/feed_forward/down"),
    *norm("gpt_neox.final_layer_norm", "final_norm"),
    Tensor("embed_out.weight", ("head",)),
)


def llama_tensors(norms: Mapping[str, str]) -> tuple[Tensor, ...]:
    """Llama's names, which most have taken over.

    Args:
        norms: of a block, theirs for ours.
    """
    return (
        Tensor("model.embed_tokens.weight", ("embedding",)),
        *(t for theirs, ours in norms.items() for t in norm(f"model.layers.{{}}.{theirs}", f"blocks/{ours}")),
        *(t for name in "qkv" for t in linear(f"model.layers.{{}}.self_attn.{name}_proj", f"blocks/attention/{name}")),
        *linear("model.layers.{}.self_attn.o_proj", "blocks/attention/out"),
        *norm("model.layers.{}.self_attn.q_norm", "blocks/attention/q_norm"),
        *norm("model.layers.{}.self_attn.k_norm", "blocks/attention/k_norm"),
        *(
            t
            for name in ("gate", "up", "down")
            for t in linear(f"model.layers.{{}}.mlp.{name}_proj", f"blocks/feed_forward/{name}")
        ),
        *norm("model.norm", "final_norm"),
        Tensor("lm_head.weight", ("head",)),
    )


LLAMA_TENSORS = llama_tensors(
    {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"},
)
APERTUS_TENSORS = llama_tensors(
    {"attention_layernorm": "attention_norm", "feedforward_layernorm": "feed_forward_norm"},
)
GEMMA_TENSORS = llama_tensors(
    {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "feed_forward_norm",
        "post_feedforward_layernorm": "feed_forward_post_norm",
    }
)
