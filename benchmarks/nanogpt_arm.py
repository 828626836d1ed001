"""One training step of nanoGPT, over and over, for `train_speed.py --against nanogpt=CHECKOUT`.

The model is the checkout's own `model.py`, and the step is that of its `train.py`: autocast, cross-entropy, clipping at
1, AdamW. It runs under a Python that has torch and NumPy, and needs no other part of gptjax. Modes:

    eager     as `train.py --compile=False`; torch's fused AdamW on GPUs alone, as nanoGPT has it
    fused     the same with the fused AdamW everywhere
    compiled  `torch.compile`, with the fused AdamW
    best      `torch.compile(mode="max-autotune")`, the fused AdamW, and on a GPU cuDNN's attention alone
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from paced import made_batches, serve

MODES = ("eager", "fused", "compiled", "best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--shape", type=json.loads, required=True, help="arguments of nanoGPT's GPTConfig, as JSON")
    parser.add_argument("--optimizer", type=json.loads, required=True, help="learning_rate, weight_decay, betas, clip")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="steps of a block")
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    options = parser.parse_args()

    sys.path.insert(0, str(options.checkout))
    from model import GPT, GPTConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True  # as train.py has it
    torch.backends.cudnn.allow_tf32 = True
    shape, recipe = options.shape, options.optimizer
    model = GPT(GPTConfig(**shape, dropout=0.0)).to(device)
    # The one thing that this argument decides is whether AdamW is fused; torch has it for CPUs as well by now.
    fused_as = device if options.mode == "eager" else "cuda"
    optimizer = model.configure_optimizers(recipe["weight_decay"], recipe["learning_rate"], recipe["betas"], fused_as)
    if options.mode == "compiled":
        call = torch.compile(model)
    elif options.mode == "best":
        call = torch.compile(model, mode="max-autotune")
    else:
        call = model
    batches = made_batches(recipe["vocab_size"], 1, options.batch_size, shape["block_size"])
    batches = [torch.from_numpy(tokens[0]).long() for tokens in batches]
    if device == "cuda":
        batches = [tokens.pin_memory() for tokens in batches]

    def attention():
        if options.mode != "best" or device != "cuda":
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)

    def autocast():
        if options.dtype == "float32":
            return contextlib.nullcontext()
        return torch.amp.autocast(device_type=device, dtype=torch.bfloat16)

    done = 0

    def step() -> torch.Tensor:
        nonlocal done
        tokens = batches[done % len(batches)].to(device, non_blocking=True)
        done += 1
        with autocast():
            loss = call(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1]
        loss.backward()
        if recipe["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    losses = []

    def block() -> float:
        start = time.perf_counter()
        for _ in range(options.steps):
            loss = step()
        losses.append(loss.item())  # waits for the device
        return (time.perf_counter() - start) / options.steps

    with attention():
        start = time.perf_counter()
        first_loss = step().item()
        compile_seconds = time.perf_counter() - start
        for _ in range(options.steps - 1):
            step()

        def facts():
            name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
            return {
                "device": name,
                "device_count": 1,
                "torch": torch.__version__,
                "python": sys.version.split()[0],
                "threads": torch.get_num_threads(),
                "model_py": hashlib.sha256((options.checkout / "model.py").read_bytes()).hexdigest()[:12],
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "compile_seconds": None if options.mode in ("eager", "fused") else compile_seconds,
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
                "steps": done,
                "first_loss": first_loss,
                "loss": losses[-1] if losses else None,
            }

        serve(block, facts)


if __name__ == "__main__":
    main()
