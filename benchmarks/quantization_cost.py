"""What eight-bit weights, keys and values cost in quality: bits a byte on a run's held-out text, with and without.

    python benchmarks/quantization_cost.py runs/quickstart --tokens 100000 --json quantization.json

All arms predict the same windows through the cache, in chunks, as prompts are read: all tokens but those of the first
chunk see keys and values as the cache has them, rounded or not. `worse` is the change of bits a byte against full
precision, in percent. `weight_bytes` counts what decoding reads.

Where gptjax is not installed, start it with PYTHONPATH=. in front.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import measure
import numpy as np

from gptjax.data.prepare import prepare
from gptjax.parallel import platform
from gptjax.parallel.mesh import one_device_mesh
from gptjax.sampling.decode import decoding_params, prefill
from gptjax.training.load import load_run

COLUMNS = {"weights": "s", "kv_cache": "s", "bits_per_byte": ".4f", "worse": "+.3f", "weight_bytes": ",d"}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000, help="held-out tokens, from the front")
    parser.add_argument("--batch-size", type=int, default=16, help="windows at a time")
    parser.add_argument("--chunk-tokens", type=int, default=16, help="of a window that go through the model at once")
    parser.add_argument("--json", help="file for the results, or - for standard output")
    options = parser.parse_args(arguments)
    platform.configure()
    rows = []
    with jax.set_mesh(one_device_mesh()):
        run = load_run(options.run)
        c = run.config.model
        tokenizer = run.tokenizer if run.config.tokenizer.path else run.config.tokenizer
        held_out = prepare(run.config.data, tokenizer, log=lambda line: None).tokens("validation")
        T, B = c.context_length, options.batch_size
        windows = min(options.tokens, len(held_out)) // (T * B) * B
        tokens = np.asarray(held_out[0 : windows * T], np.int32).reshape(-1, B, T)
        lengths = np.asarray([len(raw) for raw in run.tokenizer.token_bytes()], np.int64)
        num_bytes = int(lengths[tokens[:, :, 1:]].sum())
        for weights in ("full", "int8"):
            params = decoding_params(c, run.params, weights == "int8")
            read = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            for kv_cache in ("full", "int8"):
                nats = 0.0
                for batch in tokens:
                    found = prefill(
                        *(c, params, jnp.asarray(batch), jnp.full(B, T, jnp.int32), T),
                        chunk_tokens=options.chunk_tokens,
                        in_int8=kv_cache == "int8",
                        with_logprobs=True,
                    )
                    nats -= float(np.asarray(found.logprobs_BT, np.float64).sum())
                bits = nats / math.log(2) / num_bytes
                worse = 100 * (bits / rows[0]["bits_per_byte"] - 1) if rows else 0.0
                rows.append(
                    {"run": options.run.name, "tokens": tokens.size, **measure.machine(), "weights": weights}
                    | {"kv_cache": kv_cache, "bits_per_byte": bits, "worse": worse, "weight_bytes": read}
                )
    measure.show(rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
