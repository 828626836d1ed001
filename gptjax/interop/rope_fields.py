"""The fields of a Hugging Face `config.json` that say how rotary positions are computed, read and written."""

import json
import math
from collections.abc import Mapping
from typing import Any

from gptjax.checks import require
from gptjax.config import ModelConfig
from gptjax.interop.families import Family

ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn", "longrope": "longrope"}


def rope_fields(family: Family) -> set[str]:
    """Those of its `config.json` that are read of rotary positions."""
    if not family.rope:
        return set()
    local = {"rope_local_base_freq"} if family.rope_local_base is not None else set()
    share = {"rotary_pct", "partial_rotary_factor"} if family.rope_fraction is not None else set()
    return {*ROPE_FIELDS, family.rope_base_field} | local | share


def read_rope(family: Family, values: Mapping[str, Any], context_length: int) -> dict[str, Any]:
    """Rotary positions, as transformers 5 writes them (`rope_parameters`) or as older ones did."""
    full, local = _rope_of_layers(family, values)
    for parameters in filter(None, (full, local)):
        _require_fraction(family, values, parameters)
    scaling = _read_scaling(full, context_length)
    ours = {"rope_base": float(full["rope_theta"]), **scaling}
    if family.rope_fraction is not None:
        ours["rope_fraction"] = float(full["partial_rotary_factor"])
    if local is None:
        return ours | {"rope_scale_local": scaling["rope_scaling"] != "none"}
    scaling_of_local = _read_scaling(local, context_length)
    is_plain = scaling_of_local["rope_scaling"] == "none"
    require(
        is_plain or scaling_of_local == scaling,
        f"config.json scales rotary positions of sliding_attention by {scaling_of_local['rope_scaling']}, and those of "
        "full_attention in another way; default works",
    )
    return ours | {"rope_local_base": float(local["rope_theta"]), "rope_scale_local": not is_plain}


