"""GGUF files (llama.cpp's), in the terms of a Hugging Face directory: fields, tensors by name, tokenizer, template.

The `gguf` package reads them and dequantizes every type. What llama.cpp's converter did to the weights is undone here:
Llama's queries and keys come back in the order of rotated halves, and Gemma's norms without the one that was added.

Shape suffixes: N heads, F outputs, H half of a head.
"""

import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from gptjax.errors import UserError
from gptjax.interop import gguf_tokenizer

MAGIC = b"GGUF"
MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
"""Of each architecture that can be read, what Hugging Face calls it."""
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""What stands under both names with the same value."""
NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
READ_OTHERWISE = {
    *("vocab_size", "attention.value_length", "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = NAMES | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FREQUENCIES = "rope_freqs.weight"
"""By what Llama 3.1 and later divide the frequency of each pair of dimensions."""
WIDE_QUERIES = {("gemma2", 46), ("gemma3", 62)}
"""The two largest Gemmas, by architecture and layers, scale queries by the width of the model over its heads."""


CHUNK_NUMBERS = 2**22
"""What is dequantized at a time."""


class Info(NamedTuple):
    """A tensor, as Hugging Face has it."""

    shape: tuple[int, ...]
    inside: str
    """Its name in the file."""


def is_gguf(path: Path) -> bool:
    """Whether a file is one, or is called so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC or path.suffix == ".gguf"


