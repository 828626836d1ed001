"""Token embeddings that begin as word vectors: of word2vec (Mikolov et al. 2013) or GloVe (Pennington et al. 2014).

Shape suffixes: V rows of the vocabulary, D width of the model, W width of the vectors, N words found.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.text.tokenizer import Tokenizer


class Vectors(NamedTuple):
    """Some words of a file."""

    words: list[str]
    vectors_NW: np.ndarray
    """Float32."""
    num_words: int
    """In the file."""


def read_vectors(path: Path, wanted: Collection[str]) -> Vectors:
    """The vectors of those words that are wanted, from a file of any size.

    Three forms are read: GloVe's text, a word and its numbers a line; word2vec's text, the same after a line with the
    number of words and their width; and word2vec's binary form, which begins so, too.

    Raises:
        UserError: the file is missing, or of none of these forms.
    """
    try:
        with path.open("rb") as file:
            first = file.readline().split()
            counted = len(first) == 2 and all(part.isdigit() for part in first)
            width = int(first[1]) if counted else len(first) - 1
            if width < 2:
                raise UserError(
                    f"{path} has no word vectors: its first line has neither a word and its numbers, as GloVe's have, "
                    "nor the number of words and their width, as word2vec's have"
                )
            start = file.tell() if counted else 0
            file.seek(start)
            binary = counted and not _is_text(file.readline(2**20), width)
            file.seek(start)
            found = _binary(file, int(first[0]), width) if binary else _lines(file, path, width)
            words, rows, number = [], [], 0
            for number, (word, vector) in enumerate(found, 1):  # noqa: B007 the last is the number of words
                if word in wanted:
                    words.append(word)
                    rows.append(vector())
    except OSError as error:
        raise UserError(f"no word vectors {path}: {error.strerror}") from error
    vectors_NW = np.array(rows, np.float32).reshape(len(rows), width)
    if not np.isfinite(vectors_NW).all():
        raise UserError(f"{path} has word vectors that are no numbers")
    return Vectors(words, vectors_NW, number)


def _is_text(line: bytes, width: int) -> bool:
    """Whether a line is a word and so many numbers in digits; in binary form they have bytes that no text has."""
    numbers = line.split()[-width:]
    return len(line.split()) > width and all(set(number) <= set(b"0123456789+-.eE") for number in numbers)


def _lines(file: BinaryIO, path: Path, width: int) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    for number, line in enumerate(file, 1):
        word, *numbers = line.rstrip().rsplit(b" ", width)
        if len(numbers) != width:
            raise UserError(
                f"{path} has {len(numbers)} numbers in line {number} of its words, and {width} in its first"
            )
        yield word.decode(errors="replace"), lambda numbers=numbers: _parsed(numbers, path)


def _parsed(numbers: list[bytes], path: Path) -> np.ndarray:
    try:
        return np.array([float(text) for text in numbers], np.float32)
    except ValueError as error:
        raise UserError(f"{path} has word vectors that are no numbers: {error}") from error


def _binary(file: BinaryIO, num_words: int, width: int) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    for _ in range(num_words):
        word = bytearray()
        while (byte := file.read(1)) not in (b" ", b""):
            word += byte
        raw = file.read(4 * width)
        if len(raw) < 4 * width:
            raise UserError(f"{file.name} ends within a word: it is not whole, or no word2vec file")
        yield word.strip().decode(errors="replace"), lambda raw=raw: np.frombuffer(raw, "<f4")


def embed_words(path: Path, tokenizer: Tokenizer, embedding_VD: np.ndarray, log: Callable[[str], None]) -> np.ndarray:
    """The drawn embedding with the file's vectors in the rows of those tokens whose text the file has.

    A token stands for the word that it is without spaces around, as it is written or else in lower case. Vectors have
    their mean taken away and get the deviation of the drawn rows. A wider model gets them turned at random, which
    keeps all angles; a narrower one their projection on the directions in which they differ most.

    Raises:
        UserError: as `read_vectors`, or it has no token's text.
    """
    texts = [raw.decode(errors="replace").strip() for raw in tokenizer.token_bytes()]
    wanted = {text for text in texts if text} | {text.lower() for text in texts if text}
    found = read_vectors(path, wanted)
    rows = {word: i for i, word in enumerate(found.words)}
    index_V = [rows.get(text, rows.get(text.lower(), -1)) if text else -1 for text in texts]
    tokens = np.array([v for v, i in enumerate(index_V) if i >= 0], np.int64)
    if not len(tokens):
        raise UserError(f"{path} has none of the tokens' texts among its {found.num_words:,} words")
    D = embedding_VD.shape[1]
    vectors = found.vectors_NW[[index_V[v] for v in tokens]]
    vectors = vectors - vectors.mean(axis=0)
    W = vectors.shape[1]
    if W < D:
        turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((D, W)))
        vectors = vectors @ turn.T.astype(np.float32)
    elif W > D:
        _, _, directions = np.linalg.svd(vectors, full_matrices=False)
        vectors = vectors @ directions[:D].T
        vectors = np.pad(vectors, ((0, 0), (0, D - vectors.shape[1])))  # of few words there are fewer directions
    embedding_VD = np.array(embedding_VD, np.float32)
    embedding_VD[tokens] = vectors * (embedding_VD.std() / max(vectors.std(), 1e-12))
    share = len(tokens) / len(texts)
    change = "" if W == D else f", of width {W} made {D}"
    log(f"{len(tokens):,} of {len(texts):,} tokens ({share:.1%}) begin as vectors of {path}{change}")
    return embedding_VD
