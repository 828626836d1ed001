"""`python -m gptjax tokenizer train|show`: make a tokenizer, or look at one."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax import cli
from gptjax.config import DataConfig, TokenizerConfig
from gptjax.errors import UserError, at

if TYPE_CHECKING:
    from gptjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainArguments:
    """What `python -m gptjax tokenizer train` was asked for."""

    out: str = "tokenizer.json"
    """File to write."""
    megabytes: float = 10.0
    """Text of each source whose compression is measured, from its start."""
    json: str | None = None
    """File for the table as one JSON object; - is standard output. None: none."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass(frozen=True)
class ShowArguments:
    """What `python -m gptjax tokenizer show` was asked for."""

    text: str = ""
    """Text to take apart into its tokens."""
    data: tuple[str, ...] = ()
    """Sources, as data.path, whose compression is measured."""
    text_field: str = "text"
    """Field of a .jsonl line, or column of a .parquet file, that holds the text."""
    megabytes: float = 10.0
    """Text of each source that is measured, from its start."""
    json: str | None = None
    """File for everything as one JSON object; - is standard output. None: none."""


def main(arguments: Sequence[str]) -> int:
    """Train a tokenizer on text, or show what one does with text: tokenizer train|show."""
    verbs = {"train": _train, "show": _show}
    if not arguments or arguments[0] not in verbs:
        if arguments and arguments[0] in ("-h", "--help"):
            print("usage: python -m gptjax tokenizer train SOURCE ... [OPTIONS]")
            print("       python -m gptjax tokenizer show TOKENIZER [OPTIONS]")
            return 0
        given = f"not {arguments[0]!r}" if arguments else "one of them"
        raise UserError(f"tokenizer takes train or show, {given}: python -m gptjax tokenizer show runs/quickstart")
    return verbs[arguments[0]](arguments[1:])


