"""The loss of a nanoGPT checkpoint over all of a validation set, in nats a token, for speedrun.py.

    python benchmarks/nanogpt_loss.py CHECKOUT out-shakespeare-char/ckpt.pt data/shakespeare_char/val.bin

It runs under a Python that has torch and NumPy. Sequences follow each other without overlap, as gptjax evaluates;
nanoGPT's own figure is of a few random batches.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokens", type=Path, help="of 16 bits, as nanoGPT prepares them")
    options = parser.parse_args()

    sys.path.insert(0, str(options.checkout))
    from model import GPT, GPTConfig

    saved = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    tokens, T = torch.from_numpy(np.fromfile(options.tokens, np.uint16).astype(np.int64)), model.config.block_size
    count = (len(tokens) - 1) // T
    inputs, labels = (tokens[start : start + count * T].view(count, T) for start in (0, 1))
    total = 0.0
    with torch.no_grad():
        for x, y in zip(inputs.split(64), labels.split(64), strict=True):
            total += model(x, y)[1].item() * y.numel()
    print(total / labels.numel())


if __name__ == "__main__":
    main()
