"""What drawing a token costs beside the greedy choice: temperature, top-k, top-p, min-p and the repetition penalty.

    python benchmarks/sampling_overhead.py configs/gpt2_124m.py --batch-sizes 1 16
    python benchmarks/sampling_overhead.py configs/shakespeare_char_gpu.py --vocab-size 50257 --json overhead.json

Weights and prompts are made. Arms of one batch size take turns, a whole generation each, as `generate_tokens` runs it;
`over_greedy` is the median over rounds of an arm's time over that of the greedy arm before it.

Where gptjax is not installed, start it with PYTHONPATH=. in front.
"""

import statistics
import time
from collections.abc import Sequence

import jax
import measure
import numpy as np

from gptjax.model.gpt import GPT
from gptjax.parallel import platform
from gptjax.parallel.mesh import one_device_mesh
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.decode import decoding_params
from gptjax.sampling.rows import generate_tokens
from gptjax.training.state import init_params

ARMS = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "penalty 1.2": {"repetition_penalty": 1.2},
    "top-k 50, top-p 0.9, penalty 1.2": {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2},
}
COLUMNS = {"batch_size": "d", "arm": "", "ms_per_token": ",.2f", "over_greedy": ".3f", "low": ".3f", "high": ".3f"}
NO_STOPS = ()


def main(arguments: Sequence[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    platform.configure()
    options, config = measure.read(parser, arguments)
    c, rows = config.model, []
    with jax.set_mesh(one_device_mesh()):
        params = decoding_params(c, jax.jit(lambda key: init_params(GPT(c), key))(jax.random.key(0)))
        for size in options.batch_sizes:
            prompts = np.random.default_rng(0).integers(0, c.vocab_size, (size, options.prompt_tokens)).tolist()

            def seconds(arm: str, prompts: list[list[int]] = prompts) -> float:
                sampling = SamplingConfig(options.new_tokens, **{"temperature": 0.8} | ARMS[arm])
                start = time.perf_counter()
                for _ in generate_tokens(c, params, prompts, sampling, NO_STOPS, options.new_tokens):
                    pass
                return time.perf_counter() - start

            rounds = [{arm: seconds(arm) for arm in ARMS} for _ in range(options.rounds + 1)][1:]
            for arm in ARMS:
                ratios = [found[arm] / found["greedy"] for found in rounds]
                low, median, high = statistics.quantiles(ratios, n=4)
                time_each = statistics.median(found[arm] for found in rounds) / options.new_tokens
                rows.append(
                    {"config": str(options.config), **measure.machine(), "batch_size": size, "arm": arm}
                    | {"ms_per_token": 1000 * time_each, "over_greedy": median, "low": low, "high": high}
                )
    measure.show(rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
