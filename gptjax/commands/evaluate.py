"""`python -m gptjax evaluate RUN ...`: how well runs predict text."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax import cli
from gptjax.config import DataConfig
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.evaluation.documents import Evaluation, TokenizedDocument
    from gptjax.training.load import Run


@dataclass(frozen=True)
class EvaluateArguments:
    """What `python -m gptjax evaluate` was asked for."""

    data: tuple[str, ...] = ()
    """Text to predict, all of it: as data.path. Of prepared data, and by default of the run's own, the validation
    split."""
    text_field: str = "text"
    """Field of a .jsonl line, or column of a .parquet file, that holds the text."""
    step: str = "last"
    """Checkpoint to use: last, best, or a step's number."""
    context_length: int | None = None
    """Tokens of a window. None: those of a row in training, or of the whole text if that is shorter."""
    stride: int | None = None
    """Tokens between the starts of windows. None: half a window."""
    batch_size: int = 16
    """Windows computed at once."""
    out: str | None = None
    """Picture of the loss at each position, .png or another kind. None: no picture."""
    json: str | None = None
    """File for everything, documents and positions too, one object per run; - is standard output. None: none."""


def parse(arguments: Sequence[str]) -> tuple[list[Path], EvaluateArguments]:
    """Read `RUN [RUN ...] [--data PATH ...] [--stride N] ...`.

    Raises:
        UserError: no run was named.
        SystemExit: tyro's, as for `cli.parse_train`.
    """
    import tyro

    runs = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    description = (
        "Predict every token of a text once and report nats per token, bits per byte and perplexity. Each document is "
        "read in windows that overlap, and starts after the token that the model expects there."
    )
    prog = "python -m gptjax evaluate RUN [RUN ...]"
    parsed = tyro.cli(EvaluateArguments, args=arguments[len(runs) :], prog=prog, description=description)
    if not runs:
        raise UserError("no run given; write: python -m gptjax evaluate RUN")
    return [Path(run) for run in runs], parsed


def main(arguments: Sequence[str]) -> int:
    """Measure how well runs predict text, by document and by position."""
    runs, parsed = parse(arguments)
    cli.check_output("--out", parsed.out)
    cli.check_output("--json", parsed.json)

    from gptjax.parallel import platform

    platform.configure()

    import jax

    from gptjax.evaluation.pictures import plot_positions, require_picture
    from gptjax.parallel.mesh import one_device_mesh

    if parsed.out is not None:
        require_picture(parsed.out)
    with jax.set_mesh(one_device_mesh()):
        results = [_evaluate(directory, parsed) for directory in runs]
    if parsed.json != "-":
        _print_tables(results)
    cli.write_json(parsed.json, *results)
    if parsed.out is not None:
        plot_positions({r["run"]: r["nats_per_token_by_position"] for r in results}, parsed.out)
    return 0


def _evaluate(directory: Path, parsed: EvaluateArguments) -> dict[str, Any]:
    from gptjax.evaluation.documents import evaluate_documents
    from gptjax.interop.transfer import imported_from
    from gptjax.model.accounting import parameter_counts
    from gptjax.training.load import load_run

    if not parsed.data and imported_from(directory) is not None:
        raise UserError(f"{directory} was not trained here, and has no held-out text: give one as --data PATH")
    run = load_run(directory, parsed.step)
    model = run.config.model
    if parsed.batch_size < 1:
        raise UserError(f"--batch-size is {parsed.batch_size}, but must be at least 1")
    usual = min(run.config.sequence_length, model.context_length)
    documents, first, num_tokens = _documents(run, parsed, skipped := Counter()), [], 0
    for reason, count in sorted(skipped.items()):
        cli.print_to_stderr(f"skipped {count} {reason}")
    while num_tokens < (parsed.context_length or usual) and (document := next(documents, None)) is not None:
        first.append(document)
        num_tokens += len(document.token_ids)
    length = min(usual, max(1, num_tokens)) if parsed.context_length is None else parsed.context_length
    if num_tokens < length:
        nearest = f"; --context-length {num_tokens} works" if num_tokens else ""
        raise UserError(f"the text has {num_tokens} tokens, fewer than one window of {length}{nearest}")
    found = evaluate_documents(
        *(model, run.params, itertools.chain(first, documents), run.tokenizer.document_start[-1]),
        opens=bool(run.tokenizer.opening),
        window_tokens=length,
        stride=parsed.stride,
        batch_size=parsed.batch_size,
    )
    return {
        "run": str(directory),
        "step": run.step,
        "parameters": parameter_counts(model)["total"],
        "tokenizer": run.tokenizer.fingerprint,
        "context_length": length,
        "stride": found.stride,
    } | _as_dict(found)