def _rope_of_layers(family: Family, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Rotary parameters of all layers, or of those without a window and those with one, where a family has two kinds.

    Where a file has both the fields of transformers 5 and older ones, they are put together as it does.
    """
    given, scaling = values.get("rope_parameters"), values.get("rope_scaling")
    base = values.get(family.rope_base_field, family.rope_base)
    if family.rope_local_base is None:
        full = dict(scaling or (family.rope_default if given is None else given) or {})
        nested = next((name for name, value in full.items() if isinstance(value, dict)), None)
        require(
            nested is None,
            f"config.json has rope_parameters for {nested}, and all layers of {family.model_type} models have the same",
        )
        if "original_max_position_embeddings" in values:
            full["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        return {"rope_theta": base} | full, None
    kinds = given or {}
    unknown = next((name for name in kinds if name not in ("full_attention", "sliding_attention")), None)
    require(
        unknown is None,
        f"config.json has {unknown} in its rope_parameters, where {family.model_type} models have full_attention and "
        "sliding_attention",
    )
    scaling = scaling or {}
    require(
        "type" not in scaling or "rope_type" in scaling,
        f"config.json has type in its rope_scaling, which {family.model_type} models do not read; rope_type is what "
        "they read",
    )
    full = {"rope_theta": base} | (kinds.get("full_attention") or {}) | scaling
    local_base = values.get("rope_local_base_freq", family.rope_local_base)
    local = {"rope_theta": local_base} | (kinds.get("sliding_attention") or {})
    require(
        bool(full.get("truncate", True)),
        f"config.json has truncate = false in its rope_parameters, which {family.model_type} models do not read",
    )
    return full, local


def _require_fraction(family: Family, values: Mapping[str, Any], parameters: dict[str, Any]) -> None:
    """Fill in which share of each head is rotated, where the family has a choice.

    Raises:
        UserError: it has none, and here is another; or a field says something else, and transformers does not read it.
    """
    if family.rope_fraction is None:  # names outside of rope_parameters are in IGNORED_WHEN
        share = parameters.get("partial_rotary_factor")
        require(
            share in (None, 1),
            f"config.json rotates {share} of each head, and {family.model_type} models rotate all of it; 1.0 works",
        )
        return
    share = parameters.setdefault("partial_rotary_factor", values.get("rotary_pct", family.rope_fraction))
    for name, used in (("partial_rotary_factor", share), ("rope_theta", parameters["rope_theta"])):
        require(
            values.get(name) in (None, used),
            f"config.json has {name} = {json.dumps(values.get(name))}, which {family.model_type} models do not read: "
            f"they have {json.dumps(used)}, of rope_parameters, rotary_pct or rotary_emb_base",
        )


def _read_scaling(theirs: Mapping[str, Any], context_length: int) -> dict[str, Any]:
    """Our fields of one of their sets of rotary parameters."""
    kind = theirs.get("rope_type", theirs.get("type", "default"))
    require(
        kind in SCALINGS, f"config.json scales rotary positions by {kind!r}; those that gptjax knows are {[*SCALINGS]}"
    )
    ours: dict[str, Any] = {"rope_scaling": SCALINGS[kind]}
    if kind == "default":
        return ours
    wanted = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "longrope": ("short_factor", "long_factor")}
    missing = next((name for name in wanted.get(kind, ("factor",)) if name not in theirs), None)
    require(missing is None, f"config.json scales rotary positions by {kind}, and does not say by what {missing}")
    original = theirs.get("original_max_position_embeddings", context_length)
    factor = theirs.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = context_length / original
    if kind == "longrope":  # of which only its attention factor is made
        factor = max(1.0, factor)
    ours["rope_factor"] = float(factor)
    if kind == "linear":
        return ours
    ours["rope_original_length"] = int(original)
    if kind == "llama3":
        return ours | {
            "rope_low_frequency": float(theirs["low_freq_factor"]),
            "rope_high_frequency": float(theirs["high_freq_factor"]),
        }
    if theirs.get("attention_factor") is not None:
        ours["rope_attention_factor"] = float(theirs["attention_factor"])
    if kind == "longrope":
        return ours | {
            "rope_short_factors": tuple(map(float, theirs["short_factor"])),
            "rope_long_factors": tuple(map(float, theirs["long_factor"])),
        }
    above, below = theirs.get("mscale"), theirs.get("mscale_all_dim")  # DeepSeek's, of which both have to be there
    if above and below and theirs.get("attention_factor") is None:
        above, below = (0.1 * scale * math.log(factor) + 1 for scale in (above, below))
        ours["rope_attention_factor"] = above / below
    return ours | {
        "rope_low_frequency": float(theirs.get("beta_slow") or 1),
        "rope_high_frequency": float(theirs.get("beta_fast") or 32),
        "rope_truncate": bool(theirs.get("truncate", True)),
    }


def why_not_rope(family: Family, c: ModelConfig) -> list[str]:
    """What of a model's rotary positions a family does not have; `c` is filled."""
    if family.rope_local_base is not None:
        truncated = c.rope_scaling != "yarn" or c.rope_truncate
        return [] if truncated else ["rope_truncate True instead of False"]
    kinds = {window is not None for window in c.layer_windows}
    if len(kinds) == 1 or _parameters(c, local=False) == _parameters(c, local=True):
        return []
    if c.rope_local_base != c.rope_base:
        return ["one rope_base for all layers"]
    return ["rope_scale_local True instead of False, as its layers with a window are scaled, too"]


def write_rope(family: Family, c: ModelConfig) -> dict[str, Any]:
    """Their `rope_parameters`; `c` is filled."""
    if family.rope_local_base is not None:
        return {"full_attention": _parameters(c, local=False), "sliding_attention": _parameters(c, local=True)}
    theirs = _parameters(c, local=all(c.layer_windows))
    if family.rope_fraction is not None:
        theirs["partial_rotary_factor"] = c.rope_fraction
    return theirs


def _parameters(c: ModelConfig, *, local: bool) -> dict[str, Any]:
    """Their rotary parameters of dense or of local layers; `c` is filled."""
    theirs: dict[str, Any] = {"rope_type": "default", "rope_theta": float(c.rope_local_base if local else c.rope_base)}
    if c.rope_scaling == "none" or (local and not c.rope_scale_local):
        return theirs
    theirs |= {"rope_type": c.rope_scaling, "factor": float(c.rope_factor)}
    if c.rope_scaling == "linear":
        return theirs
    theirs["original_max_position_embeddings"] = c.rope_original_length
    if c.rope_scaling == "llama3":
        low, high = float(c.rope_low_frequency), float(c.rope_high_frequency)
        return theirs | {"low_freq_factor": low, "high_freq_factor": high}
    theirs["attention_factor"] = float(c.rope_attention_factor)
    if c.rope_scaling == "longrope":
        return theirs | {"short_factor": [*c.rope_short_factors], "long_factor": [*c.rope_long_factors]}
    low, high = float(c.rope_low_frequency), float(c.rope_high_frequency)
    return theirs | {"beta_slow": low, "beta_fast": high, "truncate": c.rope_truncate}
