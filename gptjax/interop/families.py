"""The families of Hugging Face models, as data: what their tensors and the fields of their `config.json` are here.

Each table is read in both directions. A family that is made of what the model has switches for is one more entry.
What leaving a field out means is what transformers 5 makes of it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gptjax.interop.tensor_names import (
    APERTUS_TENSORS,
    GEMMA_TENSORS,
    GPT2_TENSORS,
    LLAMA_TENSORS,
    NEOX_TENSORS,
    Tensor,
)


class Field(NamedTuple):
    """A field of their `config.json`, and ours of the model."""

    theirs: str
    ours: str
    default: Any = None
    """What they mean by leaving it out."""
    values: Mapping[Any, Any] | None = None
    """Ours for each of theirs, those that are written first; None: they are the same."""
    others: bool = False
    """Whether values that are not named there are the same, too."""


class Family(NamedTuple):
    """A `model_type`."""

    model_type: str
    architecture: str
    """The class of transformers, for `architectures`."""
    tensors: tuple[Tensor, ...]
    fields: tuple[Field, ...]
    fixed: Mapping[str, Any]
    """Fields of ours that are the same in all its models."""
    required: Mapping[str, tuple[Any, ...]] = {}
    """Fields of theirs with the values that are known here, the first of which is what leaving it out means."""
    rope: bool = True
    """Whether it has the fields of rotary positions."""
    rope_default: Mapping[str, Any] | None = None
    """What leaving `rope_parameters` out means; None: plain ones."""
    rope_base: float = 10_000.0
    """What leaving the base out means."""
    rope_base_field: str = "rope_theta"
    """Where the base stands outside of `rope_parameters`."""
    rope_local_base: float | None = None
    """What leaving out the base of layers with a window means; None: their positions are like the others'."""
    rope_fraction: float | None = None
    """What leaving out the share of each head that is rotated means; None: all of it is, always."""
    windows: str = "none"
    """Which layers have a window: none, all or none of them, or each as `layer_types` says."""
    window_fields: tuple[str, ...] = ()
    """Fields of theirs that say so."""
    window_period: int = 1
    """Where kinds of layers are left out: every so many-th is dense, the others local; 1: all dense."""
    whole_heads: bool = False
    """Whether the model's width has to be a multiple of the number of heads, even where `head_dim` is given."""
    prefix: str = ""
    """Of the names, which some files leave out."""
    buffers: tuple[str, ...] = ()
    """Ends of names that hold no parameters."""


def llama_fields(
    *,
    context_length: int,
    ffn_dim: int,
    tied: bool,
    activation: tuple[str, Mapping[str, str]],
    head_dim: int | None = None,
    kv_heads: int | None = None,
    default_activation: str = "",
    epsilon: float = 1e-6,
) -> tuple[Field, ...]:
    """Llama's fields, with the defaults in which families differ."""
    return (
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "model_dim"),
        Field("num_hidden_layers", "num_layers"),
        Field("num_attention_heads", "num_heads"),
        Field("num_key_value_heads", "num_kv_heads", kv_heads),
        Field("head_dim", "head_dim", head_dim),
        Field("intermediate_size", "ffn_dim", ffn_dim),
        Field("max_position_embeddings", "context_length", context_length),
        Field("rms_norm_eps", "norm_epsilon", epsilon),
        Field("initializer_range", "initializer_std", 0.02),
        Field("tie_word_embeddings", "tie_embeddings", tied),
        Field("attention_dropout", "attention_dropout", 0.0),
        Field(activation[0], "feed_forward", default_activation or next(iter(activation[1])), activation[1]),
    )


TANH = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
"""One formula, written in three ways."""
SILU = ("hidden_act", {"silu": "swiglu", "swish": "swiglu"})
UNGATED = ("hidden_act", {"relu2": "relu2", "relu": "relu", "gelu": "gelu", **TANH})
GEGLU = ("hidden_activation", dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "geglu"))
MODERN = {"norm": "rmsnorm", "positions": "rope", "ffn_bias": False}
NO_BIAS = {"bias": False, "qkv_bias": False}


def attention_bias(default: bool) -> tuple[Field, Field]:
    """One field of theirs for all four matrices."""
    return Field("attention_bias", "bias", default), Field("attention_bias", "qkv_bias", default)


GEMMA = {
    **MODERN,
    "norm_position": "both",
    "norm_zero_centered": True,
    "scale_embedding": True,
}


def gemma_fields(context_length: int, final_softcap: float | None) -> tuple[Field, ...]:
    return (
        *llama_fields(
            context_length=context_length, ffn_dim=9216, tied=True, activation=GEGLU, head_dim=256, kv_heads=4
        ),
        *attention_bias(False),
        Field("query_pre_attn_scalar", "query_scale_dim", 256),
        Field("final_logit_softcapping", "logit_softcap", final_softcap, {None: 0.0}, others=True),
    )