def _train(arguments: Sequence[str]) -> int:
    """Read `SOURCE ... [--out FILE] [--tokenizer.field value ...]`."""
    import tyro

    sources = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    parsed = tyro.cli(
        TrainArguments,
        default=TrainArguments(data=DataConfig(path=tuple(sources)) if sources else DataConfig()),
        args=arguments[len(sources) :],
        prog="python -m gptjax tokenizer train SOURCE ...",
        description="Train a tokenizer, the one that prepare would train, and measure how it compresses the sources.",
    )
    out = Path(parsed.out)
    cli.check_output("--out", parsed.out)
    cli.check_output("--json", parsed.json)
    if path := parsed.tokenizer.path:
        raise UserError(
            f"tokenizer.path {path} is a tokenizer that is used as it is, but this makes a new one; leave it out, or "
            f"see what that one does: python -m gptjax tokenizer show {path}"
        )
    if parsed.data.weights:
        raise UserError("data.weights is for training a model: a tokenizer sees the text as it is; leave it out")

    from gptjax.data.corpus import open_sources, tokenizer_texts
    from gptjax.text.tokenizer_training import train_tokenizer

    trained_on = 0

    def counted(texts):
        nonlocal trained_on
        for text in texts:
            trained_on += len(text)
            yield text

    texts = counted(tokenizer_texts(open_sources(parsed.data), parsed.tokenizer))
    tokenizer = train_tokenizer(texts, parsed.tokenizer)
    try:
        tokenizer.save(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    rows = _compression(tokenizer, parsed.data, parsed.megabytes)
    found = {"out": str(out)} | _describe(tokenizer) | {"trained_on_characters": trained_on, "compression": rows}
    if parsed.json != "-":
        print(f"{tokenizer.kind} of {tokenizer.vocab_size:,} tokens, trained on {trained_on:,} characters: {out}")
        _print_compression(rows)
    cli.write_json(parsed.json, found)
    return 0


def _show(arguments: Sequence[str]) -> int:
    """Read `TOKENIZER [--text TEXT] [--data SOURCE ...]`."""
    import tyro

    arguments = list(arguments)
    path = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    parsed = tyro.cli(
        ShowArguments,
        args=arguments,
        prog="python -m gptjax tokenizer show TOKENIZER",
        description="Show a tokenizer: a tokenizer.json, GPT-2's folder, prepared data or a run.",
    )
    if path is None:
        raise UserError("no tokenizer given; write: python -m gptjax tokenizer show runs/quickstart")
    cli.check_output("--json", parsed.json)

    from gptjax.text.files import load_tokenizer
    from gptjax.text.labels import token_label

    tokenizer = load_tokenizer(path)
    found = _describe(tokenizer)
    raws = tokenizer.token_bytes()
    if parsed.json != "-":
        _print_description(found)
    if parsed.text:
        ids = tokenizer.encode(parsed.text)
        tokenizer.require_lossless(parsed.text, ids)
        tokens = [token_label(raws[i]) for i in ids]
        found |= {"token_ids": ids, "tokens": tokens}
        if parsed.json != "-":
            print(f"{len(ids)} tokens: {'|'.join(tokens)}")
            print(f"ids: {' '.join(map(str, ids))}")
    if parsed.data:
        data = DataConfig(path=parsed.data, text_field=parsed.text_field)
        options = {"text_field_option": "--text-field", "can_skip": False}
        found["compression"] = _compression(tokenizer, data, parsed.megabytes, **options)
        if parsed.json != "-":
            _print_compression(found["compression"])
    cli.write_json(parsed.json, found)
    return 0


def _describe(tokenizer: "Tokenizer") -> dict[str, Any]:
    from gptjax.text.labels import token_label

    names = {i: name for name, i in tokenizer.special_token_ids.items()}
    longest = sorted(tokenizer.token_bytes(), key=len, reverse=True)[:8]
    return {
        "kind": tokenizer.kind,
        "vocabulary": tokenizer.vocab_size,
        "end_of_text": {"token": names[tokenizer.end_of_text_id], "id": tokenizer.end_of_text_id},
        "special_tokens": tokenizer.special_token_ids,
        "longest_tokens": [token_label(raw) for raw in longest],
        "fingerprint": tokenizer.fingerprint,
    }


def _print_description(found: dict[str, Any]) -> None:
    end = found["end_of_text"]
    shown = {
        "end_of_text": f"{end['token']} ({end['id']})",
        "special_tokens": ", ".join(found["special_tokens"]),
        "longest_tokens": ", ".join(found["longest_tokens"]),
    }
    for name, value in (found | shown).items():
        print(f"{name}: {value}")


def _compression(tokenizer: "Tokenizer", data: DataConfig, megabytes: float, **options: Any) -> list[dict[str, Any]]:
    """Tokens and bytes of the start of each source, read with the options of `read_documents`."""
    from gptjax.data.sources import read_documents

    rows = []
    for path in data.path:
        num_bytes = num_tokens = num_characters = 0
        for document in read_documents(dataclasses.replace(data, path=(path,)), Counter(), **options):
            with at(document.origin):
                ids = tokenizer.encode(document.text)
                tokenizer.require_lossless(document.text, ids)
            num_tokens += len(ids)
            num_characters += len(document.text)
            num_bytes += len(document.text.encode())
            if num_bytes >= megabytes * 1e6:
                break
        rows.append({"source": path, "bytes": num_bytes, "characters": num_characters, "tokens": num_tokens})
    return rows


def _print_compression(rows: list[dict[str, Any]]) -> None:
    table = cli.make_table("compression", "source", "bytes/token", "characters/token", "tokens", "bytes")
    for row in rows:
        tokens = row["tokens"] or math.nan
        ratios = (f"{row['bytes'] / tokens:.3f}", f"{row['characters'] / tokens:.3f}")
        table.add_row(row["source"], *ratios, f"{row['tokens']:,}", f"{row['bytes']:,}")
    cli.print_wide(table)
