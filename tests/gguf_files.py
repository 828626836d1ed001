"""GGUF files as llama.cpp's converter makes them, of Hugging Face directories."""

from pathlib import Path

import gguf
import numpy as np

from gptjax.interop.gguf import GEMMA_NAMES, NAMES
from gptjax.interop.places import read_values
from gptjax.interop.tensor_files import TensorFiles
from gptjax.text.chat import CHATML
from gptjax.text.tokenizer import Tokenizer


def side_by_side(values: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Llama's queries and keys."""
    return values.reshape(num_heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(directory: Path, path: Path, architecture: str, *, quantized: bool = False, **changes) -> None:
    """A Hugging Face directory as the file that llama.cpp's converter makes of it.

    Args:
        quantized: matrices are of type Q8_0, else float32.
        changes: metadata that are others; None leaves one out.
    """
    values, files = read_values(directory), TensorFiles(directory)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    gemma = architecture.startswith("gemma")
    names = {theirs: ours for ours, theirs in (GEMMA_NAMES if gemma else NAMES).items()}
    rope = values["rope_parameters"]
    metadata = {
        "block_count": values["num_hidden_layers"],
        "context_length": values["max_position_embeddings"],
        "embedding_length": values["hidden_size"],
        "feed_forward_length": values["intermediate_size"],
        "attention.head_count": values["num_attention_heads"],
        "attention.head_count_kv": values["num_key_value_heads"],
        "attention.key_length": values.get("head_dim", values["hidden_size"] // values["num_attention_heads"]),
        "attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    }
    if gemma:
        metadata["attention.sliding_window"] = values["sliding_window"]
    if architecture == "gemma2":
        metadata |= {name: values[name] for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    metadata = {f"{architecture}.{name}": value for name, value in metadata.items()}
    vocabulary = {i: token for token, i in tokenizer._vocab.items()}
    special = set(tokenizer.special_token_ids.values())
    metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [vocabulary[i] for i in range(tokenizer.vocab_size)],
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(tokenizer.vocab_size)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer._merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }
    metadata |= {name.replace("__", "."): value for name, value in changes.items()}
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", architecture))
    for name, value in metadata.items():
        put = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        if value is not None:
            getattr(writer, f"add_{put[type(value)]}")(name, value)
    for name in files.infos:
        tensor = np.asarray(files.open(name), np.float32)
        stem, _, end = name.rpartition(".")
        block, kind = ("", stem) if not stem.startswith("model.layers.") else stem.split(".", 3)[2:]
        if gemma and name.endswith("norm.weight"):
            tensor = tensor + 1
        if architecture == "llama" and kind in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = side_by_side(tensor, values[f"num_{'attention' if 'q_' in kind else 'key_value'}_heads"])
        type_ = gguf.GGMLQuantizationType.Q8_0 if quantized and tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        ours = f"{f'blk.{block}.' if block else ''}{names[kind]}.{end}"
        writer.add_tensor(ours, gguf.quantize(np.ascontiguousarray(tensor), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
