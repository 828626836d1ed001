"""How well a model predicts whole documents: sliding windows, the loss of each document and at each position.

Shape suffixes: B windows of a batch, T tokens of a window and the one before it, V vocabulary.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from gptjax.config import ModelConfig
from gptjax.data.formats import Document
from gptjax.data.loader import Tokens
from gptjax.errors import UserError, at
from gptjax.evaluation.perplexity import Perplexity
from gptjax.model.gpt import GPT, Params
from gptjax.parallel import sharding
from gptjax.parallel.precision import compute_copy, compute_dtype
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.losses import bounded_chunk, loss_of_labels

BLOCK_TOKENS = 2**20
"""How much of a split is read at once."""


class TokenizedDocument(NamedTuple):
    """A document's tokens, without the end-of-text token, and the UTF-8 bytes of its text."""

    origin: str
    token_ids: np.ndarray
    num_bytes: int


class DocumentLoss(NamedTuple):
    """What a document's tokens cost together, in nats."""

    origin: str
    nats: float
    num_tokens: int
    num_bytes: int


class Evaluation(NamedTuple):
    """What an evaluation of documents found."""

    documents: list[DocumentLoss]
    nats_T: np.ndarray
    """Sum of the losses of tokens with 0, 1, 2, ... tokens before them in their window, the end-of-text token
    included. The first that a window predicts has 1; none has 0."""
    tokens_T: np.ndarray
    """How many those are."""
    stride: int
    """Tokens between the starts of windows."""

    @property
    def total(self) -> Perplexity:
        """Over all tokens of all documents."""
        nats = sum(document.nats for document in self.documents)
        num_tokens = sum(document.num_tokens for document in self.documents)
        return Perplexity(nats / num_tokens, num_tokens, sum(document.num_bytes for document in self.documents))


class Window(NamedTuple):
    """Tokens `start` to `stop` of a document, of which those from `scored` on have not been predicted before."""

    start: int
    scored: int
    stop: int


def windows(num_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` predicted tokens, each `stride` after the last, until all are predicted once."""
    scored = 0
    for start in itertools.count(0, stride):
        stop = min(start + length, num_tokens)
        yield Window(start, scored, stop)
        scored = stop
        if stop == num_tokens:
            return


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """Documents, long ones from their pieces, as tokens.

    Raises:
        UserError: the tokenizer cannot encode a text without loss, with its place.
    """
    ids, num_bytes = [], 0
    for document in documents:
        with at(document.origin):
            piece = tokenizer.encode(document.text)
            tokenizer.require_lossless(document.text, piece)
        ids.extend(piece)
        num_bytes += len(document.text.encode())
        if document.last:
            yield TokenizedDocument(document.origin, np.array(ids, np.int32), num_bytes)
            ids, num_bytes = [], 0


def split_documents(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """The documents of a split's tokens, which end with the end-of-text token or with the tokens.

    What the tokenizer puts before each is left out. No more than a document, or `BLOCK_TOKENS`, is in memory.

    Raises:
        UserError: the tokenizer has no token that ends a document.
    """
    token_bytes = np.array([len(raw) for raw in tokenizer.token_bytes()])
    opening = len(tokenizer.opening)
    for number, ids in enumerate(_split(tokens, tokenizer.require_end_of_text()), start=1):
        ids = ids[opening:] if tuple(ids[:opening]) == tokenizer.opening else ids
        if len(ids):
            yield TokenizedDocument(f"document {number}", ids, int(token_bytes[ids].sum()))


def _split(tokens: Tokens, end: int) -> Iterator[np.ndarray]:
    """What is between the `end`s, before the first and after the last."""
    unended: list[np.ndarray] = []
    for start in range(0, len(tokens), BLOCK_TOKENS):
        block = np.asarray(tokens[start : start + BLOCK_TOKENS], np.int32)
        *ended, rest = np.split(block, np.flatnonzero(block == end) + 1)
        for piece in ended:
            yield np.concatenate([*unended, piece[:-1]])
            unended = []
        unended.append(rest)
    yield np.concatenate([*unended, np.zeros(0, np.int32)])


def evaluate_documents(
    config: ModelConfig,
    params: Params,
    documents: Iterable[TokenizedDocument],
    before: int,
    *,
    opens: bool = False,
    window_tokens: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
) -> Evaluation:
    """Predict every token of every document exactly once, under the current mesh.

    A token stands before each document, as in training, so that its first token counts, too. Windows start `stride`
    tokens apart; all but a document's first predict only what the one before has not, with at least
    `window_tokens - stride` tokens before it. The logits of a batch are there in chunks of a bounded size.

    Args:
        before: the token that stands before documents.
        opens: whether it stands before every window (a BOS token, without which a model has never seen a text), and not
            only before a document, as the end of the one before.
        window_tokens: tokens of a window; None: the model's context length.
        stride: None: half a window. A whole window is quickest, and has the least context.
        batch_size: windows computed at once; over the mesh's batch axes.

    Raises:
        UserError: a window that does not fit the context, or a stride that does not fit the window.
    """
    length = config.context_length if window_tokens is None else window_tokens
    if not 1 <= length <= config.context_length:
        raise UserError(f"windows of {length} tokens do not fit the model's context of {config.context_length}")
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise UserError(f"a stride of {stride} is not between 1 and the window's {length} tokens: it leaves some out")
    weights = jax.jit(compute_copy, static_argnums=1)(params, compute_dtype(config))
    losses: list[DocumentLoss] = []
    nats_T, tokens_T = np.zeros(length + 1), np.zeros(length + 1, int)

    def rows() -> Iterator[tuple[int, Window, np.ndarray]]:
        for number, document in enumerate(documents):
            losses.append(DocumentLoss(document.origin, 0.0, len(document.token_ids), document.num_bytes))
            tokens = np.concatenate([[before], document.token_ids]).astype(np.int32)
            for window in windows(len(document.token_ids), length, stride):
                row = tokens[window.start : window.stop + 1].copy()
                row[0] = before if opens else row[0]
                yield number, window, row

    for batch in _batched(rows(), batch_size):
        tokens_BT = np.full((batch_size, length + 1), before, np.int32)
        for row, (_, _, tokens) in enumerate(batch):
            tokens_BT[row, : len(tokens)] = tokens
        nll_BT = np.zeros(tokens_BT.shape)
        nll_BT[:, 1:] = _token_losses(config, weights, sharding.put_batch(tokens_BT))
        for nll_T, (number, window, _) in zip(nll_BT, batch, strict=False):
            scored = slice(1 + window.scored - window.start, 1 + window.stop - window.start)
            losses[number] = losses[number]._replace(nats=losses[number].nats + nll_T[scored].sum())
            nats_T[scored] += nll_T[scored]
            tokens_T[scored] += 1
    return Evaluation(losses, nats_T, tokens_T, stride)


@functools.partial(jax.jit, static_argnames="config")
def _token_losses(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    inputs_BT, labels_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    output = loss_of_labels(config, labels_BT, bounded_chunk(config, labels_BT.size))
    return GPT(config).apply({"params": params}, inputs_BT, output=output)[0][0]


def _batched(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(items, size)):
        yield batch
