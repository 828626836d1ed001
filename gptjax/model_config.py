"""The model's section of a configuration: the shape of the Transformer, and how it is computed. See `config.py`."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from gptjax.checks import require, require_range, require_types

VOCAB_MULTIPLE = 128  # tensor cores and shardings like a head whose width this divides


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the Transformer, and how it is computed."""

    init_from: str = ""
    """Run or Hugging Face directory whose parameters, shape and tokenizer are the start. Empty: they are drawn."""
    init_embeddings: str = ""
    """Word vectors (word2vec or GloVe) with which tokens begin whose text they have. Empty: all are drawn."""
    num_layers: int = 12
    """Transformer blocks."""
    model_dim: int = 768
    """Width of the residual stream."""
    num_heads: int = 12
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads: fewer than num_heads is grouped-query attention. None: num_heads."""
    head_dim: int | None = None
    """Width of one head. None: model_dim / num_heads."""
    ffn_dim: int | None = None
    """Width of the feed-forward layer. None: 4 model_dim; gated ones 8/3 model_dim, rounded up to 128."""
    context_length: int = 1024
    """Most tokens that the model reads at once. training.sequence_length: those of the rows that it learns from."""
    vocab_size: int | None = None
    """Tokens the model knows. None: the tokenizer's."""

    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalization of the residual stream."""
    norm_position: Literal["pre", "post", "both"] = "pre"
    """Before each sublayer (GPT-2), after its residual addition (GPT-1), or before each and at its end (Gemma)."""
    norm_bias: bool = True
    """Whether LayerNorm has a bias."""
    norm_zero_centered: bool = False
    """Norms multiply by 1 + scale, whose start is 0 (Gemma)."""
    norm_epsilon: float = 1e-5
    """Added to the variance before the square root."""
    positions: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    """How the model knows the order of tokens."""
    rope_base: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_fraction: float = 1.0
    """Share of each head that is rotated."""
    rope_local_base: float | None = None
    """Base of local layers. None: rope_base."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    """How positions reach past the context they were made for: all wavelengths longer, or the long ones more."""
    rope_scale_local: bool = False
    """Whether rope_scaling holds for local layers, too, whose window may never reach that far."""
    rope_factor: float = 1.0
    """By how much rope_scaling makes wavelengths longer."""
    rope_original_length: int = 8192
    """Context that llama3, yarn and longrope start from, in tokens."""
    rope_low_frequency: float = 1.0
    """Wavelengths that fit fewer times into it become rope_factor times as long, under llama3 and yarn."""
    rope_high_frequency: float | None = None
    """Those that fit more often stay as they are; between the two lies a transition. None: 4, or 32 under yarn."""
    rope_truncate: bool = True
    """Round yarn's transition outward to whole pairs of dimensions."""
    rope_attention_factor: float | None = None
    """Rotated queries and keys are multiplied by this under yarn and longrope. None: what their papers say."""
    rope_short_factors: tuple[float, ...] = ()
    """By how much longrope makes each wavelength longer where context_length is at most rope_original_length."""
    rope_long_factors: tuple[float, ...] = ()
    """By how much where context_length is more, for texts of any length."""
    feed_forward: Literal["relu", "gelu_tanh", "gelu", "relu2", "swiglu", "geglu"] = "gelu_tanh"
    """Activation of the feed-forward layer; swiglu and geglu are gated."""
    attention_pattern: tuple[Literal["dense", "local"], ...] = ("dense",)
    """Repeated over the layers; a local layer sees only the last attention_window tokens."""
    attention_window: int = 256
    """Tokens that a local layer sees, its own included."""
    parallel_residual: bool = False
    """Attention and feed-forward both start from the block's input (GPT-J, GPT-NeoX)."""
    query_scale_dim: float | None = None
    """Attention logits are divided by the root of this. None: head_dim."""
    qk_norm: bool = False
    """RMS-normalize each query and key head."""
    attention_softcap: float = 0.0
    """Attention logits are bounded to ± this by tanh. 0: off."""
    logit_softcap: float = 0.0
    """Output logits are bounded to ± this by tanh. 0: off."""
    bias: bool = True
    """Whether the linear layers of the blocks have biases."""
    qkv_bias: bool | None = None
    """Whether those of queries, keys and values have. None: bias."""
    ffn_bias: bool | None = None
    """Whether those of the feed-forward layer have. None: bias."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head."""
    head_bias: bool = False
    """Whether the output head has a bias."""
    value_head: bool = False
    """A linear layer from the last hidden states to one number: of a reward model, or of PPO's critic."""
    scale_embedding: bool = False
    """Multiply token embeddings by sqrt(model_dim), as the original Transformer does."""
    embedding_dropout: float = 0.0
    """Dropout after the embeddings."""
    attention_dropout: float = 0.0
    """Dropout of attention weights."""
    residual_dropout: float = 0.0
    """Dropout of each sublayer's output."""
    initializer_std: float = 0.02
    """Standard deviation of initial weights; residual projections get it over sqrt(2 num_layers)."""
    parametrization: Literal["standard", "mup", "completep"] = "standard"
    """What size does to initialization and rates: with mup settings suit every width, with completep every depth."""
    base_model_dim: int = 256
    """Width at which the settings of mup and completep are those that are written here."""
    base_num_layers: int = 4
    """Depth at which those of completep are."""
    base_head_dim: int = 64
    """Head width at which those of mup and completep are."""

    scan_layers: bool = False
    """Compile one block and loop over layers (quick to compile) instead of unrolling them (quick to run)."""
    remat: Literal["none", "full", "save_dots", "save_attention", "offload"] = "none"
    """Recomputed in the backward pass: nothing, blocks, or all but products or attention; offload keeps on the host."""
    attention_kernel: Literal["auto", "xla", "blockwise", "cudnn", "tokamax"] = "auto"
    """What computes attention in training. auto: the fastest that can on this device, as said at the start."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of activations; parameters are always float32. None: float32 on CPU, else bfloat16."""
    fp8: bool = False
    """Train q, k, v and feed-forward in 8-bit products (Ada, Hopper and later); MFU stays a share of bf16's peak."""

    def __post_init__(self):
        if isinstance(self.attention_pattern, str):
            object.__setattr__(self, "attention_pattern", (self.attention_pattern,))
        require_types("model.", self)
        require_range(
            "model.",
            self,
            1,
            math.inf,
            *("num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "ffn_dim"),
            *("context_length", "vocab_size", "attention_window", "rope_original_length", "rope_factor"),
            *("base_model_dim", "base_num_layers", "base_head_dim"),
        )
        require_range("model.", self, 0, math.inf, "attention_softcap", "logit_softcap", "initializer_std")
        require_range("model.", self, 1e-6, math.inf, "query_scale_dim", "rope_low_frequency", "rope_attention_factor")
        require_range("model.", self, 0, 1, "rope_fraction")
        require_range("model.", self, 0, 0.99, "embedding_dropout", "attention_dropout", "residual_dropout")
        require(
            not (self.init_from and self.init_embeddings),
            f"model.init_from {self.init_from} has embeddings; leave model.init_embeddings out",
        )
        if self.head_dim is None:
            divisors = [n for n in range(1, self.model_dim + 1) if self.model_dim % n == 0]
            nearest = min(divisors, key=lambda n: (abs(n - self.num_heads), n))
            require(
                self.model_dim % self.num_heads == 0,
                f"model.model_dim {self.model_dim} is not divisible by model.num_heads {self.num_heads}; "
                f"the nearest number of heads that works is {nearest}",
            )
        if self.num_kv_heads is not None:
            require(
                self.num_heads % self.num_kv_heads == 0,
                f"model.num_kv_heads {self.num_kv_heads} does not divide model.num_heads {self.num_heads}",
            )
        require(
            self.parametrization != "completep" or self.norm_position == "pre",
            "model.parametrization completep divides what sublayers add by the depth, which model.norm_position post "
            "would undo; pre works",
        )
        require(len(self.attention_pattern) > 0, "model.attention_pattern is empty; the usual one is dense")
        require(
            self.rope_low_frequency < self.resolved_rope_high_frequency,
            f"model.rope_low_frequency {self.rope_low_frequency:g} is not below model.rope_high_frequency "
            f"{self.resolved_rope_high_frequency:g}",
        )
        require(
            not self.parallel_residual or self.norm_position == "pre",
            f"model.parallel_residual has no norms after its sublayers, and model.norm_position is "
            f"{self.norm_position}; pre works",
        )
        if self.positions == "rope":
            require(
                self.rotary_dim % 2 == 0,
                f"model.rope_fraction {self.rope_fraction:g} of head_dim {self.resolved_head_dim} rotates "
                f"{self.rotary_dim} dimensions, which must be an even number",
            )
        self._require_rope_scaling()

    def _require_rope_scaling(self) -> None:
        require(
            self.rope_attention_factor in (None, 1) or self.rope_scaling in ("yarn", "longrope"),
            f"model.rope_attention_factor {self.rope_attention_factor} is for model.rope_scaling yarn and longrope, "
            f"not {self.rope_scaling}",
        )
        require(
            self.rope_scaling != "yarn" or self.rope_base > 1,
            f"model.rope_base is {self.rope_base:g}, but must be more than 1 for model.rope_scaling yarn",
        )
        if self.rope_scaling == "longrope":
            require_range("model.", self, 2, math.inf, "rope_original_length")
            for name in ("rope_short_factors", "rope_long_factors"):
                factors, pairs = getattr(self, name), self.rotary_dim // 2
                require(
                    len(factors) == pairs and all(factor > 0 for factor in factors),
                    f"model.{name} must be {pairs} numbers above 0, one for each pair of the {self.rotary_dim} "
                    f"dimensions that are rotated, and is {list(factors)}",
                )

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def resolved_num_kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def resolved_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def resolved_ffn_bias(self) -> bool:
        return self.bias if self.ffn_bias is None else self.ffn_bias

    @property
    def resolved_query_scale_dim(self) -> float:
        return self.query_scale_dim or float(self.resolved_head_dim)

    @property
    def resolved_rope_local_base(self) -> float:
        return self.rope_local_base or self.rope_base

    @property
    def resolved_rope_high_frequency(self) -> float:
        return self.rope_high_frequency or (32.0 if self.rope_scaling == "yarn" else 4.0)

    @property
    def resolved_rope_attention_factor(self) -> float:
        """Of YaRN (Peng et al. 2023) and LongRoPE (Ding et al. 2024); 1 where rope_scaling is another."""
        if self.rope_attention_factor is not None:
            return self.rope_attention_factor
        if self.rope_scaling == "yarn":
            return 0.1 * math.log(self.rope_factor) + 1
        if self.rope_scaling == "longrope":
            return math.sqrt(1 + math.log(self.rope_factor) / math.log(self.rope_original_length))
        return 1.0

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer multiplies two projections (Shazeer 2020)."""
        return self.feed_forward in ("swiglu", "geglu")

    @property
    def resolved_ffn_dim(self) -> int:
        if self.ffn_dim is not None:
            return self.ffn_dim
        return 128 * math.ceil(self.model_dim * 8 / 3 / 128) if self.gated else 4 * self.model_dim

    def filled(self) -> "ModelConfig":
        """The same model with every field filled that is derived from others of it."""
        names = [field.name for field in fields(self) if hasattr(self, f"resolved_{field.name}")]
        return replace(self, **{name: getattr(self, f"resolved_{name}") for name in names})

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that RoPE rotates."""
        return int(self.resolved_head_dim * self.rope_fraction)

    @property
    def padded_vocab_size(self) -> int:
        """Columns of the output head: vocab_size rounded up to a multiple of 128."""
        require(self.vocab_size is not None, "model.vocab_size is not known before the tokenizer is")
        return VOCAB_MULTIPLE * math.ceil(self.vocab_size / VOCAB_MULTIPLE)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """For each layer the number of tokens it sees, or None where it sees them all."""
        pattern = [self.attention_window if kind == "local" else None for kind in self.attention_pattern]
        return tuple(pattern[layer % len(pattern)] for layer in range(self.num_layers))
