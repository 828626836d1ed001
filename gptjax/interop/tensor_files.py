"""Safetensors of a Hugging Face directory: one file, or several with an index; read by pieces, written by shards.

The `safetensors` library checks headers, and nothing here is ever unpickled.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptjax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
SHARD_BYTES = 5 * 10**9
"""Most of one file that is written, as transformers has it, but for a tensor that is larger by itself."""


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""


class TensorFiles:
    """The tensors of a directory, none of them read before it is asked for."""

    def __init__(self, directory: Path):
        """
        Raises:
            UserError: there are none, or a file or the index is not what it should be.
        """
        self.directory = directory
        self.infos: dict[str, TensorInfo] = {}
        """By their names."""
        self._bytes: dict[Path, np.ndarray] = {}
        for file, expected in _files(directory).items():
            found = _header(file)
            if expected is not None and set(found) != expected:
                wrong = min(set(found) ^ expected)
                where = f"is in {file.name}" if wrong in found else f"should be in {file.name}"
                raise UserError(f"{directory / INDEX} does not fit its files: {wrong} {where}, and only one says so")
            self.infos |= found

    def open(self, name: str) -> np.ndarray:
        """A tensor in its own type, whose pages are read when they are used.

        Raises:
            UserError: its type is none of weights.
        """
        info = self.infos[name]
        if info.dtype not in FLOATS:
            raise UserError(f"{info.file}: {name} is of type {info.dtype}; weights of {', '.join(FLOATS)} can be read")
        if info.file not in self._bytes:
            self._bytes[info.file] = np.memmap(info.file, np.uint8, mode="r")
        return np.ndarray(info.shape, FLOATS[info.dtype], self._bytes[info.file], info.offset)


def copy_numbers(source: np.ndarray, target: np.ndarray) -> None:
    """Into float32, whose upper half bfloat16 is; that type's own conversion is slower."""
    if source.dtype == ml_dtypes.bfloat16:
        whole = target.view(np.uint32)
        whole[...] = source.view(np.uint16)
        whole <<= 16
    else:
        target[...] = source


def _header(file: Path) -> dict[str, TensorInfo]:
    """What a file holds. The library checks it: whether it is whole, and no tensor reaches into another."""
    try:
        with safe_open(file, framework="np"), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            tensors = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is no file of safetensors, or not a whole one: {' '.join(str(error).split())}"
        ) from error
    tensors.pop("__metadata__", None)
    return {
        name: TensorInfo(file, info["dtype"], tuple(info["shape"]), 8 + length + info["data_offsets"][0])
        for name, info in tensors.items()
    }


def _files(directory: Path) -> dict[Path, set[str] | None]:
    """The files, each with the names that an index says it has; None: no index."""
    if (directory / INDEX).is_file():
        path = directory / INDEX
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            found: dict[Path, set[str] | None] = {}
            for name, file in names.items():
                if os.path.basename(file) != file or file in ("", ".", ".."):
                    raise UserError(f"{path} places {name} in {file!r}, outside of the directory; that is not read")
                found.setdefault(directory / file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no index of safetensors: {error}") from error
        missing = [file.name for file in found if not file.is_file()]
        if missing:
            raise UserError(f"{path} names {missing[0]}, which is not there")
        return found
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickled:
        raise UserError(
            f"{directory} has its weights in {pickled[0]}, a pickle, which may run any code when it is read, and is "
            "not; convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    raise UserError(f"{directory} has no {SINGLE} and no {INDEX}")


def write_tensors(
    directory: Path,
    names: Sequence[str],
    read: Callable[[str], np.ndarray],
    sizes: Mapping[str, int],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as transformers does: `model.safetensors`, or shards of at most `shard_bytes` and their index.

    Args:
        read: gives a tensor; each is asked for once, and at most a shard of them is held.
        sizes: their bytes.
    """
    shards = list(_shards(names, sizes, shard_bytes))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: np.ascontiguousarray(read(name)) for name in shard}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(names: Sequence[str], sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    held = 0
    for name in names:
        if shard and held + sizes[name] > shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += sizes[name]
    yield shard
