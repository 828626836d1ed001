"""How fast a configuration generates: time to the first token, tokens per second, compile seconds and peak memory.

    python benchmarks/decode_speed.py configs/gpt2_124m.py --batch-sizes 1 8 64 --json decode_speed.json

Weights and prompts are made. Prefill and decoding are timed apart, each several times; the table has the medians.
`of_bandwidth` is the share of the time that reading weights and cache once for each token takes at the memory's peak
bandwidth; unknown where that is. MFU counts a third of a training step's FLOPs.

Where gptjax is not installed, start it with PYTHONPATH=. in front.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np

from gptjax.config import Config
from gptjax.model.accounting import mfu, parameter_counts, peak_bandwidth, peak_flops, training_flops_per_token
from gptjax.model.gpt import GPT
from gptjax.parallel import platform
from gptjax.parallel.mesh import one_device_mesh
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.decode import decode_n_tokens, decoding_params, prefill, row_keys, start_decoding
from gptjax.sampling.filters import filter_settings
from gptjax.training.profile import kernels, report, trace
from gptjax.training.state import init_params

COLUMNS = {
    "batch_size": "d",
    "tokens_per_second": ",.0f",
    "ms_per_token": ".3f",
    "first_token_ms": ".2f",
    "of_bandwidth": ".3f",
    "mfu": ".4f",
    "compile_seconds": ".1f",
    "peak_memory_bytes": ",d",
}
END_OF_TEXT = -1
"""No token: rows never end, so that every draw is a whole one."""


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def decode_speed(
    config: Config, params: Any, batch_size: int, prompt_tokens: int, new_tokens: int, options: Any
) -> dict[str, Any]:
    """Measure one batch size."""
    c = config.model
    draw = np.random.default_rng(0)
    prompts = jnp.asarray(draw.integers(0, c.vocab_size, (batch_size, prompt_tokens)), jnp.int32)
    lengths = jnp.full((batch_size,), prompt_tokens, jnp.int32)
    seen = jnp.zeros((batch_size, c.padded_vocab_size), bool)
    settings = filter_settings(SamplingConfig(max_tokens=new_tokens, temperature=options.temperature))
    num_slots = prompt_tokens + new_tokens

    def fill():
        return prefill(c, params, prompts, lengths, num_slots)

    def start():
        return start_decoding(*fill(), lengths, seen, row_keys(0, batch_size))

    begun = time.perf_counter()
    state = start()
    program = decode_n_tokens.lower(c, params, state, settings, END_OF_TEXT, new_tokens).compile()
    jax.block_until_ready(decode_n_tokens(c, params, state, settings, END_OF_TEXT, new_tokens))
    compile_seconds = time.perf_counter() - begun

    prefills = [timed(fill) for _ in range(options.repeats)]
    decodes = []
    for _ in range(options.repeats):
        state = jax.block_until_ready(start())
        decodes.append(timed(lambda s=state: decode_n_tokens(c, params, s, settings, END_OF_TEXT, new_tokens)))
    if options.profile:
        state = jax.block_until_ready(start())
        with trace(options.profile):
            timed(lambda: decode_n_tokens(c, params, state, settings, END_OF_TEXT, new_tokens))
        if options.json != "-":
            print(report(kernels(options.profile, program.as_text()), new_tokens))
    device = jax.devices()[0]
    seconds = measure.spread(decodes)
    rate = batch_size * new_tokens / seconds["median"]
    width = jnp.dtype(c.compute_dtype).itemsize
    cache = 2 * batch_size * num_slots * c.num_layers * c.resolved_num_kv_heads * c.resolved_head_dim * width
    bytes_per_token = parameter_counts(c)["total"] * width + cache
    bandwidth = peak_bandwidth(device.device_kind)
    step_seconds = seconds["median"] / new_tokens
    peak = peak_flops(device.device_kind, c.compute_dtype)
    return {
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "parameters": parameter_counts(c)["total"],
        "tokens_per_second": rate,
        "tokens_per_second_min": batch_size * new_tokens / seconds["max"],
        "tokens_per_second_max": batch_size * new_tokens / seconds["min"],
        "ms_per_token": 1000 * step_seconds,
        "first_token_ms": 1000 * measure.spread(prefills)["median"],
        "bytes_per_step": bytes_per_token,
        "of_bandwidth": None if bandwidth is None else bytes_per_token / bandwidth / step_seconds,
        "mfu": mfu(rate, training_flops_per_token(c, num_slots).total / 3, 1, peak),
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": measure.peak_memory_bytes(program),
    }


def main(arguments: Sequence[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, help="default: a quarter of the context")
    parser.add_argument("--new-tokens", type=int, help="default: a half of the context")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    platform.configure()
    options, config = measure.read(parser, arguments)
    context = config.model.context_length
    prompt_tokens = options.prompt_tokens or max(1, context // 4)
    new_tokens = options.new_tokens or max(1, context // 2)
    rows = []
    with jax.set_mesh(one_device_mesh()):
        params = jax.jit(lambda key: init_params(GPT(config.model), key))(jax.random.key(0))
        params = jax.block_until_ready(decoding_params(config.model, params))
        for size in options.batch_sizes:
            known = {"config": str(options.config), **measure.machine()}
            try:
                rows.append(known | decode_speed(config, params, size, prompt_tokens, new_tokens, options))
            except jax.errors.JaxRuntimeError as error:
                if not measure.is_out_of_memory(error):
                    raise
                rows.append(known | {"batch_size": size, "tokens_per_second": None, "mfu": None, "error": "no memory"})
    measure.show(rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    measure.run(main)
