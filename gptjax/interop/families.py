"""The families of Hugging Face models, as data: what their tensors and the fields of their `config.json` are here.

Each table is read in both directions. A family that is made of what the model has switches for is one more entry.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


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
    rope_needed: bool = False
    """Whether leaving them out means something else than plain ones."""
    rope_base: float = 10_000.0
    """What leaving out the base means; and the two that follow."""
    rope_fraction: float = 1.0
    rope_local_base: float | None = None
    windows: str = "none"
    """Which layers have a window: none, all or none of them, or each as `layer_types` says."""
    window_period: int = 1
    """Where kinds of layers are left out: every so many-th is dense, the others local; 1: all dense."""
    prefix: str = ""
    """Of the names, which some files leave out."""
    buffers: tuple[str, ...] = ()
    """Ends of names that hold no parameters."""


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


def llama_fields(
    *,
    context_length: int,
    tied: bool,
    activation: tuple[str, Mapping[str, str]],
    head_dim: int | None = None,
    kv_heads: int | None = None,
    default_activation: str = "",
) -> tuple[Field, ...]:
    """Llama's fields, with the defaults in which families differ."""
    return (
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "model_dim"),
        Field("num_hidden_layers", "num_layers"),
        Field("num_attention_heads", "num_heads"),
        Field("num_key_value_heads", "num_kv_heads", kv_heads),
        Field("head_dim", "head_dim", head_dim),
        Field("intermediate_size", "ffn_dim"),
        Field("max_position_embeddings", "context_length", context_length),
        Field("rms_norm_eps", "norm_epsilon", 1e-6),
        Field("initializer_range", "initializer_std", 0.02),
        Field("tie_word_embeddings", "tie_embeddings", tied),
        Field("attention_dropout", "attention_dropout", 0.0),
        Field(activation[0], "feed_forward", default_activation or next(iter(activation[1])), activation[1]),
    )


SILU = ("hidden_act", {"silu": "swiglu"})
UNGATED = ("hidden_act", {"relu2": "relu2", "relu": "relu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"})
GEGLU = ("hidden_activation", {"gelu_pytorch_tanh": "geglu"})
MODERN = {"norm": "rmsnorm", "positions": "rope", "bias": False}
GEMMA = {
    **MODERN,
    "qkv_bias": False,
    "norm_position": "both",
    "norm_zero_centered": True,
    "scale_embedding": True,
}
GEMMA_FIELDS = (
    *llama_fields(context_length=8192, tied=True, activation=GEGLU, head_dim=256, kv_heads=4),
    Field("query_pre_attn_scalar", "query_scale_dim", 256),
)
ROTARY_BUFFER = (".rotary_emb.inv_freq",)

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
                    {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"},
                ),
            ),
            {"norm": "layernorm", "norm_bias": True, "positions": "learned", "bias": True, "qkv_bias": True},
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
            llama_fields(context_length=2048, tied=False, activation=SILU),
            {**MODERN, "qkv_bias": False},
            {"attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1, 2, 4, 8)},
            buffers=ROTARY_BUFFER,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            LLAMA_TENSORS,
            llama_fields(context_length=4096 * 32, tied=False, activation=SILU, kv_heads=8),
            {**MODERN, "qkv_bias": False},
            windows="all",
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            LLAMA_TENSORS,
            llama_fields(context_length=32768, tied=False, activation=SILU, kv_heads=32),
            {**MODERN, "qkv_bias": True},
            windows="layers",
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            LLAMA_TENSORS,
            llama_fields(context_length=32768, tied=False, activation=SILU, head_dim=128, kv_heads=32),
            {**MODERN, "qkv_bias": False, "qk_norm": True},
            {"attention_bias": (False,)},
            windows="layers",
        ),
        Family(
            "apertus",
            "ApertusForCausalLM",
            APERTUS_TENSORS,
            llama_fields(context_length=65536, tied=False, activation=UNGATED, default_activation="xielu"),
            {**MODERN, "qkv_bias": False, "qk_norm": True},
            {"attention_bias": (False,)},
            rope_needed=True,
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
                Field("hidden_dropout", "residual_dropout", 0.0),
                Field("use_parallel_residual", "parallel_residual", True),
                Field(
                    "hidden_act",
                    "feed_forward",
                    "gelu",
                    {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"},
                ),
            ),
            {"norm": "layernorm", "norm_bias": True, "positions": "rope", "bias": True, "qkv_bias": True},
            {"attention_bias": (True,)},
            rope_fraction=0.25,
            buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            GEMMA_TENSORS,
            (
                *GEMMA_FIELDS,
                Field("attn_logit_softcapping", "attention_softcap", 50.0, {None: 0.0}, others=True),
                Field("final_logit_softcapping", "logit_softcap", 30.0, {None: 0.0}, others=True),
            ),
            GEMMA,
            {"attention_bias": (False,), "use_bidirectional_attention": (None, False)},
            windows="layers",
            window_period=2,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            GEMMA_TENSORS,
            (
                *GEMMA_FIELDS,
                Field("attn_logit_softcapping", "attention_softcap", None, {None: 0.0}, others=True),
                Field("final_logit_softcapping", "logit_softcap", None, {None: 0.0}, others=True),
            ),
            {**GEMMA, "qk_norm": True},
            {"attention_bias": (False,), "use_bidirectional_attention": (False, None)},
            rope_base=1e6,
            rope_local_base=10_000.0,
            windows="layers",
            window_period=6,
        ),
    )
}
"""By `model_type`. Tensors that a model has no parameter for are those of a switch that is off."""

HARMLESS = frozenset(
    "architectures auto_map bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id torch_dtype "
    "dtype transformers_version use_cache model_type id2label label2id problem_type output_attentions return_dict "
    "output_hidden_states chunk_size_feed_forward is_encoder_decoder is_decoder task_specific_params summary_type "
    "summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout classifier_dropout name_or_path "
    "n_ctx hidden_act cache_implementation gradient_checkpointing tokenizer_class return_dict_in_generate "
    "num_return_sequences use_bfloat16 finetuning_task prefix".split()
)
"""Fields of theirs that change nothing of what a model computes."""
