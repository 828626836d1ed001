"""A Hugging Face `config.json` as a `ModelConfig`, and the other way round, by the tables of `families.py`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.checks import require
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.interop.families import FAMILIES, HARMLESS, Family, Field

CONFIG_FILE = "config.json"
ROPE_FIELDS = (
    *("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base"),
    *("partial_rotary_factor", "rotary_pct"),
)
WINDOW_FIELDS = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers", "sliding_window_pattern")
NEEDED = ("vocab_size", "model_dim", "num_layers", "num_heads")
FAMILY_FIELDS = (
    *("norm", "norm_position", "norm_bias", "norm_zero_centered", "positions", "rope_scaling", "parallel_residual"),
    *("query_scale_dim", "qk_norm", "attention_softcap", "logit_softcap", "bias", "qkv_bias", "head_bias"),
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
    """Whether a directory's `config.json` is one of Hugging Face's; a run's has no `model_type`."""
    try:
        return "model_type" in read_json(directory)
    except UserError:
        return False


def family_of(values: Mapping[str, Any]) -> Family:
    """
    Raises:
        UserError: its `model_type` is not known here.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"model_type {name!r} is none of those that gptjax can compute: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def from_theirs(values: Mapping[str, Any]) -> ModelConfig:
    """The model that a `config.json` describes.

    Raises:
        UserError: its `model_type` is unknown; a field is missing, or has a value, or is one, that changes what a model
            computes in a way that is not known here.
    """
    family = family_of(values)
    try:
        return _from_theirs(family, values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"config.json of a {family.model_type} model cannot be understood: {error!r}") from error


def _from_theirs(family: Family, values: Mapping[str, Any]) -> ModelConfig:
    known = {field.theirs for field in family.fields} | set(family.required) | HARMLESS
    known |= set(ROPE_FIELDS) if family.rope else set()
    known |= set(WINDOW_FIELDS) if family.windows != "none" else set()
    for name, value in values.items():
        if name not in known and not name.startswith("_") and value not in (None, False):
            raise UserError(
                f"config.json has {name} = {json.dumps(value)}, which gptjax does not know of {family.model_type} "
                "models: it may change what the model computes; take it out if it does not"
            )
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
        ours |= _read_rope(family, values)
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


def _read_rope(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """From `rope_parameters` of transformers 5, or the fields that older ones have."""
    given, scaling = values.get("rope_parameters") or {}, dict(values.get("rope_scaling") or {})
    require(
        not family.rope_needed or bool(given or scaling),
        f"config.json lacks rope_parameters, which {family.model_type} models need: without them they are scaled in a "
        "way of their own",
    )
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    if given and "full_attention" not in given:
        given = given | scaling  # what transformers does with both
    full, local = given.get("full_attention", given), given.get("sliding_attention")
    if not given:
        base = values.get("rotary_emb_base", family.rope_base)
        full = {"rope_theta": values.get("rope_theta", base)} | scaling
        if family.rope_local_base is not None:
            local = {"rope_theta": values.get("rope_local_base_freq", family.rope_local_base)}
    kind = full.get("rope_type", "default")
    kinds = {"default": "none", "linear": "linear", "llama3": "llama3"}
    require(kind in kinds, f"config.json scales rotary positions by {kind!r}; those that gptjax knows are {[*kinds]}")
    local_kind = (local or {}).get("rope_type", "default")
    require(local_kind == "default", f"config.json scales the rotary positions of local layers by {local_kind!r}")
    fraction = values.get("partial_rotary_factor", values.get("rotary_pct", family.rope_fraction))
    ours = {
        "rope_base": float(full.get("rope_theta", family.rope_base)),
        "rope_fraction": float(full.get("partial_rotary_factor", fraction)),
        "rope_scaling": kinds[kind],
    }
    if local is not None:
        ours["rope_local_base"] = float(local.get("rope_theta", family.rope_local_base or family.rope_base))
    if kind != "default":
        require("factor" in full, f"config.json scales rotary positions by {kind}, and does not say by what factor")
        ours["rope_factor"] = float(full["factor"])
    if kind == "llama3":
        ours["rope_original_length"] = int(full["original_max_position_embeddings"])
        ours["rope_low_frequency"] = float(full["low_freq_factor"])
        ours["rope_high_frequency"] = float(full["high_freq_factor"])
    return ours


def _read_windows(family: Family, values: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    window = values.get("sliding_window")
    if family.window_period > 1:
        window = values.get("sliding_window", 4096)
    elif not values.get("use_sliding_window", True):
        window = None
    kinds = values.get("layer_types")
    if kinds is None and family.windows == "all":
        kinds = ["sliding_attention"] * num_layers
    elif kinds is None and family.window_period > 1:
        period = values.get("sliding_window_pattern", values.get("_sliding_window_pattern", family.window_period))
        kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(num_layers)]
    elif kinds is None:
        first = values.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    names = {"full_attention": "dense", "sliding_attention": "local"}
    unknown = next((kind for kind in kinds if kind not in names), None)
    require(unknown is None, f"config.json has a layer of {unknown!r}; those that gptjax computes are {[*names]}")
    require(len(kinds) == num_layers, f"config.json has {len(kinds)} layer_types for {num_layers} layers")
    if window is None:
        return {"attention_pattern": ("dense",)}
    return {"attention_pattern": _period([names[kind] for kind in kinds]), "attention_window": int(window)}


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
    default, given = ModelConfig(), {field.ours: field for field in family.fields}
    config = dataclasses.replace(
        config,
        qkv_bias=config.resolved_qkv_bias,
        query_scale_dim=config.resolved_query_scale_dim,
        rope_local_base=config.resolved_rope_local_base,
    )
    found = []
    for name in FAMILY_FIELDS:
        value = getattr(config, name)
        if name in given or (name in ("rope_fraction", "rope_scaling") and family.rope):
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
    kinds = {"local" if window else "dense" for window in config.layer_windows}
    if "local" in kinds and (family.windows == "none" or (family.windows == "all" and len(kinds) > 1)):
        found.append(f"{'no' if family.windows == 'none' else 'no mixed'} banded layers")
    if family.rope_local_base is None and "local" in kinds and config.rope_local_base != config.rope_base:
        found.append("one rope_base for all layers")
    if config.resolved_head_dim * config.num_heads != config.model_dim and "head_dim" not in given:
        found.append("num_heads heads that are together as wide as the model")
    if config.resolved_num_kv_heads != config.num_heads and "num_kv_heads" not in given:
        found.append("as many key/value heads as heads")
    return found


def _write(family: Family, config: ModelConfig) -> dict[str, Any]:
    c = config
    resolved = dataclasses.replace(
        c,
        num_kv_heads=c.resolved_num_kv_heads,
        head_dim=c.resolved_head_dim,
        ffn_dim=c.resolved_ffn_dim,
        query_scale_dim=c.resolved_query_scale_dim,
    )
    theirs: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for field in family.fields:
        value = getattr(resolved, field.ours)
        names = {ours: name for name, ours in reversed((field.values or {}).items())}
        value = names.get(value, value)
        theirs[field.theirs] = int(value) if field.ours == "query_scale_dim" and value == int(value) else value
    theirs |= {name: allowed[0] for name, allowed in family.required.items()}
    if family.rope:
        theirs["rope_parameters"] = _write_rope(family, c)
    kinds = ["sliding_attention" if window else "full_attention" for window in c.layer_windows]
    local = "sliding_attention" in kinds
    if family.windows != "none":
        theirs["sliding_window"] = c.attention_window if local or family.window_period > 1 else None
    if family.windows == "layers":
        theirs["layer_types"] = kinds
        if family.window_period == 1:
            theirs |= {"use_sliding_window": local, "max_window_layers": kinds.count("full_attention")}
    return theirs


def _write_rope(family: Family, c: ModelConfig) -> dict[str, Any]:
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_base}
    if c.rope_scaling != "none":
        full |= {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        full |= {
            "original_max_position_embeddings": c.rope_original_length,
            "low_freq_factor": c.rope_low_frequency,
            "high_freq_factor": c.rope_high_frequency,
        }
    if c.rope_fraction != 1.0:
        full["partial_rotary_factor"] = c.rope_fraction
    if family.rope_local_base is None:
        return full
    local = {"rope_type": "default", "rope_theta": c.resolved_rope_local_base}
    return {"full_attention": full, "sliding_attention": local}
