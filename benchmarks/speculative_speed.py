"""What speculative decoding gains on a trained run: tokens guessed by a draft's run, or from the text so far.

    python benchmarks/speculative_speed.py RUN --draft SMALLER_RUN --draft-tokens 2 4 8 --temperature 0
    python benchmarks/speculative_speed.py RUN --batch-sizes 1 16 --prompt "$(cat FILE)" --json speculative.json

Both have to be trained, because models that know nothing agree on nothing. Arms take turns, a whole generation each, as
`generate_tokens` runs it. `gain` is the median over rounds of the plain arm's time over that of the arm after it;
`kept` is the share of guesses that became text, and `tokens_per_pass` what a pass of the run's model brought a row.
Greedily `same_tokens` says whether an arm's tokens are the plain arm's; two logits that are nearly equal may part them.

Where gptjax is not installed, start it with PYTHONPATH=. in front.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import measure

from gptjax.parallel import platform
from gptjax.parallel.mesh import one_device_mesh
from gptjax.sampling.config import DecodingConfig, SamplingConfig
from gptjax.sampling.decode import decoding_params
from gptjax.sampling.rows import Draft, Guesses, generate_tokens
from gptjax.training.load import load_draft, load_run

COLUMNS = {
    "batch_size": "d",
    "guesser": "",
    "draft_tokens": "d",
    "ms_per_token": ".3f",
    "gain": ".2f",
    "low": ".2f",
    "high": ".2f",
    "kept": ".2f",
    "tokens_per_pass": ".2f",
    "same_tokens": "",
}
NO_STOPS = ()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a trained run")
    parser.add_argument("--draft", help="a run with the same tokenizer; without one, guesses come from the text alone")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", default="def __init__(self")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file for the results, or - for standard output")
    platform.configure()
    options, rows = parser.parse_args(arguments), []
    sampling = SamplingConfig(options.new_tokens, options.temperature)
    with jax.set_mesh(one_device_mesh()):
        run = load_run(options.run)
        config, params = run.config.model, decoding_params(run.config.model, run.params)
        drafts = {"text": None}
        if options.draft:
            draft_config, draft_params = load_draft(options.draft, run)
            drafts["draft"] = Draft(draft_config, decoding_params(draft_config, draft_params))
        arms = [("none", 0), *((name, guesses) for name in drafts for guesses in options.draft_tokens)]
        prompt = run.tokenizer.encode(options.prompt)
        for size in options.batch_sizes:

            def timed(arm: tuple[str, int], size: int = size) -> tuple[float, list[list[int]], Guesses | None]:
                """Seconds of a generation, its tokens, and how its guesses fared."""
                heard: list[Guesses] = []
                more = (DecodingConfig(draft_tokens=arm[1]), drafts.get(arm[0]), heard.append)
                start = time.perf_counter()
                chunks = [*generate_tokens(config, params, [prompt] * size, sampling, NO_STOPS, 32, None, *more)]
                seconds = time.perf_counter() - start
                tokens = [[t for chunk in row for t in chunk.token_ids] for row in zip(*chunks, strict=True)]
                return seconds, tokens, heard[-1] if heard else None

            rounds = [{arm: timed(arm) for arm in arms} for _ in range(options.rounds + 1)][1:]
            for arm in arms:
                rows.append({"run": options.run, "draft": options.draft, **measure.machine(), "batch_size": size})
                rows[-1] |= {"prompt_tokens": len(prompt), "new_tokens": options.new_tokens}
                rows[-1] |= {"temperature": options.temperature} | found(rounds, arm, arms[0], options)
    measure.show(rows, COLUMNS, options.json)
    return 0


def found(rounds: list[dict], arm: tuple[str, int], plain: tuple[str, int], options: Any) -> dict[str, Any]:
    """An arm's figures, of rounds of (seconds, tokens, guesses) of all arms."""
    low, gain, high = statistics.quantiles([round_[plain][0] / round_[arm][0] for round_ in rounds], n=4)
    _, tokens, guesses = rounds[-1][arm]
    kept = None if guesses is None else guesses.kept / guesses.made
    return {
        "guesser": arm[0],
        "draft_tokens": arm[1],
        "ms_per_token": 1000 * statistics.median(round_[arm][0] for round_ in rounds) / options.new_tokens,
        "gain": gain,
        "low": low,
        "high": high,
        "kept": kept,
        "tokens_per_pass": 1 + arm[1] * (kept or 0),
        "same_tokens": str(tokens == rounds[-1][plain][1]) if options.temperature == 0 else None,
    }


if __name__ == "__main__":
    measure.run(main)
