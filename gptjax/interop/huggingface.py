"""Models of other programs read into ours, from Hugging Face directories and GGUF files, and ours written for them.

Shape suffixes: L layers, D inputs, F outputs, V rows of the vocabulary.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.interop.configs import family_of, from_theirs, to_theirs
from gptjax.interop.families import Family, Tensor
from gptjax.interop.places import open_tensors, read_values
from gptjax.interop.tensor_files import SHARD_BYTES, TensorFiles, copy_numbers, write_tensors
from gptjax.model.gpt import GPT, Params
from gptjax.text.files import load_tokenizer
from gptjax.text.special_tokens import GENERATION_CONFIG, TOKEN_IDS, TOKENIZER_CONFIG, ids
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.state import abstract_params

TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
"""In which weights can be written."""


def read_config(directory: Path) -> ModelConfig:
    """The model of a directory's `config.json`, or of a GGUF file.

    Raises:
        UserError: as `read_values` and `from_theirs`.
    """
    return from_theirs(read_values(directory))


def read_tokenizer(directory: Path, config: ModelConfig, log: Callable[[str], None]) -> Tokenizer:
    """The tokenizer of a directory or a GGUF file, with as many ids as the model has rows.

    Args:
        log: told of tokens without a row, of rows without a token, and of a tokenizer that names no end.

    Raises:
        UserError: as `load_tokenizer`, or it has ids for which the model has no row.
    """
    whole = load_tokenizer(directory)
    tokenizer = whole.with_vocab_size(config.vocab_size)
    if whole.vocab_size < config.vocab_size:
        log(f"{config.vocab_size - whole.vocab_size} rows of the model stand for no token, as is usual")
    if whole.vocab_size > config.vocab_size:
        names = ", ".join(sorted(tokenizer.without_rows))
        log(f"the model has no row for {names}, which was added to the tokenizer, and refuses texts that have it")
    for file, values in ({"config.json": read_values(directory)} | dict(whole.files)).items():
        for name in TOKEN_IDS:
            for number in ids(values.get(name)):
                if not 0 <= number < config.vocab_size:
                    log(f"{name} {number} of {file} is outside the vocabulary and is not used")
    if not tokenizer.stop_ids:
        log(
            f"no file of {directory} names a token that ends texts, so that length alone does: {TOKENIZER_CONFIG} "
            f"should have eos_token, or {GENERATION_CONFIG} eos_token_id"
        )
    return tokenizer


def read_params(directory: Path, config: ModelConfig) -> Params:
    """The parameters, float32, each read by pieces into its shards under the current mesh.

    Raises:
        UserError: tensors are missing or too many, or of another shape, or a file cannot be read.
    """
    files = open_tensors(directory)
    family = family_of(read_values(directory))
    shapes = abstract_params(GPT(config))
    tensors = _tensors_of(family, shapes)
    _require_equal(files, family, shapes, config)
    source = {path: (tensor, part) for tensor in tensors for part, path in enumerate(tensor.ours)}

    def read(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = _path(path)
        tensor, part = source[name]
        start = sum(_leaves(shapes)[ours].shape[-1] for ours in tensor.ours[:part])

        def theirs(number: int) -> np.ndarray:
            """All of this parameter, without the layers' dimension, as it lies in the file."""
            whole = files.open(_named(files, family, tensor.theirs.format(number)))
            if tensor.by_head:  # all of these have their outputs first
                heads = whole.reshape(config.num_heads, len(tensor.ours), -1, *whole.shape[1:])[:, part]
                return heads.reshape(leaf.shape[-1], *whole.shape[1:]).T
            whole = whole.T if tensor.transposed else whole
            return whole[..., start : start + leaf.shape[-1]]

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            bounds = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
            found = _aligned(tuple(s.stop - s.start for s in bounds))
            if name.startswith("blocks/"):
                for row, number in enumerate(range(bounds[0].start, bounds[0].stop)):
                    _copy(theirs(number)[bounds[1:]], found[row], pool)
            else:  # the vocabulary's padding has no rows there
                there = theirs(0)[bounds]
                _copy(there, found[: len(there)], pool)
                found[len(there) :] = 0.0
            return found

        where = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.make_array_from_callback(leaf.shape, where, piece)

    with ThreadPoolExecutor() as pool:
        return jax.tree_util.tree_map_with_path(read, shapes)


PANEL_NUMBERS = 2**16
"""What a thread copies at a time: transposing larger pieces would leave the processor's caches."""


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that begins where a CPU's device can take it over as it is."""
    size = 4 * math.prod(shape)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(np.float32).reshape(shape)


