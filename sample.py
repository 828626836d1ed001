"""Generate text with a trained run: `python sample.py RUN --prompt TEXT`; `--help` lists every field."""

import dataclasses
import json
from collections.abc import Sequence

from gptjax import cli


def main(arguments: Sequence[str]) -> int:
    directory, parsed = cli.parse_sample(arguments)

    from gptjax.parallel import platform

    platform.configure()

    import jax

    from gptjax.parallel.mesh import one_device_mesh
    from gptjax.sampling.generate import generate, stream
    from gptjax.training.load import load_run

    with jax.set_mesh(one_device_mesh()):
        run = load_run(directory, parsed.step)
        prompts = [prompt for prompt in parsed.prompt for _ in range(parsed.num_samples)]
        model = (run.config.model, run.params, run.tokenizer)
        if parsed.json is None and len(prompts) == 1:
            pieces = stream(*model, prompts[0], parsed.sampling, parsed.decoding)
            print(prompts[0], end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
            return 0
        completions = generate(*model, prompts, parsed.sampling, parsed.decoding)
        if parsed.json is None:
            print("\n\n---\n\n".join(c.prompt + c.text for c in completions))
            return 0
        with cli.open_output(parsed.json) as file:
            for completion in completions:
                print(json.dumps(dataclasses.asdict(completion), ensure_ascii=False), file=file)
    return 0


if __name__ == "__main__":
    cli.run_command(main)
