"""Generate text with a trained run: `python sample.py RUN --prompt TEXT`; `--help` lists every field."""

import dataclasses
import json
import sys
from collections.abc import Sequence

from gptjax import cli


def main(arguments: Sequence[str]) -> int:
    directory, parsed = cli.parse_sample(arguments)

    from gptjax.parallel import platform

    platform.configure()

    import jax

    from gptjax.parallel.mesh import one_device_mesh
    from gptjax.sampling import speed
    from gptjax.sampling.generate import generate, stream
    from gptjax.training.load import load_draft, load_run

    with jax.set_mesh(one_device_mesh()):
        run = load_run(directory, parsed.step)
        draft = None if parsed.draft is None else load_draft(parsed.draft, run)
        prompts = [prompt for prompt in parsed.prompt for _ in range(parsed.num_samples)]
        model = (run.config.model, run.params, run.tokenizer)
        if parsed.json is None and len(prompts) == 1:
            pieces = stream(*model, prompts[0], parsed.sampling, parsed.decoding, draft)
            print(prompts[0], end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
        else:
            completions = generate(*model, prompts, parsed.sampling, parsed.decoding, draft)
            if parsed.json is None:
                print("\n\n---\n\n".join(c.prompt + c.text for c in completions))
            else:
                with cli.open_output(parsed.json) as file:
                    for completion in completions:
                        print(json.dumps(dataclasses.asdict(completion), ensure_ascii=False), file=file)
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
    return 0


if __name__ == "__main__":
    cli.run_command(main)
