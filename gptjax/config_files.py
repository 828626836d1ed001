"""Configurations as files and plain data: read, written, compared. Only the standard library is imported."""

import dataclasses
import difflib
import json
import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.checks import require
from gptjax.config import Config, foreign_row_tokens
from gptjax.errors import UserError
from gptjax.plain_files import read_json


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data, tuples as lists, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any], kind: type = Config, where: str = "") -> Any:
    """The inverse of `to_dict`; fields left out get their defaults.

    Raises:
        UserError: a key that is no field, with the nearest one that is.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {where}{near[0]}?" if near else ""
            raise UserError(f"{where}{name} is not a field of the configuration{hint}")
        if dataclasses.is_dataclass(fields[name].type):
            require(isinstance(value, Mapping), f"{where}{name} is {value!r}, but must be a section of fields")
            value = from_dict(value, fields[name].type, f"{where}{name}.")
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


HOW_TO_USE = "python -m gptjax import {0} RUN makes a run of it, and --model.init-from {0} starts one from it"
"""Tells how to use another program's model where a command needs a run."""


def require_own(values: Any, path: Path) -> None:
    """
    Raises:
        UserError: what a `config.json` holds is another program's.
    """
    theirs = isinstance(values, Mapping) and bool({"model_type", "architectures"} & set(values))
    require(not theirs, f"{path.parent} is a Hugging Face model and no run; {HOW_TO_USE.format(path.parent)}")


def saved_config(values: Mapping[str, Any]) -> Config:
    """The configuration that a run saved, in `config.json` or with a checkpoint, and if it was long ago.

    Before there was `training.sequence_length`, rows were as long as the context; what was imported had no rows yet.

    Raises:
        UserError: as `from_dict`.
    """
    config = from_dict({name: value for name, value in values.items() if name != "environment"})
    if "sequence_length" in values.get("training", {}):
        return config
    imported = "imported" in values.get("environment", {})
    length = foreign_row_tokens(config.model) if imported else config.model.context_length
    return dataclasses.replace(config, training=dataclasses.replace(config.training, sequence_length=length))


def load_config(path: str | os.PathLike) -> Config:
    """Read a configuration from a Python file that assigns `config`, or from a run's `config.json`.

    Raises:
        UserError: the file is missing, or holds no configuration.
    """
    path = Path(path)
    if path.suffix == ".json":
        try:
            values = read_json(path)
        except OSError as error:
            raise UserError(f"{path} is no configuration: {error.strerror}") from None
        require(isinstance(values, Mapping), f"{path} is no configuration: it holds no object of fields")
        require_own(values, path)
        return saved_config(values) if "environment" in values else from_dict(values)
    require(not path.is_dir(), f"{path} is a folder; what is asked for is a configuration file that ends in .py")
    require(path.is_file(), f"no configuration file {path}{_nearest_file(path)}")
    require(path.suffix != ".gguf", f"{path} is neither a configuration nor a run; {HOW_TO_USE.format(path)}")
    names = run_file(path)
    config, recipe = names.get("config"), "recipe" in names
    hint = f"; it holds a recipe, which is for python -m gptjax recipe {path}" if recipe else ""
    require(isinstance(config, Config), f"{path} does not assign `config = Config(...)`{hint}")
    return config


def run_file(path: Path) -> dict[str, Any]:
    """What a data-only Python file assigns, by name.

    Raises:
        UserError: it fails, in whatever way the user's Python does.
    """
    try:
        return runpy.run_path(str(path))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error


def _nearest_file(path: Path) -> str:
    siblings = list(path.parent.iterdir()) if path.parent.is_dir() else []
    known = [p.name for p in siblings if p.suffix == ".py" or (p / "config.json").is_file()]
    near = difflib.get_close_matches(path.name, known, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def flat(config: Config) -> dict[str, Any]:
    """All fields, as `{"section.field": value}`."""
    fields = {}
    for name, value in to_dict(config).items():
        fields |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return fields


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Fields in which two configurations differ, as `{"section.field": (old, new)}`."""
    before, after = flat(old), flat(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def replace_fields(config: Config, fields: Mapping[str, Any]) -> Config:
    """A copy with `{"section.field": value}` set, validated once, after all of them are set."""
    values = to_dict(config)
    for name, value in fields.items():
        *sections, leaf = name.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[leaf] = value
    return from_dict(values)


def opened(config: Config) -> Config:
    """The same configuration, with every field None again whose value is the one that follows from other fields.

    A saved configuration has none left, so that a change of `training.batch_size` would meet the old micro-batches. Not
    opened is what belongs to the run: `optimizer.decay_steps` and `training.eval_sequences`, whose change would make
    its two halves incomparable; and what other things than fields decide: the data, the tokenizer and the devices.
    """
    sections = {name: getattr(config, name) for name in ("model", "training")}
    for name, section in sections.items():
        follow = [field.name for field in dataclasses.fields(section) if _follows(config, section, field.name)]
        sections[name] = dataclasses.replace(section, **dict.fromkeys(follow))
    return dataclasses.replace(config, **sections)


def _follows(config: Config, section: Any, name: str) -> bool:
    """Whether a field has the value that it would have if it were None."""
    if not hasattr(section, f"resolved_{name}"):
        return False
    try:
        derived = getattr(dataclasses.replace(section, **{name: None}), f"resolved_{name}")
    except UserError:  # it cannot be None here, such as head_dim where num_heads does not divide the width
        return False
    return getattr(section, name) in (None, derived(config.model) if callable(derived) else derived)