def _copy(source: np.ndarray, target: np.ndarray, pool: ThreadPoolExecutor) -> None:
    """Copy into float32, by all cores: along the dimension that lies apart in the source."""
    if source.ndim < 2 or source.size <= PANEL_NUMBERS:
        copy_numbers(source, target)
        return
    if source.strides[0] < source.strides[1]:
        source, target = source.T, target.T
    rows = max(1, PANEL_NUMBERS * len(source) // source.size)

    def copy(start: int) -> None:
        copy_numbers(source[start : start + rows], target[start : start + rows])

    list(pool.map(copy, range(0, len(source), rows)))


def _path(path: tuple) -> str:
    return "/".join(str(key.key) for key in path)


def _leaves(shapes: Params) -> dict[str, jax.ShapeDtypeStruct]:
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


def _tensors_of(family: Family, shapes: Params) -> list[Tensor]:
    """Those whose parameters the model has."""
    there = _leaves(shapes)
    tensors = [tensor for tensor in family.tensors if all(path in there for path in tensor.ours)]
    covered = {path for tensor in tensors for path in tensor.ours}
    assert covered == set(there), f"{family.model_type} has no names for {sorted(set(there) - covered)}"
    return tensors


def _named(files: TensorFiles, family: Family, name: str) -> str:
    """The name as the files have it."""
    short = name.removeprefix(family.prefix)
    return short if family.prefix and name not in files.infos and short in files.infos else name


def tensor_shapes(family: Family, config: ModelConfig, params: Params) -> dict[str, tuple[int, ...]]:
    """The tensors of a model as its family writes them, by name, in their order.

    Args:
        params: the model's, or their shapes.
    """
    return {
        tensor.theirs.format(number): _their_shape(tensor, params, config)
        for tensor, number in _each(_tensors_of(family, params), config)
    }


def _their_shape(tensor: Tensor, shapes: Params, config: ModelConfig) -> tuple[int, ...]:
    leaves = [_leaves(shapes)[path] for path in tensor.ours]
    own = [
        leaf.shape[1:] if path.startswith("blocks/") else leaf.shape
        for path, leaf in zip(tensor.ours, leaves, strict=True)
    ]
    if tensor.ours[0] in ("embedding", "head"):
        return config.vocab_size, own[0][1]
    whole = (*own[0][:-1], sum(shape[-1] for shape in own))
    return whole[::-1] if tensor.transposed else whole


def _require_equal(files: TensorFiles, family: Family, shapes: Params, config: ModelConfig) -> None:
    theirs = tensor_shapes(family, config, shapes)
    wanted = {_named(files, family, name): shape for name, shape in theirs.items()}
    missing = sorted(set(wanted) - set(files.infos))
    if missing:
        raise UserError(f"{files.directory} lacks the tensor {missing[0]}{_more(missing)}")
    # A head that is the embedding is written twice by some.
    unused = {"lm_head.weight", "embed_out.weight"} if config.tie_embeddings else set()
    extra = sorted(
        name for name in set(files.infos) - set(wanted) - unused if not name.endswith(family.buffers or ("\0",))
    )
    if extra:
        raise UserError(
            f"{files.directory} has the tensor {extra[0]}{_more(extra)}, for which the {family.model_type} model of "
            "its config.json has no place"
        )
    for name, shape in wanted.items():
        found = files.infos[name].shape
        if found != shape:
            raise UserError(f"{files.directory}: {name} has the shape {[*found]}, but config.json asks for {[*shape]}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _each(tensors: list[Tensor], config: ModelConfig) -> Iterator[tuple[Tensor, int]]:
    """Each tensor, of blocks once for each layer, as models list them."""
    blocks = [tensor for tensor in tensors if "{}" in tensor.theirs]
    place = next((i for i, tensor in enumerate(tensors) if "{}" in tensor.theirs), 0)
    others = [tensor for tensor in tensors if "{}" not in tensor.theirs]
    yield from ((tensor, 0) for tensor in others[:place])
    for number in range(config.num_layers):
        yield from ((tensor, number) for tensor in blocks)
    yield from ((tensor, 0) for tensor in others[place:])


def write_model(
    directory: Path,
    config: ModelConfig,
    params: Params,
    *,
    dtype: str = "float32",
    generation: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Family:
    """Write `config.json`, `generation_config.json` and the weights, as transformers does.

    Args:
        generation: what `generation_config.json` holds; its ids of special tokens stand in `config.json`, too.

    Raises:
        UserError: as `to_theirs`.
    """
    family, theirs = to_theirs(config)
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tensors = _tensors_of(family, params)
    generation = generation or {}
    theirs |= {"dtype": dtype} | {name: generation.get(name) for name in TOKEN_IDS}
    (directory / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
    (directory / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    named = {tensor.theirs.format(number): (tensor, number) for tensor, number in _each(tensors, config)}
    width = np.dtype(TYPES[dtype]).itemsize
    sizes = {name: width * math.prod(shape) for name, shape in tensor_shapes(family, config, params).items()}

    def read(name: str) -> np.ndarray:
        tensor, number = named[name]
        return _theirs(tensor, number, leaves, config).astype(TYPES[dtype])

    write_tensors(directory, [*named], read, sizes, shard_bytes)
    return family


def _theirs(tensor: Tensor, number: int, leaves: Mapping[str, jax.Array], config: ModelConfig) -> np.ndarray:
    parts = []
    for path in tensor.ours:
        leaf = leaves[path][number] if path.startswith("blocks/") else leaves[path]
        parts.append(np.asarray(jax.device_get(leaf), np.float32))
    if tensor.ours[0] in ("embedding", "head"):
        return parts[0][: config.vocab_size]
    if tensor.by_head:
        heads = [part.reshape(*part.shape[:-1], config.num_heads, 1, -1) for part in parts]
        whole = np.concatenate(heads, axis=-2).reshape(*parts[0].shape[:-1], -1)
    else:
        whole = np.concatenate(parts, axis=-1)
    return whole.T if tensor.transposed else whole
