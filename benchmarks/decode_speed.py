"""How fast a configuration generates: time to the first token, tokens per second, share of the memory's bandwidth.

    python benchmarks/decode_speed.py configs/gpt2_124m.py --batch-sizes 1 8 64 --json decode_speed.json
    python benchmarks/decode_speed.py configs/shakespeare_char_gpu.py --model.context-length 512 --batch-sizes 1 16 \
        --prompt-tokens 16 --new-tokens 480 --cores 0,1 --against nanogpt=CHECKOUT --against transformers \
        --against-python PYTHON_WITH_TORCH

Weights and prompts are made. What is timed is a whole generation, greedy if nothing else is asked for, as
`generate_tokens` runs it, prefill and the host's part included; the table has the median of several. `of_bandwidth` is
the share of the time that reading weights and the tokens in the cache once for each new token takes at the memory's
peak bandwidth; unknown where that is. MFU counts a third of a training step's FLOPs.

With --against, arms take turns, each in a process of its own (compare.py): nanoGPT's `generate`, that of transformers,
or gpt-fast's (torch_decode_arm.py says how). A GPT-2 has the same weights everywhere, and `same_tokens` says how many
tokens, at least, of each row are ours; where two logits are nearly equal, texts part rightly. `ratio` is ours over that
arm in tokens per second, the median over pairs of neighbouring generations.

Where gptjax is not installed, start it with PYTHONPATH=. in front.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compare
import jax
import measure
import numpy as np
from paced import made_prompts, serve

from gptjax.config import Config
from gptjax.model.accounting import decode_bytes, mfu, parameter_counts, peak_bandwidth, peak_flops
from gptjax.model.accounting import training_flops_per_token as training_flops
from gptjax.model.gpt import GPT
from gptjax.parallel import platform
from gptjax.parallel.mesh import one_device_mesh
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.sampling.decode import decoding_params
from gptjax.sampling.rows import generate_tokens
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
NO_STOPS = ()


class Generator:
    """A configuration with made weights, generating for one batch size."""

    def __init__(self, config: Config, params: Any, batch_size: int, options: Any):
        self.model, self.params, self.options = config.model, params, options
        self.sampling = SamplingConfig(options.new_tokens, temperature=options.temperature)
        self.decoding = DecodingConfig(options.weights, options.kv_cache)
        self.prompts = made_prompts(config.model.vocab_size, batch_size, options.prompt_tokens).tolist()
        self.texts: list[list[int]] = []
        start = time.perf_counter()
        self.first_token_seconds()
        self.block()
        self.compile_seconds = time.perf_counter() - start
        self.first = measure.spread([self.first_token_seconds() for _ in range(3)])["median"]

    def chunks(self, sampling: SamplingConfig):
        return generate_tokens(self.model, self.params, self.prompts, sampling, NO_STOPS, decoding=self.decoding)

    def block(self) -> float:
        """Seconds of each new token of a whole generation."""
        start = time.perf_counter()
        chunks = list(self.chunks(self.sampling))
        seconds = time.perf_counter() - start
        self.texts = [[token for chunk in row for token in chunk.token_ids] for row in zip(*chunks, strict=True)]
        return seconds / self.options.new_tokens

    def first_token_seconds(self) -> float:
        """Of a generation of one token."""
        start = time.perf_counter()
        list(self.chunks(dataclasses.replace(self.sampling, max_tokens=1)))
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.options.prompt_tokens,
            "new_tokens": self.options.new_tokens,
            "parameters": parameter_counts(self.model)["total"],
            "first_token_ms": 1000 * self.first,
            "compile_seconds": self.compile_seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "texts": self.texts,
        }


def peak_memory_bytes() -> int:
    """The most that the device has used so far; where it does not count, as on a CPU, what this process has."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def figures(config: Config, batch_size: int, seconds: Sequence[float], options: Any, device: str) -> dict[str, Any]:
    """What follows from the seconds of a token, one figure for each generation."""
    c, found = config.model, measure.spread(seconds)
    mean_length = options.prompt_tokens + options.new_tokens / 2
    width = 2 if c.compute_dtype == "bfloat16" else 4
    widths = [1 if kind == "int8" else width for kind in (options.weights, options.kv_cache)]
    read, bandwidth = decode_bytes(c, batch_size, mean_length, *widths), peak_bandwidth(device)
    rate = batch_size / found["median"]
    flops = training_flops(c, int(mean_length)).total / 3
    return {
        "tokens_per_second": rate,
        "tokens_per_second_min": batch_size / found["max"],
        "tokens_per_second_max": batch_size / found["min"],
        "ms_per_token": 1000 * found["median"],
        "bytes_per_step": read,
        "of_bandwidth": None if bandwidth is None else read / bandwidth / found["median"],
        "mfu": mfu(rate, flops, 1, peak_flops(device, c.compute_dtype)),
    }


def made_params(config: Config) -> Any:
    return jax.jit(lambda key: init_params(GPT(config.model), key))(jax.random.key(0))


