"""Direct preference optimization: a policy that learns from pairs of answers without a reward model.

Rafailov et al. 2023, and two of its kin: IPO (Azar et al. 2023) and SimPO (Meng et al. 2024). What the reference, the
model that the run starts from, thinks of every answer is computed once, before the first step, and kept in the run.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from gptjax.checks import require
from gptjax.config import Config
from gptjax.data.conversations import fingerprint
from gptjax.data.loader import RowStream, evaluation_rows, evenly_spaced
from gptjax.data.rankings import PairRows
from gptjax.errors import UserError
from gptjax.model.gpt import GPT, Params
from gptjax.parallel import distributed, sharding
from gptjax.parametrization import multipliers
from gptjax.stages import callbacks, chats, messages, reward, start
from gptjax.stages.stage import Data, Stage, as_given
from gptjax.stages.weights import weights_of
from gptjax.text.templates import TEMPLATE_FILE
from gptjax.training.optimizer import make_optimizer
from gptjax.training.preference_losses import groups_of, log_probabilities, pair_loss, preference_loss, rows_of
from gptjax.training.state import TrainState

REFERENCE_FILE = "reference.npz"
"""Log-probabilities of all answers by the model that the run started from."""

configure = as_given
load_data = reward.load_data
"""Reads ranked answers, of which every pair is one to learn from."""


def example_rows(config: Config, data: Data, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The first pair, (2, T + 1), and which of their tokens are learned."""
    rows, _ = _rows(config, data)
    return rows[0]["tokens"], rows[0]["loss_mask"] > 0


def open_stage(config: Config, data: Data, directory: Path, log: Callable[[str], None]) -> Stage:
    """The stage under the current mesh; computes what the reference thinks, where the run does not have it yet."""
    training, form = config.training, data.content.form
    rows, held_out = _rows(config, data)
    model, optimizer = GPT(config.model), make_optimizer(config.optimizer, multipliers(config.model))
    weights = weights_of(config, model, log)
    if config.preference.loss != "simpo":
        rows.reference, held_out.reference = _reference(config, data, (rows, held_out), directory, log)

    def evaluate(state: TrainState) -> dict[str, float]:
        policy_P2, chosen = _log_probabilities(config, weights.whole(state.params), held_out, training.eval_sequences)
        pairs = [held_out[number] for number in chosen]
        lengths_P2 = np.stack([pair["loss_mask"].sum(axis=1) for pair in pairs])
        reference_P2 = np.stack([pair["reference"] for pair in pairs])
        loss_P, reward_P = preference_loss(config.preference, policy_P2, reference_P2, lengths_P2)
        return {
            "val_loss": float(np.mean(loss_P)),
            "val_accuracy": float(np.mean(np.asarray(reward_P) > 0)),
            "val_margin": float(np.mean(reward_P)),
            "val_chosen_logprob": float(policy_P2[:, 0].mean()),
            "val_rejected_logprob": float(policy_P2[:, 1].mean()),
        }

    return Stage(
        loss=weights.loss(pair_loss(model, config.preference, training.loss_chunk_tokens)),
        optimizer=optimizer,
        new_state=lambda: weights.new_state(optimizer),
        abstract_state=weights.abstract_state(optimizer),
        frozen=weights.frozen,
        stream=lambda position: RowStream([rows], training.seed, position, share=callbacks.share(config)),
        evaluate=evaluate,
        sample=chats.sampler(config, directory, data.tokenizer, form, weights.whole, log),
        description=lambda progress: [
            f"{len(rows):,} pairs of rows of {data.rows.num_tokens} tokens{held_out.judged()}",
            *messages.of_rows(config, data, {" ".join(config.data.path): rows}, held_out),
        ],
        files={TEMPLATE_FILE: form.template},
    )


class _Pairs(PairRows):
    """Pairs with what the reference thinks of their answers, once it is known."""

    reference: np.ndarray | None = None

    def judged(self) -> str:
        """What the reference thinks of the answers on the whole, for a message."""
        if self.reference is None:
            return ""
        chosen, rejected = self.reference.mean(axis=0)
        return f"; the reference's log-probability of held-out answers is {chosen:.2f} chosen, {rejected:.2f} rejected"

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        reference_2 = np.zeros(2, np.float32) if self.reference is None else self.reference[number]
        return super().__getitem__(number) | {"reference": reference_2}


def _rows(config: Config, data: Data) -> tuple[_Pairs, _Pairs]:
    rankings = data.content
    num_tokens = data.rows.num_tokens + 1
    sides = [_Pairs(side, num_tokens, data.tokenizer.padding_id) for side in (rankings.train, rankings.validation)]
    require(all(map(len, sides)), "no two answers to a prompt differ in their tokens, so there is nothing to compare")
    return tuple(sides)


def _reference(
    config: Config, data: Data, sides: tuple[_Pairs, _Pairs], directory: Path, log: Callable[[str], None]
) -> list[np.ndarray]:
    """Log-probabilities (P, 2) of each side's answers: the run's own, or computed and kept."""
    path, mark = directory / REFERENCE_FILE, fingerprint(data.fingerprint, config.model.init_from)
    kept = _kept(path, mark)
    if kept is not None and [*map(len, kept)] == [*map(len, sides)]:
        return kept
    if not config.model.init_from:
        raise UserError(
            f"preference.loss {config.preference.loss} holds the policy to the run it starts from: give "
            "--model.init-from RUN, or --preference.loss simpo, which needs none"
        )
    params = start.start_params(config, GPT(config.model), lambda line: None)
    found = [_log_probabilities(config, params, side, 0)[0] for side in sides]
    if distributed.is_first():
        with path.open("wb") as file:
            np.savez(file, mark=mark, train=found[0], validation=found[1])
    log(f"reference: {config.model.init_from} has judged {sum(map(len, found)):,} pairs, kept in {REFERENCE_FILE}")
    return found


def _kept(path: Path, mark: str) -> list[np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            return [kept["train"], kept["validation"]] if str(kept["mark"]) == mark else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # not there, or cut short by a kill
        return None


def _log_probabilities(config: Config, params: Params, rows: _Pairs, limit: int) -> tuple[np.ndarray, list[int]]:
    """Of both answers of all pairs, or of evenly spaced ones, (P, 2); and the pairs' numbers."""
    model, batch_size = GPT(callbacks.as_used(config.model)), config.training.resolved_micro_batch_size
    chunk_tokens = config.training.loss_chunk_tokens

    @jax.jit
    def judge(params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        flat = {name: rows_of(batch[name]) for name in ("tokens", "loss_mask")}
        found = groups_of(log_probabilities(model, params, flat, chunk_tokens=chunk_tokens), 2)
        return sharding.reshard(found, "stack", "stack")

    def batches() -> Iterator[np.ndarray]:
        for batch, count in evaluation_rows(rows, batch_size, limit, callbacks.share(config)):
            put = {name: sharding.put_batch(batch[name], batch_size, lead=0) for name in ("tokens", "loss_mask")}
            yield np.asarray(judge(params, put))[:count]

    return np.concatenate([*batches()]), [*evenly_spaced(len(rows), limit)]
