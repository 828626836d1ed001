"""Draws of configurations for `test_families.py`: theirs, with fields there and left out, and ours."""

from hypothesis import strategies as st

from gptjax.config import ModelConfig
from gptjax.interop.families import FAMILIES


def sometimes(draw, fields, name, *values):
    """Leave a field out, or draw one of these for it."""
    if (value := draw(st.sampled_from((..., *values)))) is not ...:
        fields[name] = value


@st.composite
def configurations(draw, family, small):
    """A `config.json` of a family.

    Args:
        small: whether sizes are given, and no default is a large model's.
    """
    fields = {"model_type": family}
    if family == "gpt2":
        fields |= {"vocab_size": 40, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
        for name, values in {
            "n_inner": (None, 56),
            "activation_function": ("gelu", "relu", "gelu_pytorch_tanh", "gelu_fast"),
            "layer_norm_epsilon": (1e-3,),
            "tie_word_embeddings": (True, False),
            "reorder_and_upcast_attn": (True, False),
        }.items():
            sometimes(draw, fields, name, *values)
        return fields
    width, many = (64, 4) if family == "gpt_neox" else (32, 32)
    heads = 4 if small else draw(st.sampled_from((8, many)))
    layers = draw(st.sampled_from((2, 3) if small else (2, 7, 30)))
    fields |= {"vocab_size": 40, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    if small:
        fields |= {"intermediate_size": 56, "max_position_embeddings": 64}
    else:
        sometimes(draw, fields, "intermediate_size", 56)
        sometimes(draw, fields, "max_position_embeddings", 64, 4096)
    choices = {"tie_word_embeddings": (True, False), "attention_dropout": (0.0, 0.1), "initializer_range": (0.01,)}
    if family == "gpt_neox":
        choices |= {
            "hidden_act": ("gelu", "gelu_new", "gelu_fast", "relu"),
            "layer_norm_eps": (1e-3,),
            "use_parallel_residual": (True, False),
            "attention_bias": (True, False),
            "hidden_dropout": (0.0, 0.1),
        }
        head_dim = width // heads
    else:
        needed = {"mistral": 8, "qwen2": 32, "qwen3": 32, "gemma2": 4, "gemma3_text": 4}.get(family, 1)
        if small or heads % needed:
            fields["num_key_value_heads"] = 2
        else:
            sometimes(draw, fields, "num_key_value_heads", 2)
        default = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}.get(family)
        if (small and default) or 32 // heads % 2:
            fields["head_dim"] = 12
        else:
            sometimes(draw, fields, "head_dim", 12)
        head_dim = fields.get("head_dim", default or 32 // heads)
        choices |= {"rms_norm_eps": (1e-3,)}
        if family in ("llama", "qwen3", "apertus", "gemma2", "gemma3_text"):
            choices |= {"attention_bias": (True, False)}
        if family == "llama":
            choices |= {"mlp_bias": (True, False), "hidden_act": ("silu", "swish")}
        if family == "apertus":
            fields["hidden_act"] = draw(st.sampled_from(("relu2", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh")))
        if family.startswith("gemma"):
            choices |= {
                "query_pre_attn_scalar": (20, 144),
                "final_logit_softcapping": (None, 3.0),
                "hidden_activation": ("gelu_pytorch_tanh",),
                "use_bidirectional_attention": (False,),
            }
        if family == "gemma2":
            choices |= {"attn_logit_softcapping": (None, 2.0)}
        draw_windows(draw, fields, layers)
    for name, values in choices.items():
        sometimes(draw, fields, name, *values)
    draw_positions(draw, fields, head_dim)
    return fields


def draw_windows(draw, fields, layers):
    family = FAMILIES[fields["model_type"]]
    if family.windows == "none":
        return
    sometimes(draw, fields, "sliding_window", 7, *([] if family.window_period > 1 else [None]))
    if "use_sliding_window" in family.window_fields:
        sometimes(draw, fields, "use_sliding_window", True, True, False)
        sometimes(draw, fields, "max_window_layers", 0, 1)
    if "sliding_window_size" in family.window_fields:
        sometimes(draw, fields, "sliding_window_size", fields.get("sliding_window", 4096))
    if "sliding_window_pattern" in family.window_fields:
        sometimes(draw, fields, "sliding_window_pattern", 2, 3)
    windowed = fields.get("use_sliding_window", family.window_period > 1) and fields.get("sliding_window", 1)
    if family.windows == "layers" and draw(st.booleans()):
        kinds = ("full_attention", "sliding_attention") if windowed else ("full_attention",)
        fields["layer_types"] = [draw(st.sampled_from(kinds)) for _ in range(layers)]


def draw_positions(draw, fields, head_dim):
    """Rotary positions as transformers 5 writes them, as older ones did, or both at once."""
    family = fields["model_type"]
    share = 1.0
    base_field = "rotary_emb_base" if family == "gpt_neox" else "rope_theta"
    sometimes(draw, fields, base_field, 500.0)
    inside = {}
    if family == "gpt_neox":
        sometimes(draw, fields, "rotary_pct", 0.5, 1.0)
        sometimes(draw, inside, "partial_rotary_factor", 0.5, 1.0)
        share = fields.get("rotary_pct", 0.25)
    sometimes(draw, inside, "rope_theta", 300.0)
    kind = draw(st.sampled_from(("default", "linear", "llama3", "yarn", "longrope")))
    if kind in ("llama3", "yarn", "longrope"):
        sometimes(draw, inside, "original_max_position_embeddings", 16)
        if family != "gemma3_text":
            sometimes(draw, fields, "original_max_position_embeddings", 16)
    if kind == "llama3":
        inside |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind != "default":
        inside["factor"] = 8.0
    if kind == "yarn":
        names = {"beta_fast": (8.0,), "beta_slow": (2,), "attention_factor": (1.5,), "mscale": (1.0,)}
        for name, values in (names | {"mscale_all_dim": (0.5,)}).items():
            sometimes(draw, inside, name, *values)
        if family != "gemma3_text":
            sometimes(draw, inside, "truncate", True, False)
    if kind == "longrope":
        pairs = int(head_dim * inside.get("partial_rotary_factor", share)) // 2
        inside |= {"short_factor": [1 + i / 8 for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
        sometimes(draw, inside, "attention_factor", 1.25)
        if draw(st.booleans()):
            del inside["factor"]
    spelling = draw(st.sampled_from(("new", "old", "both", "none")))
    is_short = draw(st.booleans()) and (family != "gemma3_text" or spelling == "new")
    inside["type" if is_short else "rope_type"] = kind
    if family == "gemma3_text":
        sometimes(draw, fields, "rope_local_base_freq", 50.0)
        local = {"rope_type": "default"}
        sometimes(draw, local, "rope_theta", 20.0)
        nested = {"full_attention": {} if spelling == "both" else inside, "sliding_attention": local}
        if spelling in ("new", "both"):
            fields["rope_parameters"] = nested
        if spelling in ("old", "both"):
            fields["rope_scaling"] = inside
        return
    if spelling in ("new", "both"):
        fields["rope_parameters"] = {"rope_type": "default"} if spelling == "both" else inside
    if spelling in ("old", "both"):
        fields["rope_scaling"] = inside


SHAPE = {"num_layers": 2, "num_heads": 4, "ffn_dim": 56, "context_length": 64, "vocab_size": 40}
CHOICES = {
    "model_dim": (32, 32, 34),
    "num_kv_heads": (None, 1, 2),
    "head_dim": (None, 12),
    "tie_embeddings": (True, False),
    "norm_epsilon": (1e-5, 1e-3),
    "qkv_bias": (None, True, False),
    "rope_scaling": ("none", "linear", "llama3", "yarn", "longrope"),
    "rope_fraction": (1.0, 0.5),
    "rope_local_base": (None, 50.0),
    "rope_scale_local": (True, False),
    "rope_original_length": (16, 64),
    "rope_truncate": (True, False),
    "rope_attention_factor": (None, 1),
    "attention_pattern": (("dense",), ("local",), ("dense", "local")),
    "query_scale_dim": (None, 20, 6.5),
}
ODD = {
    "norm_zero_centered": (True,),
    "norm_position": ("both", "pre"),
    "positions": ("rope", "learned", "none"),
    "bias": (True, False),
    "ffn_bias": (True, False),
    "qk_norm": (True, False),
    "parallel_residual": (True,),
    "attention_softcap": (2,),
    "logit_softcap": (3.0,),
    "head_bias": (True,),
    "scale_embedding": (True,),
}
"""What decides which family a model is of: most are as one of them has it."""


@st.composite
def models(draw, name):
    """A model like a family's, or nearly so."""
    family = FAMILIES[name]
    fields = {**SHAPE, "attention_window": 7, "rope_factor": 8.0, **family.fixed}
    for field, values in CHOICES.items():
        if field not in family.fixed:
            sometimes(draw, fields, field, *values)
    for field in family.fields:
        if field.ours == "feed_forward":
            fields["feed_forward"] = draw(st.sampled_from([*field.values.values()]))
    for field in draw(st.lists(st.sampled_from([*ODD]), max_size=1)):
        sometimes(draw, fields, field, *ODD[field])
    fields.setdefault("model_dim", 32)
    if fields["model_dim"] % 4:
        fields["head_dim"] = 12
    fields.setdefault("bias", fields.get("qkv_bias") or False)
    if fields.get("norm_position") == "both":
        fields["parallel_residual"] = False
    if fields.get("rope_scaling") not in ("yarn", "longrope"):
        fields["rope_attention_factor"] = None
    pairs = int((fields.get("head_dim") or 8) * fields.get("rope_fraction", 1.0)) // 2
    if fields.get("rope_scaling") == "longrope":
        numbers = tuple(1.0 + i for i in range(pairs))
        fields |= {"rope_short_factors": numbers, "rope_long_factors": numbers[::-1]}
    return ModelConfig(**fields, compute_dtype="float32")
