"""How far models of transformers are from the same ones here: for each family a made model with odd shapes.

    python benchmarks/parity.py                    # needs torch and transformers: pip install -e '.[parity]'
    python benchmarks/parity.py --only llama gemma2 --json parity.json
    python benchmarks/parity.py --run runs/mine --text book.txt    # the exported run's perplexity of a text

`float32` and `bfloat16`: the largest difference of a logit, over the largest logit. `theirs`: that of transformers in
bfloat16 from itself in float32, for what the type alone costs. `gradient`: the largest difference of a gradient of the
mean loss, over the largest of its array. `greedy`: of 64 tokens after prompts of unequal length, in one batch, how many
are the same, at least. `keys`: weights that transformers finds missing, too many or of another shape in what is written
here. `bits`: whether they are the same after reading and writing.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from gptjax.interop import huggingface
from gptjax.interop.transfer import export_run
from gptjax.model.gpt import GPT
from gptjax.parallel.mesh import one_device_mesh
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.rows import generate_tokens
from gptjax.training.load import load_run
from gptjax.training.losses import language_model_loss

VOCAB_SIZE = 83
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 72,
    "max_position_embeddings": 128,
}
NO_HEAD_DIM = {name: value for name, value in SHAPE.items() if name != "head_dim"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "original_max_position_embeddings": 8,  # all texts here are longer: of shorter ones theirs has short_factor
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 8.0],
}
NEOX = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "max_position_embeddings": 128,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, 25 heads": (
        "GPT2",
        {"vocab_size": VOCAB_SIZE, "n_embd": 100, "n_layer": 2, "n_head": 25, "n_positions": 128},
    ),
    "gpt2, untied head": (
        "GPT2",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 100,
            "n_positions": 128,
            "tie_word_embeddings": False,
        },
    ),
    "llama": ("Llama", SHAPE | {"num_key_value_heads": 1}),
    "llama 3.1": ("Llama", SHAPE | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, yarn": ("Llama", SHAPE | {"rope_parameters": YARN}),
    "llama, longrope": ("Llama", SHAPE | {"rope_parameters": LONGROPE}),
    "llama, biases": ("Llama", SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "llama, biases of attention": ("Llama", SHAPE | {"attention_bias": True}),
    "mistral": ("Mistral", SHAPE | {"sliding_window": 7}),
    "mistral, linear": ("Mistral", SHAPE | {"sliding_window": 7, "rope_parameters": LINEAR}),
    "qwen2": ("Qwen2", NO_HEAD_DIM | {"tie_word_embeddings": True}),
    "qwen2, some local, linear": (
        "Qwen2",
        NO_HEAD_DIM
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rope_parameters": LINEAR},
    ),
    "qwen3": ("Qwen3", SHAPE),
    "qwen3, some local": ("Qwen3", SHAPE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "apertus, squared ReLU": (
        "Apertus",
        SHAPE | {"hidden_act": "relu2", "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    ),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox, serial": (
        "GPTNeoX",
        NEOX
        | {"use_parallel_residual": False, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox, no biases": ("GPTNeoX", NEOX | {"attention_bias": False}),
    "gemma2": ("Gemma2", SHAPE | {"sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "Gemma3",
        SHAPE
        | {
            "num_hidden_layers": 7,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
}
"""Of each the name that its classes in transformers begin with, and its configuration."""
NEW_TOKENS = 64
PROMPTS = [[5, 17, 2, 40, 63, 9, 11, 30, 52, 4], [33, 8], [71, 1, 60, 22, 19]]


def made(name: str) -> Any:
    """A model of transformers whose weights, norms' and biases' too, are drawn, in float32."""
    family, shape = MADE[name]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(sum(map(ord, name)))
    config = config_class(**shape, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    model = getattr(transformers, family + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def compare(name: str, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    theirs = made(name)
    theirs.save_pretrained(folder / "theirs")
    config = huggingface.read_config(folder / "theirs")
    quiet = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}
    config = dataclasses.replace(config, compute_dtype="float32", **quiet)
    params = huggingface.read_params(folder / "theirs", config)
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 41)).astype(np.int32)
    row: dict[str, Any] = {"model": name, "family": theirs.config.model_type}
    reference: dict[str, np.ndarray] = {}
    for dtype in ("float32", "bfloat16"):
        of_type = dataclasses.replace(config, compute_dtype=dtype)
        logits = jax.jit(lambda p, t, c=of_type: GPT(c).apply({"params": p}, t)[0])(params, tokens_BT)
        with torch.no_grad():
            expected = theirs.to(getattr(torch, dtype))(torch.tensor(tokens_BT)).logits.float().numpy()
        reference[dtype] = expected
        row[dtype] = _difference(np.asarray(logits, np.float32)[:, :, :VOCAB_SIZE], expected)
    row["theirs"] = _difference(reference["bfloat16"], reference["float32"])
    theirs = made(name)  # bfloat16 has rounded the other
    row["gradient"] = _gradient(theirs, config, params, tokens_BT, folder)
    row["greedy"] = _same_tokens(theirs, config, params)
    huggingface.write_model(folder / "ours", config, params)
    back, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "ours", output_loading_info=True, dtype=torch.float32
    )
    row["keys"] = sum(len(found[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = dict(back.named_parameters())
    row["bits"] = all(torch.equal(again[key], weight) for key, weight in theirs.named_parameters())
    return row


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _gradient(theirs: Any, config: Any, params: Any, tokens_BT: np.ndarray, folder: Path) -> float:
    """The largest difference of any array: theirs are written as if they were weights, and read as ours."""

    def loss(params: Any) -> jax.Array:
        total, sums = language_model_loss(GPT(config))(params, {"tokens": tokens_BT}, None)
        return total / sums["weight"]

    ours = jax.jit(jax.grad(loss))(params)
    tokens = torch.tensor(tokens_BT, dtype=torch.long)
    logits = theirs(tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB_SIZE), tokens[:, 1:].reshape(-1)).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(folder / "gradients")
    expected = huggingface.read_params(folder / "gradients", config)
    theirs.load_state_dict(torch_weights(folder / "theirs", theirs))
    return max(
        _difference(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
        if np.abs(np.asarray(b)).max() > 1e-6  # a key's bias moves no softmax: its gradient is rounding
    )


def torch_weights(folder: Path, model: Any) -> dict[str, Any]:
    """The weights of a directory, for a model of its shape."""
    return type(model).from_pretrained(folder, dtype=torch.float32).state_dict()


def _same_tokens(theirs: Any, config: Any, params: Any) -> int:
    """Of the new tokens of each prompt how many are the same from the start on, the fewest."""
    sampling = SamplingConfig(max_tokens=NEW_TOKENS, temperature=0)
    chunks = generate_tokens(config, params, PROMPTS, sampling, ())
    ours = [[token for chunk in row for token in chunk.token_ids] for row in zip(*chunks, strict=True)]
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    made_by_them = theirs.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, longest:].tolist()
    same = [
        next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), NEW_TOKENS)
        for mine, other in zip(ours, made_by_them, strict=True)
    ]
    return min(same)


def perplexities(directory: Path, text: Path, folder: Path) -> tuple[float, float, int]:
    """Ours and theirs of a run, over rows of a text that fill its context, and how many tokens these have."""
    with jax.set_mesh(one_device_mesh()):
        run = load_run(directory)
        export_run(run, folder / "hf")
        T = run.config.model.context_length
        ids = np.array(run.tokenizer.encode(text.read_text(encoding="utf-8")), np.int32)
        rows_BT = ids[: (len(ids) - 1) // T * T + 1]
        rows_BT = np.stack([rows_BT[i : i + T + 1] for i in range(0, len(rows_BT) - 1, T)])
        loss = jax.jit(lambda p, tokens: language_model_loss(run.model)(p, {"tokens": tokens}, None)[0])
        ours = sum(float(loss(run.params, rows_BT[i : i + 1])) for i in range(len(rows_BT)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    theirs = 0.0
    with torch.no_grad():
        for row in torch.tensor(rows_BT, dtype=torch.long):
            logits = model(row[None, :-1]).logits[0]
            theirs += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    count = rows_BT.shape[0] * T
    return float(np.exp(ours / count)), float(np.exp(theirs / count)), count


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*MADE], default=[*MADE], metavar="MODEL")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--run", type=Path, help="a run to export; with --text")
    parser.add_argument("--text", type=Path, help="a text whose perplexity is compared")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.run is not None:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs, count = perplexities(options.run, options.text, Path(folder))
        print(f"perplexity of {count:,} tokens: {ours:.6g} here, {theirs:.6g} in transformers")
        return 0
    rows = []
    print("| model | family | float32 | bfloat16 | theirs | gradient | greedy | keys | bits |\n|" + "---|" * 9)
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "ours").mkdir()
            row = compare(name, Path(folder))
        rows.append(
            row | {"transformers": transformers.__version__, "torch": torch.__version__, "jax": jax.__version__}
        )
        print(
            f"| {name} | {row['family']} | {row['float32']:.1e} | {row['bfloat16']:.1e} | {row['theirs']:.1e} | "
            f"{row['gradient']:.1e} | {row['greedy']} of {NEW_TOKENS} | {row['keys']} | "
            f"{'equal' if row['bits'] else 'differ'} |",
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
