"""A Hugging Face `config.json` as a `ModelConfig`, and the other way round, by the tables of `families.py`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.checks import require
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.interop.families import FAMILIES, Family, Field
from gptjax.interop.ignored import IGNORED, IGNORED_WHEN, REFUSED
from gptjax.interop.rope_fields import read_rope, rope_fields, why_not_rope, write_rope

CONFIG_FILE = "config.json"
HUGGING_FACE = ("model_type", "architectures", "hidden_size", "n_embd", "num_hidden_layers", "n_layer")
"""Fields that tell a `config.json` of Hugging Face's from a run's, whose model has a section of its own."""
NEEDED = ("vocab_size", "model_dim", "num_layers", "num_heads")
FAMILY_FIELDS = (
    *("norm", "norm_position", "norm_bias", "norm_zero_centered", "positions", "rope_scaling", "parallel_residual"),
    *("query_scale_dim", "qk_norm", "attention_softcap", "logit_softcap", "bias", "qkv_bias", "ffn_bias", "head_bias"),
    *("scale_embedding", "rope_fraction", "value_head", "parametrization"),
)
"""Fields of ours that decide the mathematics, and that a family may leave no choice about."""


def read_json(directory: Path) -> dict[str, Any]:
    """A directory's `config.json`.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no model in {directory}: {path.name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    require(isinstance(values, dict), f"{path} holds no object of fields")
    return values


def is_huggingface(directory: Path) -> bool:
    """Whether a directory's `config.json` is one of Hugging Face's, even one that lacks its `model_type`."""
    try:
        values = read_json(directory)
    except UserError:
        return False
    return not isinstance(values.get("model"), dict) and any(name in values for name in HUGGING_FACE)


def family_of(values: Mapping[str, Any]) -> Family:
    """
    Raises:
        UserError: its `model_type` is not known here, or there is none.
    """
    name, known = values.get("model_type"), f"those that gptjax can compute are {', '.join(FAMILIES)}"
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    require(name is None, f"config.json has model_type {json.dumps(name)}; {known}")
    named = values.get("architectures") or []
    fitting = next((family for family in FAMILIES.values() if family.architecture in named), None)
    hint = f"; for {fitting.architecture}, which its architectures name, it is {fitting.model_type}" if fitting else ""
    raise UserError(f"config.json lacks model_type, which says how a model is computed{hint}; {known}")


def from_theirs(values: Mapping[str, Any]) -> ModelConfig:
    """The model that a `config.json` describes.

    Raises:
        UserError: its `model_type` is unknown; a field is missing, or has a value, or is one, that changes what a model
            computes in a way that is not known here.
    """
    family = family_of(values)
    try:
        return _from_theirs(family, values)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json of a {family.model_type} model cannot be understood: {error!r}") from error


def _from_theirs(family: Family, values: Mapping[str, Any]) -> ModelConfig:
    own = {field.theirs for field in family.fields} | set(family.required) | set(family.window_fields)
    own |= rope_fields(family)
    for name, value in values.items():
        if name not in own:
            _require_ignored(family, name, value)
    for name, allowed in family.required.items():
        value = values.get(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"config.json has {name} = {json.dumps(value)}, which gptjax cannot compute; "
                f"{json.dumps(allowed[0])} works"
            )
    ours = dict(family.fixed)
    for field in family.fields:
        ours[field.ours] = _read(field, values)
        require(
            ours[field.ours] is not None or field.ours not in NEEDED,
            f"config.json lacks {field.theirs}, which it needs",
        )
    if family.rope:
        ours |= read_rope(family, values, ours["context_length"])
    if family.windows != "none":
        ours |= _read_windows(family, values, ours["num_layers"])
    if ours.get("query_scale_dim") is not None:
        ours["query_scale_dim"] = float(ours["query_scale_dim"])
    return ModelConfig(**ours)


def _read(field: Field, values: Mapping[str, Any]) -> Any:
    value = values.get(field.theirs, field.default)
    if field.values is None:
        return value
    if value in field.values:
        return field.values[value]
    if field.others:
        return value
    raise UserError(
        f"config.json has {field.theirs} = {json.dumps(value)}, which gptjax cannot compute; "
        f"{' and '.join(map(str, field.values))} work"
    )


def _require_ignored(family: Family, name: str, value: Any) -> None:
    """
    Raises:
        UserError: this field, which is none of the family's, may change what the model computes.
    """
    require(name not in REFUSED or value is None, f"config.json has {name}: {REFUSED.get(name)}")
    if name in IGNORED or name.startswith("_") or value in (None, False):
        return
    if name in IGNORED_WHEN:
        allowed, why = IGNORED_WHEN[name]
        require(
            value in allowed,
            f"config.json has {name} = {json.dumps(value)}, which {family.model_type} models of gptjax cannot have; "
            f"{json.dumps(allowed[0])} works: {why}",
        )
        return
    raise UserError(
        f"config.json has {name} = {json.dumps(value)}, which gptjax does not know of {family.model_type} "
        "models: it may change what the model computes; take it out if it does not"
    )


