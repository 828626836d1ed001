"""A recipe from its first run to the table of what became of each; whatever stops it, it goes on where it stood."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from gptjax.config import Config
from gptjax.data.loader import evaluation_rows
from gptjax.evaluation.perplexity import evaluate
from gptjax.evaluation.report import markdown_table
from gptjax.model.gpt import Params
from gptjax.parallel.mesh import one_device_mesh
from gptjax.recipe import Recipe
from gptjax.stages import rl, sft
from gptjax.stages.judges import token_judge
from gptjax.stages.train import train
from gptjax.training.load import Run, load_run
from gptjax.training.run_dir import load_run_config, write_json, write_text

TABLE_FILE, JSON_FILE = "recipe.md", "recipe.json"
COMPARED = 256
"""Most held-out prompts that models are compared on."""


class Row(NamedTuple):
    """What became of one model."""

    run: str
    stage: str
    answer_loss: float
    """Nats a token of held-out demonstrations."""
    reward: float | None
    """Mean of its answers to held-out prompts, by the reward model; None for a model that does not answer."""
    win_rate: float | None
    """Share of the prompts for which its answer is rewarded more than the demonstrations' model's; ties are halves."""
    kl: float | None
    """From the demonstrations' model, in nats an answer, over its own answers."""
    answer: str
    """To the first held-out prompt."""


def run_recipe(recipe: Recipe, folder: Path, log: Callable[[str], None] = print) -> str:
    """Train all runs that have not ended, and compare them.

    Returns:
        `finished`, or why a run stopped.

    Raises:
        UserError: as `train`.
    """
    for number, name in enumerate(recipe.runs, start=1):
        log(f"--- {name}, run {number} of {len(recipe.runs)}")
        stopped = train(recipe.placed(name, folder), name=name)["stopped"]
        if stopped != "finished":
            return stopped
    with jax.set_mesh(one_device_mesh()):
        rows = compare(recipe, folder, log)
    if rows:
        write_json(folder / JSON_FILE, [row._asdict() for row in rows])
        write_text(folder / TABLE_FILE, table(rows))
        log(f"--- {folder / TABLE_FILE}\n\n{table(rows)}")
    return "finished"


def table(rows: Sequence[Row]) -> str:
    """Markdown: what became of each model, and what it says."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    header = ("run", "stage", "held-out answer loss", "reward", "wins against sft", "KL from sft")
    cells = [
        (
            *(row.run, row.stage, f"{row.answer_loss:.4f}"),
            *(shown(row.reward, "+.3f"), shown(row.win_rate, ".1%"), shown(row.kl, ".2f")),
        )
        for row in rows
    ]
    said = [(row.run, f"`{row.answer}`") for row in rows if row.reward is not None]
    return f"{markdown_table(header, cells)}\n\n{markdown_table(('run', 'what it answers first'), said)}\n"


def compare(recipe: Recipe, folder: Path, log: Callable[[str], None]) -> list[Row]:
    """Each model on what was held out: demonstrations, and prompts that the reward model judges.

    Empty where the recipe has no demonstrations, or no run that a reward model rewards.
    """
    by_stage = {config.stage: name for name, config in reversed(recipe.runs.items())}
    judged = next(
        (name for name, c in recipe.runs.items() if c.stage in ("ppo", "grpo") and c.rl.reward in recipe.runs), None
    )
    if "sft" not in by_stage or judged is None:
        return []
    config, _ = load_run_config(folder / judged)
    start = load_run(folder / by_stage["sft"])
    data = rl.load_data(config, start.tokenizer, lambda line: None)
    reward = rl.reward_of(config, data)
    prompts = data.content.validation[:COMPARED]
    likelihood = token_judge(config, start.config.model)

    def answers(run: Run) -> rl.Drawn:
        return rl.draw(config, data, reward, run.params, prompts, 1, 1.0, jax.random.key(0))

    log(f"comparing on {len(prompts)} held-out prompts, the first of which is {prompts[0].task.prompt[-1].content!r}")
    base, rows = answers(start), []
    for name, own in recipe.runs.items():
        if own.stage == "reward":
            continue
        run = load_run(folder / name)
        loss = _answer_loss(load_run_config(folder / by_stage["sft"])[0], run.params, start)
        if own.stage == "pretrain":
            rows.append(Row(name, own.stage, loss, None, None, None, ""))
            continue
        drawn = answers(run)
        lead = drawn.rewards_B - base.rewards_B
        other_BT = likelihood(start.params, drawn.tokens_BT, drawn.mask_BT)
        kl = np.where(drawn.mask_BT, drawn.old_logprobs_BT - other_BT, 0.0).sum(axis=1).mean()
        wins = float(((lead > 0) + (lead == 0) / 2).mean())
        rows.append(Row(name, own.stage, loss, float(drawn.rewards_B.mean()), wins, float(kl), drawn.texts[0]))
    return rows


def _answer_loss(config: Config, params: Params, start: Run) -> float:
    """Nats a token of held-out demonstrations."""
    data = sft.load_data(config, start.tokenizer, lambda line: None)
    token_bytes = np.array([len(raw) for raw in start.tokenizer.token_bytes()])
    batches = evaluation_rows(data.content.validation, 16, 0)
    return evaluate(start.config.model, params, batches, token_bytes, packed=True).nats_per_token
