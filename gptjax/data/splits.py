"""Which text is trained on and which is held out: by hash of the document, or by position."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gptjax.config import DataConfig
from gptjax.data.formats import Document
from gptjax.errors import UserError

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
FEWEST_HASHED_DOCUMENTS = 100  # below, the share that a hash holds out is too far from the fraction asked for


class Part(NamedTuple):
    """A document, or the piece of one, that belongs to a split."""

    split: SplitName
    text: str
    last: bool
    """Whether its document, or as much of it as this split has, ends here."""
    origin: str = ""
    """Where the document came from."""


@dataclass(frozen=True)
class Split:
    """A rule, why it was chosen, and how much text it divides."""

    rule: Literal["hash", "position"]
    reason: str
    validation_fraction: float
    characters: int

    @property
    def train_characters(self) -> int:
        """Characters to train on; of `hash` an estimate."""
        return int(self.characters * (1 - self.validation_fraction))

    def parts(self, documents: Iterable[Document]) -> Iterator[Part]:
        """Every document under its split; `position` cuts the one in which the held-out text starts."""
        if self.rule == "hash":
            for document in documents:
                if document.first:
                    side = "validation" if _is_held_out(document.text, self.validation_fraction) else "train"
                yield Part(side, document.text, document.last, document.origin)
            return
        left = self.train_characters
        for document in documents:
            cut = min(left, len(document.text))
            left -= cut
            if cut:
                yield Part("train", document.text[:cut], document.last or left == 0, document.origin)
            if cut < len(document.text):
                yield Part("validation", document.text[cut:], document.last, document.origin)


def choose_split(documents: Iterable[Document], data: DataConfig) -> Split:
    """Read all documents once and choose the rule.

    Raises:
        UserError: there is no text, or nothing is left to train on or to hold out.
    """
    count = held_out = characters = 0
    for document in documents:
        characters += len(document.text)
        if document.first:  # of a document that comes in pieces the first one decides
            count += 1
            held_out += _is_held_out(document.text, data.validation_fraction)
    if count == 0:
        raise UserError(f"data.path {' '.join(data.path)} has no document left after skipping")
    if data.split == "auto":
        rule = "position" if count < FEWEST_HASHED_DOCUMENTS else "hash"
        few = "fewer than" if rule == "position" else "at least"
        reason = f"{few} {FEWEST_HASHED_DOCUMENTS} documents"
    else:
        rule, reason = data.split, "data.split"
    split = Split(rule, reason, data.validation_fraction, characters)
    train, total = (count - held_out, count) if rule == "hash" else (split.train_characters, characters)
    if not 0 < train < total:
        unit = "documents" if rule == "hash" else "characters"
        raise UserError(
            f"data.path {' '.join(data.path)}: the split by {rule} gives {train} of {total} {unit} to train and "
            f"{total - train} to validation; change data.validation_fraction {data.validation_fraction:g}, data.split "
            "or the data"
        )
    return split


def uniform_hash(text: str, purpose: str) -> float:
    """A number in [0, 1) that only the text and the purpose decide; of two purposes they are independent."""
    digest = hashlib.sha256(f"{purpose}\0{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _is_held_out(text: str, fraction: float) -> bool:
    return uniform_hash(text, "validation") < fraction
