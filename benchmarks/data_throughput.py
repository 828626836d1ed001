"""How fast text becomes tokens, and tokens become batches.

`python benchmarks/data_throughput.py [TEXT ...]` compares, alternately and several times:

- tokenizing: what `prepare` does with text already read (encode on all cores, write and hash the shards) against
  `encode_batch_fast` of the tokenizers library alone, on the same text, which is cut as prepare cuts it;
- loading: tokens per second that `RowStream` delivers for the quickstart's shape and for GPT-2's, against the tokens
  per second that the run trained at, if `--run RUN` names one.

Medians are printed, with the least and the most.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from gptjax.cli import open_output
from gptjax.config import DataConfig, TokenizerConfig
from gptjax.data.corpus import PIECE_CHARACTERS, open_sources, tokenizer_texts
from gptjax.data.loader import RowStream, TokenRows
from gptjax.data.prepare import write_parts
from gptjax.data.shards import ShardWriter, token_dtype
from gptjax.data.splits import SPLITS
from gptjax.text.splitting import split_text
from gptjax.text.tokenizer import Tokenizer
from gptjax.text.tokenizer_training import train_tokenizer

SHAPES = {"quickstart": (8, 128), "GPT-2": (32, 1024)}  # batch, context


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def describe(values: list[float]) -> str:
    return f"{statistics.median(values):12,.0f}  ({min(values):,.0f} to {max(values):,.0f})"


def tokenizing(data: DataConfig, vocab_size: int, repeats: int, max_characters: int) -> dict[str, float]:
    sources = open_sources(data)
    config = TokenizerConfig(vocab_size=vocab_size)
    tokenizer = train_tokenizer(tokenizer_texts(sources, config), config)
    parts, characters = [], 0
    for part in sources[0].parts():
        parts.append(part)
        characters += len(part.text)
        if characters > max_characters:
            break
    pieces = [piece for part in parts for piece in split_text(part.text, PIECE_CHARACTERS)]
    num_bytes = sum(len(piece.encode()) for piece in pieces)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer.json")
        backend = Tokenizer.load(Path(folder) / "tokenizer.json")._backend  # with a cache of its own
    dtype = token_dtype(tokenizer.vocab_size)

    def library() -> None:
        for start in range(0, len(pieces), 64):
            backend.encode_batch_fast(pieces[start : start + 64], add_special_tokens=False)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            writers = {name: stack.enter_context(ShardWriter(Path(folder), name, dtype)) for name in SPLITS}
            write_parts(parts, tokenizer, writers)
            for writer in writers.values():
                writer.finish()

    library(), ours()
    rates: dict[str, list[float]] = {"library": [], "ours": []}
    for _ in range(repeats):
        rates["library"].append(num_bytes / seconds(library))
        rates["ours"].append(num_bytes / seconds(ours))
    ratio = statistics.median(o / b for o, b in zip(rates["ours"], rates["library"], strict=True))
    print(f"tokenizing {num_bytes:,} bytes, bytes per second:")
    print(f"  tokenizers alone       {describe(rates['library'])}")
    print(f"  gptjax, shards written {describe(rates['ours'])}")
    print(f"  ratio {ratio:.2f}")
    return {"library_bytes_per_second": statistics.median(rates["library"])} | {
        "bytes_per_second": statistics.median(rates["ours"]),
        "ratio": ratio,
    }


def loading(shape: tuple[int, int], num_tokens: int, repeats: int) -> list[float]:
    """Tokens per second of batches of one shape, from a memory-mapped shard."""
    batch, context = shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 50257, 20_000_000).astype("<u2").tofile(path)
        rows = TokenRows(np.memmap(path, "<u2", mode="r"), context)
        rates = []
        for seed in range(repeats):
            stream = RowStream([rows], seed)
            stream.take(batch)
            count = max(2, num_tokens // (batch * context))

            def take(stream: RowStream = stream, count: int = count) -> None:
                for _ in range(count):
                    stream.take(batch)

            rates.append(count * batch * context / seconds(take))
            stream.close()
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="*", default=["stdlib://"], help="as data.path")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-characters", type=int, default=10_000_000)
    parser.add_argument("--run", type=Path, help="a finished run, whose training speed the loader is compared with")
    parser.add_argument("--json", help="file for the figures as one JSON object, or - for standard output")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr if arguments.json == "-" else sys.stdout):
        result = measure(arguments)
    if arguments.json:
        with open_output(arguments.json) as file:
            print(json.dumps(result), file=file)
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    data = DataConfig(path=tuple(arguments.text))
    result = {"tokenizing": tokenizing(data, arguments.vocab_size, arguments.repeats, arguments.max_characters)}
    trained = None
    if arguments.run:
        trained = json.loads((arguments.run / "summary.json").read_text(encoding="utf-8"))["tokens_per_second"]
        print(f"{arguments.run} trained at {trained:,.0f} tokens per second")
    print("loading, tokens per second:")
    for name, shape in SHAPES.items():
        rates = loading(shape, 4_000_000, arguments.repeats)
        rate = statistics.median(rates)
        result[f"loading {name}"] = {"tokens_per_second": rate}
        times = f"  {rate / trained:.0f} times the training" if trained else ""
        print(f"  {name:10} {shape[0]:3} × {shape[1]:4}     {describe(rates)}{times}")
    return result


if __name__ == "__main__":
    sys.exit(main())