def alone(options: Any, config: Config) -> int:
    """A row for each batch size; or, paced, one arm of a comparison."""
    rows = []
    with jax.set_mesh(one_device_mesh()):
        params = decoding_params(config.model, made_params(config))
        for size in options.batch_sizes:
            known = {"config": str(options.config), **measure.machine(), "batch_size": size}
            try:
                generator = Generator(config, params, size, options)
            except jax.errors.JaxRuntimeError as error:
                if not measure.is_out_of_memory(error):
                    raise
                rows.append(known | {"tokens_per_second": None, "mfu": None, "error": "no memory"})
                continue
            if options.paced:
                serve(generator.block, lambda found=generator.facts: measure.machine() | found())
                return 0
            seconds = [generator.block() for _ in range(options.rounds)]
            if options.profile:
                with trace(options.profile):
                    generator.block()
                if options.json != "-":
                    print(report(kernels(options.profile, ""), options.new_tokens))
            device = jax.devices()[0].device_kind
            facts = {name: value for name, value in generator.facts().items() if name != "texts"}
            rows.append(known | figures(config, size, seconds, options, device) | facts)
            measure.write(rows, options.json)
    measure.show(rows, COLUMNS, options.json)
    return 0


def make_arms(config: Config, options: Any, words: Sequence[str], size: int, weights: Path | None) -> list[compare.Arm]:
    """Ours first, then what `--against` names, in each of its modes."""
    c, arms = config.model, []
    task = ["--batch-size", str(size), "--prompt-tokens", str(options.prompt_tokens)]
    task += ["--new-tokens", str(options.new_tokens)]
    shape = dataclasses.asdict(c) | {
        "num_kv_heads": c.resolved_num_kv_heads,
        "head_dim": c.resolved_head_dim,
        "ffn_dim": c.resolved_ffn_dim,
    }
    for dtype in options.dtypes or [c.compute_dtype]:
        ours = [sys.executable, str(Path(__file__)), str(options.config), "--paced", *words]
        ours += ["--batch-sizes", *task[1:], "--model.compute-dtype", dtype, "--temperature", "0"]
        ours += ["--weights", options.weights, "--kv-cache", options.kv_cache]
        ours += ["--vocab-size", str(c.vocab_size)]
        arms.append(compare.Arm(f"ours {dtype}", dtype, ours, {}))
        for other in options.against:
            kind, _, checkout = other.partition("=")
            for mode in options.modes if kind == "transformers" else ["eager"]:
                command = [options.against_python or sys.executable, str(compare.HERE / "torch_decode_arm.py"), kind]
                command += ["--mode", mode, "--shape", json.dumps(shape), "--dtype", dtype, *task]
                command += ["--checkout", checkout] if checkout else []
                command += ["--weights", str(weights)] if weights else []
                name = f"{kind} {mode}" if kind == "transformers" else kind
                arms.append(compare.Arm(f"{name} {dtype}", dtype, command, {}))
    return arms


def side_by_side(options: Any, config: Config, words: Sequence[str]) -> int:
    """All arms at each batch size."""
    compare.require_known(options.against)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = None
        if config.model.positions == "learned" and config.model.tie_embeddings:
            weights = Path(folder) / "weights.npz"
            leaves = jax.tree_util.tree_leaves_with_path(made_params(config))
            np.savez(weights, **{"/".join(part.key for part in path): np.asarray(leaf) for path, leaf in leaves})
        for size in options.batch_sizes:
            arms = make_arms(config, options, words, size, weights)

            def row(arm: compare.Arm, size: int = size) -> dict[str, Any]:
                typed = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=arm.dtype))
                return figures(typed, size, arm.seconds, options, arm.facts.get("device", ""))

            found = compare.take_turns(arms, options, words, rows, row)
            for each in found:
                texts, first = each.pop("texts", None), arms[0].facts.get("texts")
                if texts and first and each["arm"] != arms[0].name:
                    each["same_tokens"] = min(_same(a, b) for a, b in zip(texts, first, strict=True))
            rows += [{"batch_size": size} | each for each in found]
            measure.write(rows, options.json)
    columns = {"arm": "s", **COLUMNS, "ratio": ".2f", "same_tokens": "d"}
    measure.show(rows, {name: form for name, form in columns.items() if name != "mfu"}, options.json)
    return int(any(row.get("error") not in (None, "", "no memory") for row in rows))


def _same(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Leading tokens that are equal."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def main(arguments: Sequence[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, help="default: a quarter of the context")
    parser.add_argument("--new-tokens", type=int, help="default: a half of the context")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--weights", choices=("full", "int8"), default="full")
    parser.add_argument("--kv-cache", choices=("full", "int8"), default="full")
    parser.add_argument("--rounds", type=int, default=5, help="generations timed")
    parser.add_argument("--cores", help="numbers of the processor's cores to use, with commas; default: all")
    side = parser.add_argument_group("side by side")
    side.add_argument("--against", action="append", help="nanogpt=CHECKOUT, transformers or gptfast=CHECKOUT")
    side.add_argument("--against-python", help="interpreter that has torch; default: this one")
    side.add_argument("--modes", nargs="+", default=["eager"], help="of transformers: eager static")
    side.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: the configuration's")
    side.add_argument("--fresh", action="store_true", help="a new process for each turn: memory is never shared")
    side.add_argument("--paced", action="store_true", help="be an arm: wait for a line before each generation")
    options, config, words = measure.parse(parser, arguments)
    if options.cores:
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    context = config.model.context_length
    options.prompt_tokens = options.prompt_tokens or max(1, context // 4)
    options.new_tokens = options.new_tokens or max(1, context // 2)
    if not options.against:  # arms set their own flags
        platform.configure(profiled=options.profile is not None)
    config = measure.resolved(config, options.vocab_size)
    return side_by_side(options, config, words) if options.against else alone(options, config)


if __name__ == "__main__":
    measure.run(main)
