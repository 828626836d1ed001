"""Supervised fine-tuning: conversations, of which what the assistant says is learned.

The first of InstructGPT's three steps (Ouyang et al. 2022): next-token cross-entropy on demonstrations, the masked mean
over the assistant's tokens of a batch. Conversations are packed into rows, in which they do not see each other.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.config import Config
from gptjax.data.conversations import SPLIT_BY, fingerprint, laid_out, left_out, read_items, split_items
from gptjax.data.forms import conversation_of
from gptjax.data.loader import RowStream
from gptjax.data.packing import Example, PackedRows, fit_rows
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.model.workload import Rows
from gptjax.parametrization import multipliers
from gptjax.stages import callbacks, chats, messages, start
from gptjax.stages.stage import Data, Stage, as_given
from gptjax.stages.weights import weights_of
from gptjax.text.chat import ChatFormat
from gptjax.text.templates import TEMPLATE_FILE
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.losses import language_model_loss
from gptjax.training.optimizer import make_optimizer

configure = as_given


class Conversations(NamedTuple):
    """Rows of the two splits."""

    form: ChatFormat
    train: PackedRows
    validation: PackedRows


def load_data(config: Config, tokenizer: Tokenizer | None, log: Callable[[str], None]) -> Data:
    """Read all conversations, lay them out, and say what does not fit.

    Args:
        tokenizer: the run's own, where it goes on; None: that of `model.init_from` or of `tokenizer.path`.

    Raises:
        UserError: what cannot be read; or a conversation is longer than a row under `data.on_long` stop.
    """
    tokenizer = tokenizer or start.tokenizer(config)
    form, skipped = chats.layout(config, tokenizer), Counter()
    items = read_items(config.data, conversation_of, skipped)
    length, sides = config.sequence_length, []
    for side in split_items(items, config.data, skipped):
        laid = laid_out(side, lambda item: form.rows(item.messages), config.data, skipped)
        rows = [(row, item.origin) for item, rows in laid for row in rows]
        examples = [Example(np.array(row.token_ids, np.int32), np.array(row.learned)) for row, _ in rows]
        fitted, counts = fit_rows(examples, [origin for _, origin in rows], length, config.data.on_long)
        if not fitted:
            raise UserError(
                f"no conversation is left that fits training.sequence_length {length}; --data.on-long truncate cuts "
                "them"
            )
        sides.append(fitted)
        skipped += counts
    log(
        f"data: {len(items):,} conversations, {len(sides[0]):,} to learn from, {len(sides[1]):,} held out"
        f"{left_out(skipped)}"
    )
    mark = fingerprint(
        [item.messages for item in items],
        *(
            tokenizer.fingerprint,
            form.template,
            length,
            config.data.on_long,
            config.data.on_error,
            config.data.split,
            SPLIT_BY,
            config.data.validation_fraction,
        ),
    )
    rows, held_out = (PackedRows(side, length, tokenizer.padding_id) for side in sides)
    content = Conversations(form, rows, held_out)
    return Data(tokenizer, mark, " ".join(config.data.path), len(rows), Rows(1, length), content)


def example_rows(config: Config, data: Data, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The first rows, (B, T + 1), and which of their tokens are learned."""
    stream = RowStream([data.content.train], config.training.seed, 0)
    try:
        rows = stream.take(num_rows)
    finally:
        stream.close()
    return rows["tokens"], rows["loss_mask"] > 0


def open_stage(config: Config, data: Data, directory: Path, log: Callable[[str], None]) -> Stage:
    """The stage under the current mesh."""
    (form, rows, held_out), training = data.content, config.training
    model, optimizer = GPT(config.model), make_optimizer(config.optimizer, multipliers(config.model))
    weights = weights_of(config, model, log)

    def description(progress) -> list[str]:
        sources = {" ".join(config.data.path): rows}
        return [*messages.of_rows(config, data, sources, held_out), f"packing: rows are {rows.fill:.1%} full"]

    return Stage(
        loss=weights.loss(
            language_model_loss(model, training.z_loss, chunk_tokens=training.loss_chunk_tokens, packed=True)
        ),
        optimizer=optimizer,
        new_state=lambda: weights.new_state(optimizer),
        abstract_state=weights.abstract_state(optimizer),
        frozen=weights.frozen,
        stream=lambda position: RowStream([rows], training.seed, position, share=callbacks.share(config)),
        evaluate=callbacks.evaluator(config, held_out, data.tokenizer, weights.whole),
        sample=chats.sampler(config, directory, data.tokenizer, form, weights.whole, log),
        description=description,
        files={TEMPLATE_FILE: form.template},
    )