def _read_windows(family: Family, values: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    window, has = values.get("sliding_window", 4096), family.window_fields
    if "use_sliding_window" in has and not values.get("use_sliding_window", False):
        window = None
    twice = values.get("sliding_window_size")  # as some of Gemma 2's files have it
    require(
        twice in (None, window),
        f"config.json has sliding_window_size {twice}, which transformers does not read: it takes "
        f"sliding_window, {window}",
    )
    if family.windows == "all":
        kinds = ["full_attention" if window is None else "sliding_attention"] * num_layers
    elif family.window_period > 1:
        period = family.window_period
        if "sliding_window_pattern" in has:
            period = values.get("sliding_window_pattern", period)
        kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)]
    else:
        first = num_layers if window is None else values.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    given = values.get("layer_types")
    if given is not None:
        names = ("full_attention", "sliding_attention")
        unknown = next((kind for kind in given if kind not in names), None)
        require(unknown is None, f"config.json has a layer of {unknown!r}; those that gptjax computes are {[*names]}")
        require(len(given) == num_layers, f"config.json has {len(given)} layer_types for {num_layers} layers")
        require(
            family.windows != "all" or given == kinds,
            f"config.json has layer_types, which {family.model_type} models do not read: with its sliding_window all "
            f"layers are of {kinds[0]}",
        )
        kinds = given
    if "sliding_attention" not in kinds:
        return {"attention_pattern": ("dense",)}
    require(window is not None, "config.json has layers of sliding_attention, and no sliding_window")
    pattern = ["local" if kind == "sliding_attention" else "dense" for kind in kinds]
    return {"attention_pattern": _period(pattern), "attention_window": int(window)}


def _period(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives these."""
    size = next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
    return tuple(kinds[:size])


def to_theirs(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that a model is of, and its `config.json`.

    Raises:
        UserError: it is of none, with the family that is nearest and what differs.
    """
    reasons = {}
    for family in FAMILIES.values():
        reasons[family.model_type] = why_not(family, config)
        if not reasons[family.model_type]:
            return family, _write(family, config)
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    raise UserError(
        f"transformers has no model like this one; the nearest it has is {nearest}, which needs "
        f"{', '.join(reasons[nearest])}"
    )


def why_not(family: Family, config: ModelConfig) -> list[str]:
    """What of a model a family does not have; nothing: the model is one of it."""
    config, default, given = config.filled(), ModelConfig(), {field.ours: field for field in family.fields}
    found = []
    for name in FAMILY_FIELDS:
        value = getattr(config, name)
        if name in given or (name == "rope_scaling" and family.rope):
            continue
        if name == "rope_fraction" and (not family.rope or family.rope_fraction is not None):
            continue
        if name == "norm_bias" and config.norm == "rmsnorm":
            continue
        expected = family.fixed.get(name, getattr(default, name))
        if name == "query_scale_dim":
            expected = float(config.resolved_head_dim)
        if value != expected:
            found.append(f"{name} {expected} instead of {value}")
    for name, field in given.items():
        if field.values is not None and not field.others and getattr(config, name) not in field.values.values():
            found.append(f"{name} {' or '.join(dict.fromkeys(field.values.values()))}, not {getattr(config, name)}")
    if "qkv_bias" in given and given["qkv_bias"].theirs == given["bias"].theirs and config.qkv_bias != config.bias:
        found.append(f"qkv_bias {config.bias}, as bias is, instead of {config.qkv_bias}")
    if "query_scale_dim" in given and config.query_scale_dim != int(config.query_scale_dim):
        found.append(f"a whole number for query_scale_dim, not {config.query_scale_dim:g}")
    kinds = {"local" if window else "dense" for window in config.layer_windows}
    if "local" in kinds and (family.windows == "none" or (family.windows == "all" and len(kinds) > 1)):
        found.append(f"{'no' if family.windows == 'none' else 'no mixed'} banded layers")
    if family.rope and config.positions == "rope":
        found += why_not_rope(family, config)
    if family.whole_heads and config.model_dim % config.num_heads:
        found.append(f"a model_dim that num_heads {config.num_heads} divides, not {config.model_dim}")
    if config.resolved_head_dim * config.num_heads != config.model_dim and "head_dim" not in given:
        found.append("num_heads heads that are together as wide as the model")
    if config.resolved_num_kv_heads != config.num_heads and "num_kv_heads" not in given:
        found.append("as many key/value heads as heads")
    return found


def _write(family: Family, config: ModelConfig) -> dict[str, Any]:
    c, default = config.filled(), ModelConfig()
    theirs: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for field in family.fields:
        value = getattr(c, field.ours)
        if isinstance(getattr(default, field.ours), float):  # transformers takes no whole number for one of these
            value = float(value)
        names = {ours: name for name, ours in reversed((field.values or {}).items())}
        value = names.get(value, value)
        theirs[field.theirs] = int(value) if field.ours == "query_scale_dim" and value == int(value) else value
    theirs |= {name: allowed[0] for name, allowed in family.required.items()}
    if family.rope:
        theirs["rope_parameters"] = write_rope(family, c)
    kinds = ["sliding_attention" if window else "full_attention" for window in c.layer_windows]
    local = "sliding_attention" in kinds
    if family.windows != "none":
        theirs["sliding_window"] = c.attention_window if local or family.window_period > 1 else None
    if family.windows == "layers":
        theirs["layer_types"] = kinds
        if family.window_period == 1:
            theirs |= {"use_sliding_window": local, "max_window_layers": kinds.count("full_attention")}
    return theirs
