"""Whole generations by nanoGPT, transformers or gpt-fast, over and over, for `decode_speed.py --against`.

It runs under a Python that has torch and NumPy, and what it is compared with; it needs no other part of gptjax. The
models get our weights from a file, where there is a name for each, so that greedy texts can be compared.

    nanogpt      the checkout's `GPT.generate`, as its sample.py calls it: no cache; top_k=1 is greedy. Its sample.py's
                 `--compile` compiles a forward pass that `generate` does not call
    transformers `generate(do_sample=False)` of GPT2LMHeadModel or LlamaForCausalLM; eager: with its growing cache;
                 static: `cache_implementation="static"` and a compiled forward pass
    gptfast      the checkout's `prefill` and `decode_n_tokens`, compiled, on a made model of the same shape; CUDA only
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paced import made_prompts, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("nanogpt", "transformers", "gptfast"))
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--mode", default="eager")
    parser.add_argument("--shape", type=json.loads, required=True, help="of the model, with gptjax's names, as JSON")
    parser.add_argument("--weights", type=Path, help="our parameters, .npz")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    dtype, shape = getattr(torch, options.dtype), options.shape
    prompts = made_prompts(shape["vocab_size"], options.batch_size, options.prompt_tokens)
    prompts = torch.from_numpy(prompts).long().to(device)
    weights = None if options.weights is None else dict(np.load(options.weights))
    make = {"nanogpt": nanogpt, "transformers": transformers, "gptfast": gptfast}[options.kind]
    run = make(options, shape, weights, dtype, device)
    texts, firsts = [], []

    def timed(new_tokens: int) -> float:
        start = time.perf_counter()
        tokens = run(prompts, new_tokens)
        texts[:] = tokens[:, options.prompt_tokens :].tolist()  # waits for the device
        return time.perf_counter() - start

    def block() -> float:
        return timed(options.new_tokens) / options.new_tokens

    start = time.perf_counter()
    block()
    compile_seconds = time.perf_counter() - start
    timed(1)
    firsts += [timed(1) for _ in range(3)]

    def facts() -> dict[str, Any]:
        block()
        return {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "device_count": 1,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "threads": torch.get_num_threads(),
            "library": library(options.kind),
            "compile_seconds": compile_seconds,
            "first_token_ms": 1000 * float(np.median(firsts)),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
            "texts": texts if weights is not None else None,
        }

    serve(block, facts)


def library(kind: str) -> str | None:
    return f"transformers {sys.modules['transformers'].__version__}" if kind == "transformers" else None


Run = Callable[[torch.Tensor, int], torch.Tensor]
"""Of prompts (B, T) and a number of new tokens, the texts with both, (B, T + N)."""


def nanogpt(options: Any, shape: dict, weights: dict | None, dtype: torch.dtype, device: str) -> Run:
    sys.path.insert(0, str(options.checkout))
    from model import GPT, GPTConfig

    names = {"n_layer": "num_layers", "n_head": "num_heads", "n_embd": "model_dim", "block_size": "context_length"}
    config = GPTConfig(
        **{theirs: shape[ours] for theirs, ours in names.items()},
        vocab_size=shape["vocab_size"],
        bias=shape["bias"],
        dropout=0.0,
    )
    model = GPT(config)
    if weights is not None:
        load(model, gpt2_names(weights, shape, linear_is_transposed=True))
    model = model.eval().to(device, dtype)
    return lambda prompts, new_tokens: model.generate(prompts, new_tokens, top_k=1)


def transformers(options: Any, shape: dict, weights: dict | None, dtype: torch.dtype, device: str) -> Run:
    import transformers as library

    common = {"vocab_size": shape["vocab_size"], "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if shape["positions"] == "learned":
        config = library.GPT2Config(
            n_layer=shape["num_layers"],
            n_head=shape["num_heads"],
            n_embd=shape["model_dim"],
            n_positions=shape["context_length"],
            activation_function="gelu_new" if shape["feed_forward"] == "gelu_tanh" else shape["feed_forward"],
            layer_norm_epsilon=shape["norm_epsilon"],
            **common,
        )
        model = library.GPT2LMHeadModel(config)
        if weights is not None:
            load(model, gpt2_names(weights, shape, linear_is_transposed=False))
    else:
        config = library.LlamaConfig(
            num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"],
            num_key_value_heads=shape["num_kv_heads"],
            head_dim=shape["head_dim"],
            hidden_size=shape["model_dim"],
            intermediate_size=shape["ffn_dim"],
            max_position_embeddings=shape["context_length"],
            rms_norm_eps=shape["norm_epsilon"],
            tie_word_embeddings=shape["tie_embeddings"],
            **common,
        )
        model = library.LlamaForCausalLM(config)
        weights = None
    model = model.eval().to(device, dtype)
    kind = {}
    if options.mode == "static":
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        kind = {"cache_implementation": "static", "disable_compile": True}  # for it would compile once more

    def run(prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
        mask = torch.ones_like(prompts)
        return model.generate(
            prompts, attention_mask=mask, do_sample=False, use_cache=True, max_new_tokens=new_tokens, **kind
        )

    return run


def gptfast(options: Any, shape: dict, weights: dict | None, dtype: torch.dtype, device: str) -> Run:
    if device != "cuda":
        sys.exit("gpt-fast runs on CUDA alone")
    sys.path.insert(0, str(options.checkout))
    import generate as theirs
    from model import ModelArgs, Transformer

    args = ModelArgs(
        block_size=shape["context_length"],
        vocab_size=shape["vocab_size"],
        n_layer=shape["num_layers"],
        n_head=shape["num_heads"],
        n_local_heads=shape["num_kv_heads"],
        dim=shape["model_dim"],
        intermediate_size=shape["ffn_dim"],
    )
    with torch.device(device):
        model = Transformer(args).to(dtype)
    theirs.decode_one_token = torch.compile(theirs.decode_one_token, mode="reduce-overhead", fullgraph=True)
    theirs.prefill = torch.compile(theirs.prefill, fullgraph=True, dynamic=True)

    def run(prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
        B, T = prompts.shape
        with torch.device(device):
            model.setup_caches(max_batch_size=B, max_seq_length=T + new_tokens)
        token = theirs.prefill(model, prompts, torch.arange(T, device=device), temperature=1.0, top_k=1)
        tokens, _ = theirs.decode_n_tokens(
            model, token.view(B, -1), torch.tensor([T], device=device, dtype=torch.int), new_tokens - 1,
            temperature=1.0, top_k=1,
        )  # fmt: skip
        return torch.cat([prompts, token.view(B, 1), *[t.view(B, 1) for t in tokens]], dim=1)

    return run


def gpt2_names(weights: dict, shape: dict, *, linear_is_transposed: bool) -> dict[str, np.ndarray]:
    """Our parameters of a GPT-2 by the names that nanoGPT and transformers share."""
    V = shape["vocab_size"]

    def linear(w_DF: np.ndarray) -> np.ndarray:
        return w_DF.T if linear_is_transposed else w_DF

    named = {"transformer.wte.weight": weights["embedding"][:V], "transformer.wpe.weight": weights["positions"]}
    named["lm_head.weight"] = named["transformer.wte.weight"]

    def norm(name: str, ours: str, layer: int | None = None) -> None:
        for theirs, part in (("weight", "scale"), ("bias", "bias")):
            value = weights.get(f"{ours}/{part}")
            if value is not None:
                named[f"{name}.{theirs}"] = value if layer is None else value[layer]

    norm("transformer.ln_f", "final_norm")
    for i in range(shape["num_layers"]):
        at, block = f"transformer.h.{i}", "blocks"
        norm(f"{at}.ln_1", f"{block}/attention_norm", i)
        norm(f"{at}.ln_2", f"{block}/feed_forward_norm", i)
        q, k, v = (weights[f"{block}/attention/{name}/w"][i] for name in "qkv")
        named[f"{at}.attn.c_attn.weight"] = linear(np.concatenate([q, k, v], axis=1))
        for theirs, ours in (
            ("attn.c_proj", "attention/out"),
            ("mlp.c_fc", "feed_forward/up"),
            ("mlp.c_proj", "feed_forward/down"),
        ):
            named[f"{at}.{theirs}.weight"] = linear(weights[f"{block}/{ours}/w"][i])
            if f"{block}/{ours}/b" in weights:
                named[f"{at}.{theirs}.bias"] = weights[f"{block}/{ours}/b"][i]
        if f"{block}/attention/q/b" in weights:
            named[f"{at}.attn.c_attn.bias"] = np.concatenate(
                [weights[f"{block}/attention/{name}/b"][i] for name in "qkv"]
            )
    return named


def load(model: torch.nn.Module, named: dict[str, np.ndarray]) -> None:
    """Copy each array; what has no array is a bias of a model that has none, and becomes zero."""
    for name, parameter in model.state_dict().items():
        if name in named:
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(named[name])))
        elif name.endswith("bias") and parameter.is_floating_point() and parameter.ndim == 1:
            parameter.zero_()
        elif parameter.is_floating_point() and not name.endswith((".attn.bias", ".masked_bias")):
            raise SystemExit(f"no weights of ours for {name}")


if __name__ == "__main__":
    main()
