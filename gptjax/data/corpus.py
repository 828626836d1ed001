"""The text of a run: its sources, how each is split, and the sample a tokenizer is trained on."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptjax.config import DataConfig, TokenizerConfig
from gptjax.data.sources import read_documents
from gptjax.data.splits import Part, Split, choose_split, uniform_hash
from gptjax.text.splitting import split_text

PIECE_CHARACTERS = 2**16  # long documents are encoded in pieces, which spreads them over the cores

# Training the tokenizer on more than about 1 KB for each of its tokens hardly shortens the text any more.
SAMPLE_CHARACTERS_PER_TOKEN = 1024
MAX_SAMPLE_CHARACTERS = 2**28


class Source(NamedTuple):
    """Text that is split by one rule."""

    data: DataConfig
    split: Split
    skipped: dict[str, int]
    """Files and lines left out, by reason."""

    def parts(self) -> Iterator[Part]:
        """Its documents, read anew, each under its side of the split."""
        return self.split.parts(read_documents(self.data, Counter()))


def open_sources(data: DataConfig) -> list[Source]:
    """Read everything once and choose how it is split: with `data.weights` each entry of `data.path` for itself.

    Raises:
        UserError: as `read_documents` and `choose_split`.
    """
    alone = dataclasses.replace(data, weights=())
    entries = [dataclasses.replace(alone, path=(path,)) for path in data.path] if data.weights else [alone]
    sources = []
    for entry in entries:
        skipped: Counter[str] = Counter()
        split = choose_split(read_documents(entry, skipped), entry)
        sources.append(Source(entry, split, dict(skipped)))
    return sources


def tokenizer_texts(sources: Sequence[Source], config: TokenizerConfig) -> Iterator[str]:
    """What a tokenizer of this kind is trained on.

    For `bpe` a sample of the training text, 1 KB for each token of the vocabulary but at most 256 MB, chosen by the
    hash of its pieces; all text for `char`, which must know every character; nothing for `byte`.
    """
    if config.kind == "byte":
        return
    wanted = min(config.vocab_size * SAMPLE_CHARACTERS_PER_TOKEN, MAX_SAMPLE_CHARACTERS)
    share = wanted / sum(source.split.train_characters for source in sources)
    for part in itertools.chain.from_iterable(source.parts() for source in sources):
        if config.kind == "char":
            yield part.text
        elif part.split == "train":
            for text in split_text(part.text, PIECE_CHARACTERS):
                if share >= 1 or uniform_hash(text, "tokenizer") < share:
                    yield text