ROTARY_BUFFER = (".rotary_emb.inv_freq",)
QWEN_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            GPT2_TENSORS,
            (
                Field("vocab_size", "vocab_size", 50257),
                Field("n_embd", "model_dim", 768),
                Field("n_layer", "num_layers", 12),
                Field("n_head", "num_heads", 12),
                Field("n_inner", "ffn_dim"),
                Field("n_positions", "context_length", 1024),
                Field("layer_norm_epsilon", "norm_epsilon", 1e-5),
                Field("initializer_range", "initializer_std", 0.02),
                Field("tie_word_embeddings", "tie_embeddings", True),
                Field("embd_pdrop", "embedding_dropout", 0.1),
                Field("attn_pdrop", "attention_dropout", 0.1),
                Field("resid_pdrop", "residual_dropout", 0.1),
                Field(
                    "activation_function",
                    "feed_forward",
                    "gelu_new",
                    {**TANH, "gelu": "gelu", "relu": "relu"},
                ),
            ),
            {
                "norm": "layernorm",
                "norm_bias": True,
                "positions": "learned",
                "bias": True,
                "qkv_bias": True,
                "ffn_bias": True,
            },
            {
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,),
                "reorder_and_upcast_attn": (False, True),  # float32 for scores, which they have here anyway
            },
            rope=False,
            prefix="transformer.",
            buffers=(".attn.bias", ".attn.masked_bias"),
        ),
        Family(
            "llama",
            "LlamaForCausalLM",
            LLAMA_TENSORS,
            (
                *llama_fields(context_length=2048, ffn_dim=11008, tied=False, activation=SILU),
                *attention_bias(False),
                Field("mlp_bias", "ffn_bias", False),
            ),
            {"norm": "rmsnorm", "positions": "rope"},
            whole_heads=True,
            buffers=ROTARY_BUFFER,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            LLAMA_TENSORS,
            llama_fields(context_length=4096 * 32, ffn_dim=14336, tied=False, activation=SILU, kv_heads=8),
            {**MODERN, **NO_BIAS},
            windows="all",
            window_fields=("sliding_window", "layer_types"),
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            LLAMA_TENSORS,
            llama_fields(context_length=32768, ffn_dim=22016, tied=False, activation=SILU, kv_heads=32),
            {**MODERN, "bias": False, "qkv_bias": True},
            windows="layers",
            window_fields=QWEN_WINDOWS,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            LLAMA_TENSORS,
            (
                *llama_fields(
                    context_length=32768, ffn_dim=22016, tied=False, activation=SILU, head_dim=128, kv_heads=32
                ),
                *attention_bias(False),
            ),
            {**MODERN, "qk_norm": True},
            windows="layers",
            window_fields=QWEN_WINDOWS,
        ),
        Family(
            "apertus",
            "ApertusForCausalLM",
            APERTUS_TENSORS,
            (
                *llama_fields(
                    context_length=65536,
                    ffn_dim=14336,
                    tied=False,
                    activation=UNGATED,
                    default_activation="xielu",
                    epsilon=1e-5,
                ),
                *attention_bias(False),
            ),
            {**MODERN, "qk_norm": True},
            rope_default={
                "rope_type": "llama3",
                "rope_theta": 12e6,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            rope_base=12e6,
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            NEOX_TENSORS,
            (
                Field("vocab_size", "vocab_size", 50432),
                Field("hidden_size", "model_dim", 6144),
                Field("num_hidden_layers", "num_layers", 44),
                Field("num_attention_heads", "num_heads", 64),
                Field("intermediate_size", "ffn_dim", 24576),
                Field("max_position_embeddings", "context_length", 2048),
                Field("layer_norm_eps", "norm_epsilon", 1e-5),
                Field("initializer_range", "initializer_std", 0.02),
                Field("tie_word_embeddings", "tie_embeddings", False),
                Field("attention_dropout", "attention_dropout", 0.0),
                Field("hidden_dropout", "embedding_dropout", 0.0),
                Field("hidden_dropout", "residual_dropout", 0.0),
                Field("use_parallel_residual", "parallel_residual", True),
                Field("hidden_act", "feed_forward", "gelu", {"gelu": "gelu", **TANH, "relu": "relu"}),
                *attention_bias(True),
            ),
            {"norm": "layernorm", "norm_bias": True, "positions": "rope", "ffn_bias": True},
            rope_base_field="rotary_emb_base",
            rope_fraction=0.25,
            buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            GEMMA_TENSORS,
            (
                *gemma_fields(8192, final_softcap=30.0),
                Field("attn_logit_softcapping", "attention_softcap", 50.0, {None: 0.0}, others=True),
            ),
            GEMMA,
            {"use_bidirectional_attention": (None, False)},
            windows="layers",
            window_fields=("sliding_window", "layer_types", "sliding_window_size"),
            window_period=2,
            whole_heads=True,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            GEMMA_TENSORS,
            gemma_fields(131_072, final_softcap=None),
            {**GEMMA, "qk_norm": True},
            # Of this soft cap, which Gemma 2 has, Gemma 3 has the field alone.
            {"use_bidirectional_attention": (False, None), "attn_logit_softcapping": (None,)},
            rope_base=1e6,
            rope_local_base=10_000.0,
            windows="layers",
            window_fields=("sliding_window", "layer_types", "sliding_window_pattern"),
            window_period=6,
            whole_heads=True,
        ),
    )
}
"""By `model_type`. Tensors that a model has no parameter for are those of a switch that is off."""