class GgufFile:
    """A model in one file, of which no tensor is read before it is asked for."""

    def __init__(self, path: Path):
        """
        Raises:
            UserError: the file is damaged or foreign, has an architecture or a field that is not known here, or the
                `gguf` package is missing.
        """
        self.directory = path
        metadata, self._tensors = _read(path)
        self._metadata = {name: value for name, value in metadata.items() if name.startswith("tokenizer.")}
        self.config_json = _config(path, metadata, self._tensors)
        """What `config.json` would say."""
        self.infos = self._infos()
        """Tensors by the names that Hugging Face has for them."""
        self.tokenizer_config = gguf_tokenizer.config_of(self._metadata)
        """What `tokenizer_config.json` would say."""
        self.generation_config = gguf_tokenizer.generation_of(self._metadata)
        """What `generation_config.json` would say."""

    def open(self, name: str) -> np.ndarray:
        """A tensor, float32, as Hugging Face has it.

        Raises:
            UserError: its type cannot be dequantized.
        """
        import gguf

        shape, inside = self.infos[name]
        tensor, values = self._tensors[inside], np.empty(shape, np.float32)
        rows = max(1, CHUNK_NUMBERS * shape[0] // values.size)
        try:
            for start in range(0, shape[0], rows):  # the package makes copies of what it works on
                piece = tensor.data[start : start + rows]
                values[start : start + rows] = gguf.dequantize(piece, tensor.tensor_type).reshape(-1, *shape[1:])
        except NotImplementedError as error:
            raise UserError(
                f"{self.directory}: {inside} is of type {tensor.tensor_type.name}, which the gguf package cannot "
                "dequantize; F32, F16, BF16, Q8_0 and Q4_K can be"
            ) from error
        if self.config_json["model_type"].startswith("gemma") and name.endswith("norm.weight"):
            return values - 1
        if self.config_json["model_type"] == "llama" and (kind := re.search(r"self_attn\.([qk])_proj", name)):
            heads = self.config_json["num_attention_heads" if kind[1] == "q" else "num_key_value_heads"]
            return halves(values, heads)
        return values

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer, for the library that runs it.

        Raises:
            UserError: it is of a kind, or splits words in a way, that is not known here.
        """
        return gguf_tokenizer.build(self.directory, self._metadata)

    def _infos(self) -> dict[str, Info]:
        names = GEMMA_NAMES if self.config_json["model_type"].startswith("gemma") else NAMES
        found = {}
        for inside, tensor in self._tensors.items():
            block, kind, end = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*)\.(weight|bias)", inside).groups()
            if kind not in names:
                raise UserError(
                    f"{self.directory} has the tensor {inside}, for which the {self.config_json['model_type']} model "
                    "has no place"
                )
            prefix = "" if block is None else f"model.layers.{block}."
            found[f"{prefix}{names[kind]}.{end}"] = Info(tuple(int(n) for n in tensor.shape[::-1]), inside)
        return found


def open_gguf(path: Path) -> GgufFile:
    """A file whose metadata is read once while it stays as it is: that takes seconds, and several ask for it.

    Raises:
        UserError: as `GgufFile`.
    """
    return _opened(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _opened(path: Path, changed: int) -> GgufFile:
    return GgufFile(path)


def halves(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head with the two of a rotated pair half a head apart, from rows with the two side by side."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and the tensors by their names in the file."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(f'{path} is a GGUF file, and to read one: pip install "gptjax[gguf]"') from None
    logging.getLogger("gguf").setLevel(logging.ERROR)
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] != MAGIC:
        raise UserError(f"{path} is called a GGUF file, but does not begin as one; it may be the page of a web server")
    version = int.from_bytes(start[4:], "little")
    if version not in (2, 3):
        what = "of a big-endian machine" if version > 2**16 else f"of version {version}"
        raise UserError(f"{path} is a GGUF file {what}; those that can be read are little-endian, of versions 2 and 3")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        reader.fields.clear()  # an object for each token takes much more than the file
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # of many kinds, as bytes are misread
        raise UserError(f"{path} is no GGUF file, or not a whole one: {str(error).strip() or repr(error)}") from error
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{path} is one of {metadata['split.count']} files of a model; llama.cpp's llama-gguf-split --merge makes "
            "one of them"
        )
    return metadata, {name: tensor for name, tensor in tensors.items() if not name.endswith(".rope_freqs.weight")}


def _config(path: Path, metadata: Mapping[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` would say; takes the tensor of rotary frequencies out.

    Raises:
        UserError: as `GgufFile`.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise UserError(
            f"{path} has the architecture {architecture!r}, which is none of those that can be read from GGUF files: "
            f"{', '.join(MODEL_TYPES)}"
        )
    given = {
        name.removeprefix(f"{architecture}."): value
        for name, value in metadata.items()
        if name.startswith(f"{architecture}.")
    }
    # What was 1e-6 comes back from a float32 as 1e-6.
    given = {name: float(str(np.float32(v))) if isinstance(v, float) else v for name, v in given.items()}
    if lacking := [name for name in NEEDED if name not in given]:
        raise UserError(f"{path} lacks {architecture}.{lacking[0]}, which a model cannot be made without")
    for name, value in given.items():
        if name not in FIELDS and name not in READ_OTHERWISE and value not in (0, False, "none"):
            raise UserError(
                f"{path} has {architecture}.{name} = {value}, which gptjax does not know of {architecture} models: it "
                "may change what the model computes"
            )
    if not 0 < given["block_count"] <= len(tensors):
        raise UserError(f"{path} has {len(tensors)} tensors, which are too few for {given['block_count']} layers")
    values = {"model_type": MODEL_TYPES[architecture]}
    values |= {FIELDS[name]: value for name, value in given.items() if name in FIELDS}
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if isinstance(heads, list) or isinstance(values.get("num_key_value_heads"), list):
        raise UserError(f"{path} has another number of heads in each layer, which no model of gptjax has")
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("head_dim", width // heads)
    if given.get("attention.value_length", values["head_dim"]) != values["head_dim"]:
        raise UserError(
            f"{path} has values as wide as {given['attention.value_length']}, and keys {values['head_dim']}"
        )
    if given.get("rope.dimension_count", values["head_dim"]) != values["head_dim"]:
        raise UserError(
            f"{path} rotates {given['rope.dimension_count']} of {values['head_dim']} dimensions of each head, which no "
            f"{architecture} model does"
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} lacks the tensor token_embd.weight")
    values |= {"vocab_size": int(embedding.shape[-1]), "tie_word_embeddings": "output.weight" not in tensors}
    values["rope_parameters"] = _rope(path, architecture, given, values["head_dim"], tensors)
    if architecture == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in tensors
        values["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if architecture.startswith("gemma"):
        wide = (architecture, values["num_hidden_layers"]) in WIDE_QUERIES
        values["query_pre_attn_scalar"] = width // heads if wide else values["head_dim"]
    elif values.pop("sliding_window", None):
        raise UserError(f"{path} has a window in its {architecture} layers, and does not say in which")
    if architecture == "gemma3":
        values.setdefault("sliding_window", None)
    if architecture == "gemma2":  # what llama.cpp takes where they are left out
        values = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096} | values
    return values


def _rope(
    path: Path, architecture: str, given: Mapping[str, Any], head_dim: int, tensors: dict[str, Any]
) -> dict[str, Any]:
    """What `rope_parameters` would say."""
    base = {"rope_theta": float(given.get("rope.freq_base", 1e6 if architecture == "gemma3" else 10_000.0))}
    kind = given.get("rope.scaling.type", "none")
    full = base | {"rope_type": "default"}
    if kind in ("linear", "yarn"):
        full |= {"rope_type": kind, "factor": float(given.get("rope.scaling.factor", 1.0))}
        if kind == "yarn" and "rope.scaling.original_context_length" in given:
            full["original_max_position_embeddings"] = int(given["rope.scaling.original_context_length"])
    elif kind != "none":
        raise UserError(f"{path} scales rotary positions by {kind!r}; linear, yarn and none can be read")
    frequencies = tensors.pop(ROPE_FREQUENCIES, None)
    if frequencies is not None:
        full = base | _llama3(path, np.asarray(frequencies.data, np.float32), base["rope_theta"], head_dim)
    if architecture != "gemma3":
        return full
    local = {"rope_type": "default", "rope_theta": float(given.get("rope.freq_base_swa", 10_000.0))}
    return {"full_attention": full, "sliding_attention": local}


def _llama3(path: Path, divided_H: np.ndarray, base: float, head_dim: int) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later of which these are the divisors: their files keep no more of it."""
    frequency_H = base ** (-np.arange(head_dim // 2) * 2 / head_dim)
    original, low, high, factor = 8192, 1.0, 4.0, float(np.round(divided_H.max(), 3))
    kept_H = np.clip((original * frequency_H / (2 * np.pi) - low) / (high - low), 0, 1)
    expected_H = 1 / (kept_H + (1 - kept_H) / factor)
    if divided_H.shape != expected_H.shape or not np.allclose(divided_H, expected_H, rtol=1e-3):
        raise UserError(
            f"{path} divides rotary frequencies by {divided_H.min():g} to {divided_H.max():g}, and not as Llama 3.1 "
            f"does for a context of {original} tokens"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
