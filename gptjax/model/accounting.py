"""What a model costs: parameters, floating-point operations, memory and traffic, each with its formula."""

from typing import NamedTuple

from gptjax.config import MeshConfig, ModelConfig
from gptjax.model.devices import of_kind
from gptjax.tuning_config import LoraConfig


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, without the padding of the vocabulary; `total` is their sum."""
    D, F, H = config.model_dim, config.resolved_ffn_dim, config.resolved_head_dim
    N, K, L, V = config.num_heads, config.resolved_num_kv_heads, config.num_layers, config.vocab_size
    bias, qkv_bias, ffn_bias = map(int, (config.bias, config.resolved_qkv_bias, config.resolved_ffn_bias))
    norm = D * (2 if config.norm == "layernorm" and config.norm_bias else 1)
    up = 2 if config.gated else 1
    attention = 2 * D * N * H + 2 * D * K * H + qkv_bias * (N * H + 2 * K * H) + bias * D
    attention += 2 * H if config.qk_norm else 0
    parts = {
        "embedding": V * D,
        "positions": config.context_length * D if config.positions == "learned" else 0,
        "attention": L * attention,
        "feed_forward": L * ((up + 1) * D * F + ffn_bias * (up * F + D)),
        "norms": num_norms(config) * norm,
        "head": (0 if config.tie_embeddings else V * D) + (V if config.head_bias else 0),
    }
    if config.value_head:
        parts["value_head"] = D + 1
    return parts | {"total": sum(parts.values())}


def num_norms(config: ModelConfig) -> int:
    """Of the residual stream: two or four a block, and one before the head."""
    return config.num_layers * (4 if config.norm_position == "both" else 2) + (config.norm_position != "post")


def adapter_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Numbers of a model's low-rank adapters."""
    D, F, H = config.model_dim, config.resolved_ffn_dim, config.resolved_head_dim
    N, K = config.num_heads * H, config.resolved_num_kv_heads * H
    sizes = {"q": D + N, "k": D + K, "v": D + K, "out": N + D, "up": D + F, "down": F + D}
    if config.gated:
        sizes["gate"] = D + F
    return config.num_layers * lora.rank * sum(size for name, size in sizes.items() if name in lora.targets)


def hidden_weights(config: ModelConfig) -> int:
    """Those of the blocks' matrices: what Muon owns, and what every token is multiplied with but the head."""
    D, F, H = config.model_dim, config.resolved_ffn_dim, config.resolved_head_dim
    N, K = config.num_heads, config.resolved_num_kv_heads
    return config.num_layers * (2 * D * N * H + 2 * D * K * H + (3 if config.gated else 2) * D * F)


class FlopsPerToken(NamedTuple):
    """Floating-point operations of one token's training step, forward and backward."""

    matmuls: int
    """6 per weight that is multiplied with (Kaplan et al. 2020): the head counts, the embedding look-up does not.
    4 where the weight is not trained, and 2 in what no gradient has to come through."""
    attention: int
    """12 · H · N per layer and key that a query could see without the causal mask: 12 L D T for dense attention."""
    attention_causal: int
    """The same with only the keys at or before the query: about half."""

    @property
    def total(self) -> int:
        """What MFU means here and in nanoGPT and PaLM: the causal half is not subtracted."""
        return self.matmuls + self.attention

    @property
    def total_causal(self) -> int:
        """What an ideal kernel that skips masked keys computes."""
        return self.matmuls + self.attention_causal


def training_flops_per_token(
    config: ModelConfig, num_tokens: int | None = None, lora: LoraConfig | None = None, values: bool = False
) -> FlopsPerToken:
    """FLOPs of a training step per token, for sequences of `num_tokens` (None: context_length).

    Recomputation (remat) is not counted: model FLOPs are those the mathematics needs. With adapters (Hu et al. 2021)
    it needs no gradient of the weights that they adapt, and none of the first block's input.

    Args:
        lora: adapters, which are trained in place of the weights; None, or of rank 0: all weights are.
        values: whether the head makes one number, as that of a critic or reward model does.
    """
    D, N, H, T = config.model_dim, config.num_heads, config.resolved_head_dim, num_tokens or config.context_length
    head = D if values else config.vocab_size * D
    matmuls = 6 * (hidden_weights(config) + head)
    if lora is not None and lora.rank:
        first_inputs = D * H * (N + 2 * config.resolved_num_kv_heads)
        frozen = hidden_weights(config) + (0 if values else head)
        matmuls += 6 * adapter_parameters(config, lora) - 2 * (frozen + first_inputs)
    full = causal = 0.0
    for window in config.layer_windows:
        seen = min(T, window or T)
        full += seen
        causal += (seen * (seen + 1) / 2 + (T - seen) * seen) / T  # mean over queries of min(position + 1, window)
    return FlopsPerToken(matmuls, round(12 * N * H * full), round(12 * N * H * causal))


