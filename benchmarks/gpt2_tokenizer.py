"""Are GPT-2's token ids those of tiktoken? On text of every kind, with the speed of both.

`python benchmarks/gpt2_tokenizer.py FOLDER TEXT ...` reads `encoder.json` and `vocab.bpe` of the folder, and compares
on the given files (as data.path), on the source code of Python's standard library, and on random characters of all
Unicode. It needs `pip install tiktoken`, which uses the same two files.
"""

import argparse
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator

import tiktoken

from gptjax.cli import open_output
from gptjax.config import DataConfig
from gptjax.data.corpus import PIECE_CHARACTERS
from gptjax.data.sources import read_documents
from gptjax.text.files import load_tokenizer
from gptjax.text.splitting import split_text

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def odd_unicode(num_characters: int) -> Iterator[str]:
    """Random characters of all planes, with runs of marks, spaces, joiners and controls between them."""
    draw = random.Random(0)
    special = "\u0301\u200d\u200b\ufeff\u3000\u00a0\u2028\x00\x85\x1c\r\n\t  ''s😀🇩🇪"
    left = num_characters
    while left > 0:
        characters = []
        for _ in range(2000):
            if draw.random() < 0.3:
                characters.append(draw.choice(special))
            else:
                code = draw.randrange(0x110000)
                characters.append("?" if 0xD800 <= code < 0xE000 else chr(code))
        left -= len(characters)
        yield "".join(characters)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("text", nargs="*")
    parser.add_argument("--megabytes", type=float, default=4, help="of each source")
    parser.add_argument(
        "--json", help="file for the table as JSON, an object for each source, or - for standard output"
    )
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr if arguments.json == "-" else sys.stdout):
        rows = compare(arguments)
    if arguments.json:
        with open_output(arguments.json) as file:
            print(json.dumps(rows, ensure_ascii=False), file=file)
    return int(any(row["different_documents"] for row in rows))


def compare(arguments: argparse.Namespace) -> list[dict[str, str | int | float]]:
    """A row for each source, printed as it is found."""
    ours = load_tokenizer(arguments.folder)
    ranks = {raw: i for i, raw in enumerate(ours.token_bytes()) if raw}
    special = {"<|endoftext|>": ours.end_of_text_id}
    theirs = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    rows = []
    print(f"{'source':40} {'bytes':>12} {'tokens':>11}  equal  {'ours MB/s':>9} {'tiktoken MB/s':>13}")
    for source in (*arguments.text, "stdlib://", "odd Unicode"):
        if source == "odd Unicode":
            documents = odd_unicode(int(arguments.megabytes * 1e6 / 4))
        else:
            documents = (d.text for d in read_documents(DataConfig(path=(source,)), Counter()))
        texts, size = [], 0
        for text in documents:
            texts.append(text)
            size += len(text.encode())
            if size > arguments.megabytes * 1e6:
                break
        start = time.perf_counter()
        pieces = [list(split_text(text, PIECE_CHARACTERS)) for text in texts]
        encoded = iter(ours.encode_batch([piece for group in pieces for piece in group]))
        found = [[i for _ in group for i in next(encoded)] for group in pieces]
        middle = time.perf_counter()
        expected = theirs.encode_batch(texts, disallowed_special=())
        end = time.perf_counter()
        unequal = [number for number, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
        row = {
            "source": source,
            "bytes": size,
            "tokens": sum(map(len, found)),
            "different_documents": len(unequal),
            "bytes_per_second": size / (middle - start),
            "tiktoken_bytes_per_second": size / (end - middle),
        }
        rows.append(row)
        rates = f"{row['bytes_per_second'] / 1e6:9.1f} {row['tiktoken_bytes_per_second'] / 1e6:13.1f}"
        print(f"{source[-40:]:40} {size:12,} {row['tokens']:11,}  {'yes' if not unequal else 'NO':5}  {rates}")
        if unequal:
            pair = zip(found[unequal[0]], expected[unequal[0]], strict=False)
            first = next(i for i, (a, b) in enumerate(pair) if a != b)
            context = theirs.decode(expected[unequal[0]][max(0, first - 3) : first + 3])
            print(f"  first difference: document {unequal[0]}, token {first}, near {context!r}")
    different = sum(row["different_documents"] for row in rows)
    print(f"{sum(row['bytes'] for row in rows):,} bytes, {different} documents differ")
    return rows


if __name__ == "__main__":
    sys.exit(main())
