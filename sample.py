"""Generate text with a trained run, or talk to it: `python sample.py RUN [--prompt TEXT]`; `--help` lists all."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gptjax import cli

if TYPE_CHECKING:
    from gptjax.text.chat import ChatFormat, Message
    from gptjax.training.load import Run


def main(arguments: Sequence[str]) -> int:
    directory, parsed = cli.parse_sample(arguments)

    from gptjax.parallel import platform

    platform.configure()

    import jax

    from gptjax.interop.places import template_of
    from gptjax.parallel.mesh import one_device_mesh
    from gptjax.stages.chats import layout_of_run
    from gptjax.training.load import load_run

    talks = not parsed.prompt and template_of(directory) is not None and parsed.json is None
    with jax.set_mesh(one_device_mesh()):
        run = load_run(directory, parsed.step)
        if parsed.message or parsed.system or talks:
            converse(run, layout_of_run(directory, run.tokenizer), parsed)
        else:
            continue_texts(run, parsed)
    return 0


def continue_texts(run: "Run", parsed: cli.SampleArguments) -> None:
    """Continue each prompt: one as it is written, several when all are done."""
    from gptjax.sampling import speed
    from gptjax.sampling.generate import generate, stream
    from gptjax.training.load import load_draft

    draft = None if parsed.draft is None else load_draft(parsed.draft, run)
    prompts = [prompt for prompt in parsed.prompt or ("\n",) for _ in range(parsed.num_samples)]
    model = (run.config.model, run.params, run.tokenizer)
    if parsed.json is None and len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        show(stream(*model, prompts[0], parsed.sampling, parsed.decoding, draft))
    else:
        completions = generate(*model, prompts, parsed.sampling, parsed.decoding, draft)
        if parsed.json is None:
            print("\n\n---\n\n".join(c.prompt + c.text for c in completions))
        else:
            cli.write_json(parsed.json, *map(dataclasses.asdict, completions))
    if parsed.timing:
        longest = max(len(run.tokenizer.encode(prompt)) for prompt in prompts)
        guesses = []
        found = speed.measure(
            run.config.model,
            parsed.decoding,
            longest,
            parsed.sampling,
            lambda s: [c.token_ids for c in generate(*model, prompts, s, parsed.decoding, draft, guesses.append)],
        )
        kept = f"; {guesses[-1].kept} of {guesses[-1].made} guesses were right" if guesses else ""
        print(found.line() + kept, file=sys.stderr)


def converse(run: "Run", layout: "ChatFormat", parsed: cli.SampleArguments) -> None:
    """Answer each message, or, where there is none, open a conversation at the terminal."""
    from gptjax.sampling import terminal
    from gptjax.sampling.chat import chat, fit_to_context, stream_chat
    from gptjax.text.chat import Message

    model, sampling = (run.config.model, run.params, run.tokenizer, layout), parsed.sampling
    start = [Message("system", parsed.system)] if parsed.system else []
    asked = [[*start, Message("user", text)] for text in parsed.message for _ in range(parsed.num_samples)]
    if parsed.json is not None:
        answers = chat(*model, asked, sampling, parsed.decoding)
        said = [[*messages, Message("assistant", answer)] for messages, answer in zip(asked, answers, strict=True)]
        cli.write_json(parsed.json, *({"messages": [m._asdict() for m in messages]} for messages in said))
    elif len(asked) == 1:
        show(stream_chat(*model, asked[0], sampling, parsed.decoding))
    elif asked:
        print("\n\n---\n\n".join(chat(*model, asked, sampling, parsed.decoding)))
    else:

        def answer(said: Sequence["Message"]) -> tuple[Iterator[str], int]:
            kept, dropped = fit_to_context(layout, said, run.config.model.context_length, sampling.max_tokens)
            return stream_chat(*model, kept, sampling, parsed.decoding), dropped

        terminal.converse(answer, parsed.system)


def show(pieces: Iterator[str]) -> None:
    """Print text as it comes."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.run_command(main, ends_with_reader=True)
