"""`python -m gptjax attention RUN --text TEXT`: what the heads look at, and what each layer would predict."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax import cli
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.training.load import Run


@dataclass(frozen=True)
class AttentionArguments:
    """What `python -m gptjax attention` was asked for."""

    text: str = "The cat sat on the mat"
    """Text to read."""
    out: str | None = None
    """Picture to write, .png or another kind. None: attention.png, or with --logit-lens lens.png."""
    layer: tuple[int, ...] = ()
    """Layers to draw, counted from 0. None given: all."""
    logit_lens: bool = False
    """Show what each layer would predict at each token, instead of attention."""
    step: str = "last"
    """Checkpoint to use: last, best, or a step's number."""
    json: str | None = None
    """File for all numbers as one JSON object; - is standard output. None: none."""


def parse(arguments: Sequence[str]) -> tuple[Path, AttentionArguments]:
    """Read `RUN [--text TEXT] [--out PNG] [--logit-lens] ...`.

    Raises:
        UserError: no run was named.
        SystemExit: tyro's, as for `cli.parse_train`.
    """
    import tyro

    arguments = list(arguments)
    run = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    description = "Draw every head's attention, and say which tokens each token looks at most."
    parsed = tyro.cli(
        AttentionArguments, args=arguments, prog="python -m gptjax attention RUN", description=description
    )
    if run is None:
        raise UserError("no run given; write: python -m gptjax attention RUN --text TEXT")
    if parsed.out is None:
        parsed = dataclasses.replace(parsed, out="lens.png" if parsed.logit_lens else "attention.png")
    return Path(run), parsed


def main(arguments: Sequence[str]) -> int:
    """Draw what every head looks at, or with --logit-lens what each layer would predict."""
    directory, parsed = parse(arguments)
    cli.check_output("--out", parsed.out)
    cli.check_output("--json", parsed.json)

    from gptjax.parallel import platform

    platform.configure()

    import jax

    from gptjax.evaluation.pictures import require_fits, require_panels, require_picture
    from gptjax.parallel.mesh import one_device_mesh
    from gptjax.text.labels import token_labels
    from gptjax.training.load import load_run

    require_picture(parsed.out)
    with jax.set_mesh(one_device_mesh()):
        run = load_run(directory, parsed.step)
        model = run.config.model
        for layer in parsed.layer:
            if not 0 <= layer < model.num_layers:
                raise UserError(f"--layer {layer}: the model has layers 0 to {model.num_layers - 1}")
        if not parsed.logit_lens:
            require_panels(len(parsed.layer) or model.num_layers, model.num_heads)
        token_ids = run.tokenizer.encode(parsed.text)
        if not token_ids:
            raise UserError("--text is empty; give some words")
        run.tokenizer.require_lossless(parsed.text, token_ids)
        token_ids = [*run.tokenizer.opening, *token_ids]
        require_fits(len(token_ids), model.context_length)
        labels = token_labels(run.tokenizer)
        show = _show_lens if parsed.logit_lens else _show_attention
        show(run, parsed, token_ids, labels)
    if parsed.json != "-":
        print(f"drawn: {parsed.out}")
    return 0


def _show_attention(run: "Run", parsed: AttentionArguments, token_ids: list[int], labels: list[str]) -> None:
    from gptjax.evaluation.inside import attention_weights, looked_at_most
    from gptjax.evaluation.pictures import plot_attention

    tokens = [labels[i] for i in token_ids]
    weights_LNTS = attention_weights(run.config.model, run.params, token_ids)
    layers = [*parsed.layer] or [*range(len(weights_LNTS))]
    numbers = {"token_ids": token_ids, "tokens": tokens, "layers": layers, "weights": weights_LNTS[layers].tolist()}
    _write_json(run, parsed, numbers)
    plot_attention(weights_LNTS, tokens, parsed.out, parsed.layer)
    if parsed.json != "-":
        table = cli.make_table("tokens looked at most, averaged over heads", "token", *(f"layer {n}" for n in layers))
        looks = [looked_at_most(weights_LNTS[layer]) for layer in layers]
        for t, token in enumerate(tokens):
            table.add_row(token, *("  ".join(f"{tokens[s]} {w:.2f}" for s, w in look[t]) for look in looks))
        cli.print_wide(table)


def _show_lens(run: "Run", parsed: AttentionArguments, token_ids: list[int], labels: list[str]) -> None:
    from gptjax.evaluation.inside import logit_lens
    from gptjax.evaluation.pictures import plot_logit_lens

    tokens = [labels[i] for i in token_ids]
    lens = logit_lens(run.config.model, run.params, token_ids)
    if parsed.layer:
        lens = type(lens)(*(values[[*parsed.layer]] for values in lens))
    layers = [*parsed.layer] or [*range(len(lens.token_ids_LT))]
    predicted = [[labels[i] for i in row] for row in lens.token_ids_LT.tolist()]
    numbers = {
        "token_ids": token_ids,
        "tokens": tokens,
        "layers": layers,
        "predicted": predicted,
        "probability": lens.probability_LT.tolist(),
        "entropy": lens.entropy_LT.tolist(),
    }
    _write_json(run, parsed, numbers)
    plot_logit_lens(lens, tokens, predicted, parsed.out, layers)
    if parsed.json != "-":
        columns = ("token", *(f"after layer {layer}" for layer in layers), "the text's own")
        table = cli.make_table("the next token that each layer would predict, and its probability", *columns)
        for t, token in enumerate(tokens):
            cells = [f"{predicted[n][t]} {lens.probability_LT[n, t]:.2f}" for n in range(len(layers))]
            table.add_row(token, *cells, tokens[t + 1] if t + 1 < len(tokens) else "")
        cli.print_wide(table)


def _write_json(run: "Run", parsed: AttentionArguments, numbers: dict[str, Any]) -> None:
    """Before a picture is drawn: what was computed is not lost where that fails."""
    cli.write_json(parsed.json, {"run": str(run.directory), "step": run.step} | numbers)