class Traffic(NamedTuple):
    """Bytes that one device gets from collectives, or of reduce-scatters puts in, in one micro-batch's passes."""

    parameters: int
    """All-gather of stored parameters, where fsdp or context split them: matrices of blocks for each pass anew."""
    gradients: int
    """All-reduce of gradients, where devices see different tokens (fsdp: with the slice after it a reduce-scatter)."""
    activations: int
    """All-reduce of activations, where tensor splits matrices: two for each block and pass."""
    keys_values: int
    """All-gather of keys and values in the forward pass, and as many bytes scattered in the backward pass."""


def traffic(config: ModelConfig, mesh: MeshConfig, batch_size: int, num_tokens: int | None = None) -> Traffic:
    """What a training step of `batch_size` sequences of `num_tokens` T (None: context_length C) sends with `remat`
    none, by these formulas.

    With f = fsdp · context, t = tensor, c bytes of the compute type, R rows and S tokens of each on a device:

    - parameters (f > 1): 2 c M/t + 4 v, of M weights in blocks' matrices and v norms and biases; the embedding
      4 V D/t where it is looked up and c V D/t where it is the head (once, if both are float32); positions 4 C D.
    - gradients (data · f > 1): 4 (M + 2 V D)/t + 4 v + 4 C D, in float32 whatever the compute type, the embedding and
      the head each alone even if they are tied. Where both rows and sequences are split, the last two terms twice: XLA
      adds up one dimension after the other.
    - activations (t > 1): c R S D (4 L + 1), 4 R S D for the look-up and 12 R S for the loss.
    - keys and values (context > 1): 2 c L R T K H / t.
    """
    D, F, H = config.model_dim, config.resolved_ffn_dim, config.resolved_head_dim
    T = num_tokens or config.context_length
    N, K, L, V = config.num_heads, config.resolved_num_kv_heads, config.num_layers, config.padded_vocab_size
    t, c = mesh.tensor, 2 if config.compute_dtype == "bfloat16" else 4
    matrices = hidden_weights(config) // t
    norm = D * (2 if config.norm == "layernorm" and config.norm_bias else 1)
    stored = num_norms(config) * norm + L * D * (config.bias + config.resolved_ffn_bias)
    whole = L * config.resolved_qkv_bias * (N * H + 2 * K * H) // t
    whole += L * config.resolved_ffn_bias * F * (2 if config.gated else 1) // t
    whole += (L * 2 * H if config.qk_norm else 0) + (V // t if config.head_bias else 0)
    table, head = 4 * V * D // t, c * V * D // t  # as they are gathered; both have float32 gradients
    positions = 4 * config.context_length * D if config.positions == "learned" else 0
    once = 0 if config.tie_embeddings and c == 4 else head
    rows, tokens = batch_size // (mesh.data * mesh.fsdp), T // mesh.context
    batch, split = mesh.data * mesh.fsdp > 1, mesh.context > 1
    return Traffic(
        2 * c * matrices + 4 * stored + table + once + positions if mesh.fsdp * mesh.context > 1 else 0,
        (batch or split) * (4 * matrices + 2 * table) + (batch + split) * (4 * (stored + whole) + positions),
        rows * tokens * ((4 * L + 1) * c * D + 4 * D + 12) if t > 1 else 0,
        2 * c * L * rows * T * K * H // t if split else 0,
    )


class Memory(NamedTuple):
    """Bytes of one device: a bound and an estimate."""

    least: int
    """What no compiler can do without."""
    likely: int
    """What the program asks for."""


def activation_bytes(
    config: ModelConfig,
    mesh: MeshConfig,
    batch_size: int,
    chunk_tokens: int = 0,
    *,
    num_tokens: int | None = None,
    quadratic: bool = False,
) -> Memory:
    """What a device holds of a micro-batch of `batch_size` sequences of `num_tokens` T (None: context_length) when its
    backward pass begins.

    With R rows and S of their T tokens on a device, t = tensor and c bytes of the compute type, each block keeps c R S
    times what its products and norms start from, after Korthikanti et al. 2022 (whose 34 s b h are these, for F = 4 D
    and c = 2, and 2 s b h for masks of dropout, which are not counted):

    - none: 4 D + (2 N H + 2 K H + U F + F)/t, where U is 2 if gated, else 1. Of these the two norms' results and that
      of the activation can be computed again from the others, so that `least` has 2 D + (2 N H + 2 K H + U F)/t.
      To `likely` JAX adds what derivatives start from: U F/t of the activation, and, with rotary positions or
      normalized queries and keys, (N H + K H)/t. A kernel that is quadratic adds its weights, N T/t, and `likely` once
      their gradient.
    - full: D, the block's input. save_attention: D + N H/t and, if the kernel is not quadratic, a float32 log-sum-exp
      of each head. save_dots: 2 D + (N H + 2 K H + U F)/t, and N H/t if it is not quadratic. offload: nothing.

    After the blocks the final norm keeps 2 c R S D, and the loss c R S V/t of logits, in `likely` twice, as their
    gradient stands beside them; of a chunk if it is chunked. What one block computes again comes when these are gone,
    so that of the two the larger counts.
    """
    D, F, H = config.model_dim, config.resolved_ffn_dim, config.resolved_head_dim
    T = num_tokens or config.context_length
    N, K = config.num_heads, config.resolved_num_kv_heads
    t, c = mesh.tensor, 2 if config.compute_dtype == "bfloat16" else 4
    shards = mesh.data * mesh.fsdp * mesh.context
    tokens = batch_size * T / shards
    up = F * (2 if config.gated else 1)
    square = N * T / t if quadratic else 0
    block_least = 2 * D + (2 * N * H + 2 * K * H + up) / t + square
    rotated = (N * H + K * H) / t if config.qk_norm or config.positions == "rope" else 0
    block = block_least + 2 * D + (F + up) / t + rotated + square
    kept = {
        "full": D,
        "save_dots": 2 * D + (N * H * (1 if quadratic else 2) + 2 * K * H + up) / t,
        "save_attention": D + N * H / t + (0 if quadratic else 4 / c * N / t),
        "offload": 0,
    }
    logits = logits_bytes(config, mesh, batch_size, chunk_tokens, num_tokens=T)
    if config.remat == "none":
        least, likely, last = config.num_layers * block_least, config.num_layers * (block - square) + square, logits
    else:
        least = likely = config.num_layers * kept[config.remat]
        last = max(logits, c * tokens * block)
    return Memory(
        int(c * (tokens * least + tokens * D) + logits / 2), int(c * (tokens * likely + 2 * tokens * D) + last)
    )


def logits_bytes(
    config: ModelConfig, mesh: MeshConfig, batch_size: int, chunk_tokens: int = 0, *, num_tokens: int | None = None
) -> int:
    """Logits and their gradient of a micro-batch, or of a chunk of the loss, on one device, in the compute type."""
    shards = mesh.data * mesh.fsdp * mesh.context
    tokens = batch_size * (num_tokens or config.context_length) / shards
    tokens = min(tokens, max(chunk_tokens, 1) / shards) if chunk_tokens else tokens
    width = 2 if config.compute_dtype == "bfloat16" else 4
    return int(2 * width * tokens * config.padded_vocab_size / mesh.tensor)


def cache_elements(config: ModelConfig, batch_size: int, num_slots: int, call_tokens: int = 1) -> int:
    """Keys and values that a cache for `num_slots` tokens a row holds; a layer with a window has a ring of slots."""
    slots = sum(min(num_slots, (window or num_slots) + call_tokens - 1) for window in config.layer_windows)
    return 2 * batch_size * slots * config.resolved_num_kv_heads * config.resolved_head_dim


def decode_bytes(config: ModelConfig, batch_size: int, length: float, weight_bytes: float, cache_bytes: float) -> float:
    """What one step of decoding has to read: each weight once, and the keys and values of `length` tokens of each row.

    Args:
        length: tokens of a row, of a whole generation their mean.
        weight_bytes: of one weight.
        cache_bytes: of one number of a key or value.
    """
    counts = parameter_counts(config)
    looked_up = counts["positions"] + (0 if config.tie_embeddings else counts["embedding"])
    seen = sum(min(length, window or length) for window in config.layer_windows)
    cache = 2 * batch_size * seen * config.resolved_num_kv_heads * config.resolved_head_dim
    return (counts["total"] - looked_up) * weight_bytes + cache * cache_bytes


def peak_bandwidth(device_kind: str) -> float | None:
    """Bytes per second of one device's memory, or None where the table does not know it."""
    device = of_kind(device_kind)
    return None if device is None else device.bytes_per_second


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak of one device for matrix products in this type, or None where the table does not know it."""
    device = of_kind(device_kind) if dtype == "bfloat16" else None
    return None if device is None else device.flops


def mfu(tokens_per_second: float, flops_per_token: float, num_devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilization (PaLM, Chowdhery et al. 2022) as a fraction; None where the peak is unknown."""
    return None if peak is None else tokens_per_second * flops_per_token / (num_devices * peak)
