"""Pretraining: raw text in, cut into rows of which every token is predicted from those before it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gptjax.config import Config, DataConfig
from gptjax.data.loader import RowStream, Share, TokenRows
from gptjax.data.prepare import prepare
from gptjax.data.shards import PreparedData, TokenArray
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.model.workload import Rows
from gptjax.parametrization import multipliers
from gptjax.sampling.generate import generate
from gptjax.stages import callbacks, messages, start
from gptjax.stages.stage import Data, Stage, as_given
from gptjax.stages.weights import weights_of
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.optimizer import make_optimizer
from gptjax.training.state import TrainState

configure = as_given


def load_data(config: Config, tokenizer: Tokenizer | None, log: Callable[[str], None]) -> Data:
    """Token shards of the text, made or found.

    Args:
        tokenizer: the run's own, where it goes on; None: as the configuration says.

    Raises:
        UserError: as `prepare`.
    """
    if config.data.path == DataConfig().path:
        log("no --data.path: training on the source code of Python's standard library")
    if tokenizer is None and config.model.init_from:
        tokenizer = start.tokenizer(config)
    prepared = prepare(config.data, tokenizer or config.tokenizer, log=log)
    num_rows = (len(prepared.tokens("train")) - 1) // config.sequence_length
    known = prepared.tokenizer, prepared.index.content_fingerprint, str(prepared.folder)
    return Data(*known, num_rows, Rows(1, config.sequence_length), prepared)


def example_rows(config: Config, data: Data, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The first rows, (B, T + 1), and which of their tokens are learned."""
    stream = _stream(training_rows(data.content, config), config, 0)
    try:
        tokens_BT = stream.take(num_rows)
    finally:
        stream.close()
    mask_BT = np.ones(tokens_BT.shape, bool)
    mask_BT[:, 0] = False  # nothing predicts it
    return tokens_BT, mask_BT


def open_stage(config: Config, data: Data, directory: Path, log: Callable[[str], None]) -> Stage:
    """The stage under the current mesh.

    Raises:
        UserError: a split holds not one row, or `training.sample_prompt` cannot be continued.
    """
    prepared, training = data.content, config.training
    sources = training_rows(prepared, config)
    held_out = _rows(prepared.tokens("validation"), "validation split", config)
    _check_prompt(config, data.tokenizer)
    model, optimizer = GPT(config.model), make_optimizer(config.optimizer, multipliers(config.model))
    weights = weights_of(config, model, log, data.tokenizer)

    def write(state: TrainState) -> str:
        prompts, sampling = [training.sample_prompt], callbacks.sample_settings(config)
        (text,) = generate(
            callbacks.as_used(config.model), weights.whole(state.params), data.tokenizer, prompts, sampling
        )
        return text.prompt + text.text

    return Stage(
        loss=weights.loss(callbacks.text_loss(config, model, data.tokenizer)),
        optimizer=optimizer,
        new_state=lambda: weights.new_state(optimizer),
        abstract_state=weights.abstract_state(optimizer),
        frozen=weights.frozen,
        stream=lambda position: _stream(sources, config, position, callbacks.share(config)),
        evaluate=callbacks.evaluator(config, held_out, data.tokenizer, weights.whole),
        sample=callbacks.sampler(directory, write, log),
        description=lambda progress: messages.of_rows(config, data, sources, held_out),
    )


def _stream(sources: dict[str, TokenRows], config: Config, position: int, share: Share | None = None) -> RowStream:
    rows, weights = [*sources.values()], config.data.weights
    return RowStream(rows, config.training.seed, position, weights=weights, share=share)


def _check_prompt(config: Config, tokenizer: Tokenizer) -> None:
    """A sample that fails at the first interval would cost the steps before it."""
    prompt = config.training.sample_prompt
    try:
        ids = tokenizer.encode(prompt)
        tokenizer.require_lossless(prompt, ids)
    except UserError as error:
        raise UserError(f"training.sample_prompt {prompt!r}: {error}") from None
    num_tokens = len(tokenizer.opening) + len(ids)
    if num_tokens >= config.model.context_length:
        raise UserError(
            f"training.sample_prompt has {num_tokens} tokens, which leaves none of model.context_length "
            f"{config.model.context_length} to write; at most {config.model.context_length - 1} work"
        )


def training_rows(data: PreparedData, config: Config) -> dict[str, TokenRows]:
    """The rows of each source, or, where there are no weights, of all of them as one, by what they are called."""
    if not config.data.weights:
        return {" ".join(data.index.paths): _rows(data.tokens("train"), "train split", config)}
    names = [" ".join(source.paths) for source in data.index.sources]
    return {
        f"{number}: {name}": _rows(tokens, f"train split of {name}", config)
        for number, (name, tokens) in enumerate(zip(names, data.tokens_by_source("train"), strict=True), start=1)
    }


def _rows(tokens: TokenArray, what: str, config: Config) -> TokenRows:
    try:
        return TokenRows(tokens, config.sequence_length)
    except UserError as error:
        fraction = config.data.validation_fraction
        more = "" if fraction >= 0.05 else "; data.validation_fraction 0.05 holds out more"
        raise UserError(f"{what} (data.validation_fraction {fraction:g}): {error}{more}") from None
