"""How long the loss takes forward and backward, and the memory it plans, by vocabulary.

    python benchmarks/loss_speed.py                             # 4,096, 50,257 and 128,000 words, 1,024 tokens
    python benchmarks/loss_speed.py --vocab-sizes 50257 --tokens 16384 --width 768 --chunks 4096 --json loss.json

From the last hidden states and the head to the gradients of both. `naive` is the formula with all logits in float32,
as it stands in most code, differentiated by JAX; `whole` is gptjax's loss, whose logits stay in the compute type; and
`chunks of N` the same with `training.loss_chunk_tokens` N, which computes each chunk's logits twice. Arms of one size
take turns, and the table has the median. Every arm is compared with the naive one in float32 first, in its loss and its
gradients: one that is off, or gives NaN, ends the benchmark.

Where gptjax is not installed, start it with PYTHONPATH=. in front.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import turns
from turns import TOLERANCE, Arm, take_turns

from gptjax.config import ModelConfig
from gptjax.model.gpt import Head
from gptjax.parallel import platform
from gptjax.resolve import default_compute_dtype
from gptjax.training.losses import loss_of_labels

COLUMNS = {"vocab_size": ",d", "loss": "", **turns.COLUMNS}


def naive(vocab_size: int, w_VD: jax.Array, x_BTD: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """The sum of the cross-entropy, by log-softmax of float32 logits."""
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, w_VD.astype(x_BTD.dtype)).astype(jnp.float32)
    log_probability_BTV = jax.nn.log_softmax(logits_BTV[:, :, :vocab_size])
    return -jnp.take_along_axis(log_probability_BTV, labels_BT[:, :, None], axis=-1).sum()


def losses(options: argparse.Namespace, V: int) -> tuple[dict[str, Callable[..., jax.Array]], list[jax.Array]]:
    """Functions of the head's weight, the hidden states and the labels, by name; and these arrays."""
    draw, config = np.random.default_rng(0), ModelConfig(model_dim=options.width, num_heads=1, vocab_size=V)
    shape = (options.batch_size, options.tokens // options.batch_size)
    w_VD = jnp.asarray(0.02 * draw.standard_normal((config.padded_vocab_size, options.width), np.float32))
    x_BTD = jnp.asarray(draw.standard_normal((*shape, options.width), np.float32), options.dtype)
    labels_BT = jnp.asarray(draw.integers(0, V, shape, np.int32))

    def ours(chunk_tokens: int) -> Callable[..., jax.Array]:
        def loss(w_VD, x_BTD, labels_BT):
            return loss_of_labels(config, labels_BT, chunk_tokens)(Head(w_VD, None), x_BTD)[0].sum()

        return loss

    found = {"naive": functools.partial(naive, V), "whole": ours(0)}
    return found | {f"chunks of {size:,}": ours(size) for size in options.chunks}, [w_VD, x_BTD, labels_BT]


def with_gradients(loss: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    def both(w_VD, x_BTD, labels_BT):
        value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(w_VD, x_BTD, labels_BT)
        return value, *gradients

    return both


def measure_vocabulary(options: argparse.Namespace, V: int) -> list[dict[str, Any]]:
    functions, (w_VD, x_BTD, labels_BT) = losses(options, V)
    exact = Arm("exact", with_gradients(functions["naive"]), [w_VD, x_BTD.astype(jnp.float32), labels_BT]).run()
    found = [Arm(name, with_gradients(loss), [w_VD, x_BTD, labels_BT]) for name, loss in functions.items()]
    rows = take_turns(found, exact, TOLERANCE[options.dtype], options.repeats, f"{V} words")
    return [{"vocab_size": V, "loss": arm.name, **row} for arm, row in zip(found, rows, strict=True)]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[4096, 50257, 128_000])
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 512], help="tokens whose logits exist at once")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences that the tokens are cut into")
    parser.add_argument("--width", type=int, default=256, help="of the hidden states: model.model_dim")
    parser.add_argument("--dtype", choices=[*TOLERANCE], help="default: what a model computes in on this device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file for the results, or - for standard output")
    platform.configure()
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or default_compute_dtype(jax.default_backend())
    known = {name: getattr(options, name) for name in ("tokens", "batch_size", "width", "dtype")} | measure.machine()
    rows = [known | row for V in options.vocab_sizes for row in measure_vocabulary(options, V)]
    measure.show(rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