def _documents(run: "Run", parsed: EvaluateArguments, skipped: Counter[str]) -> "Iterator[TokenizedDocument]":
    from gptjax.data.prepare import prepare
    from gptjax.data.shards import INDEX_FILE
    from gptjax.data.sources import read_documents
    from gptjax.evaluation.documents import split_documents, tokenize
    from gptjax.training.checkpoint import read_metadata
    from gptjax.training.run_dir import CHECKPOINTS

    if not parsed.data and run.config.stage != "pretrain":
        raise UserError(
            f"{run.directory} has learned no text but {run.config.stage}, whose held-out figures stand in its "
            "metrics.jsonl; give a text to predict as --data"
        )
    prepared = not parsed.data or (Path(parsed.data[0]) / INDEX_FILE).is_file()
    if not prepared:
        data = DataConfig(path=parsed.data, text_field=parsed.text_field)
        documents = read_documents(data, skipped, text_field_option="--text-field", can_skip=False)
        return iter([*tokenize(documents, run.tokenizer)])  # a text that cannot be read is refused before, not midway
    data = dataclasses.replace(run.config.data, path=parsed.data, weights=()) if parsed.data else run.config.data
    tokenizer = run.tokenizer if run.config.tokenizer.path else run.config.tokenizer
    opened = prepare(data, tokenizer, log=cli.print_to_stderr)
    trained_on = None if parsed.data else read_metadata(run.directory / CHECKPOINTS, run.step)["data"]
    if trained_on is not None and opened.index.content_fingerprint != trained_on:
        raise UserError(
            f"the text of {' '.join(data.path)} is no longer what {run.directory} was trained on, so that some of what "
            "was held out may have been seen; give what to evaluate as --data"
        )
    if opened.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise UserError(
            f"{opened.folder} was made with another tokenizer than {run.directory}; give text as --data, which the "
            "run's own tokenizer reads"
        )
    return split_documents(opened.tokens("validation"), run.tokenizer)


def _as_dict(found: "Evaluation") -> dict[str, Any]:
    total = found.total
    return {
        "nats_per_token": total.nats_per_token,
        "bits_per_byte": total.bits_per_byte,
        "perplexity": total.perplexity,
        "tokens": total.num_tokens,
        "bytes": total.num_bytes,
        "documents": [document._asdict() for document in found.documents],
        "nats_per_token_by_position": [
            nats / count if count else None for nats, count in zip(found.nats_T, found.tokens_T.tolist(), strict=True)
        ],
        "tokens_by_position": found.tokens_T.tolist(),
    }


def _print_tables(results: list[dict[str, Any]]) -> None:
    names = ("step", "parameters", "nats/token", "bits/byte", "perplexity", "tokens", "bytes", "documents")
    whole = cli.make_table("", "run", *names)
    for r in results:
        figures = (f"{r['nats_per_token']:.4f}", f"{r['bits_per_byte']:.4f}", f"{r['perplexity']:.2f}")
        counts = (f"{r['tokens']:,}", f"{r['bytes']:,}", f"{len(r['documents']):,}")
        whole.add_row(r["run"], str(r["step"]), f"{r['parameters']:,}", *figures, *counts)
    cli.print_wide(whole)
    for r in results:
        print(f"{r['run']}: windows of {r['context_length']} tokens, {r['stride']} apart")
    if len({r["tokenizer"] for r in results}) > 1:
        print("These runs have different tokenizers: only bits/byte can be compared.")
    title = "nats/token by the number of tokens before it in the window that predicted a token, end-of-text included"
    positions = cli.make_table(title, "run", *_bins(results))
    for r in results:
        positions.add_row(r["run"], *_by_bin(r, _bins(results)))
    cli.print_wide(positions)
    if len(results) == 1:
        _print_extremes(results[0]["documents"])


def _bins(results: list[dict[str, Any]]) -> list[str]:
    """1, 2-3, 4-7 and so on: no token is predicted with none before it."""
    longest = max(len(r["tokens_by_position"]) for r in results)
    edges = [*(2**n for n in range(longest.bit_length()) if 2**n < longest), longest]
    return [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]


def _by_bin(result: dict[str, Any], bins: list[str]) -> Iterator[str]:
    losses, counts = result["nats_per_token_by_position"], result["tokens_by_position"]
    for name in bins:
        first, _, last = name.partition("-")
        chosen = range(int(first), min(int(last or first) + 1, len(counts)))
        weight = sum(counts[t] for t in chosen)
        yield f"{sum(losses[t] * counts[t] for t in chosen if counts[t]) / weight:.3f}" if weight else "-"


def _print_extremes(documents: list[dict[str, Any]]) -> None:
    """The best and the worst predicted documents, three of each."""

    def bits_per_byte(document: dict[str, Any]) -> float:
        return document["nats"] / math.log(2) / max(1, document["num_bytes"])

    ranked = sorted(documents, key=bits_per_byte)
    table = cli.make_table("documents by bits/byte", "", "bits/byte", "tokens")
    for number, document in enumerate(ranked):
        if number == 3 and len(ranked) > 6:
            table.add_row(f"... {len(ranked) - 6:,} between ...", "", "")
        if number < 3 or number >= len(ranked) - 3:
            table.add_row(document["origin"], f"{bits_per_byte(document):.3f}", f"{document['num_tokens']:,}")
    cli.print_wide(table)
