"""What a run starts from: parameters that are drawn, or those of another run, with its shape and its tokenizer."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from gptjax.config import Config, ModelConfig, foreign_row_tokens
from gptjax.errors import UserError
from gptjax.interop.huggingface import read_config
from gptjax.interop.places import is_foreign
from gptjax.interop.transfer import imported_from
from gptjax.interop.word_vectors import embed_words
from gptjax.model.gpt import GPT, VALUE_HEAD, Params
from gptjax.model.workload import Networks, NetworksOf, Rows, fewest_rows, networks
from gptjax.text.files import load_tokenizer
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.load import load_run
from gptjax.training.run_dir import CONFIG_FILE, TOKENIZER_FILE, load_run_config
from gptjax.training.state import draw_params

DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout")
OWN = (
    *("init_from", "init_embeddings", "value_head", *DROPOUTS),
    *("scan_layers", "remat", "attention_kernel", "compute_dtype", "fp8"),
)
"""Fields of the model that a run decides for itself; the others are its shape."""


def inherit(config: Config, continued: bool = False, log: Callable[[str], None] = lambda line: None) -> Config:
    """The configuration with the shape and the tokenizer of `model.init_from`, where that is given, and rows as long.

    Args:
        continued: whether the run has begun: then it knows these itself, if what it began with is gone.
        log: is told how long rows are, where `training.sequence_length` does not say.

    Raises:
        UserError: it is no run, or another shape or tokenizer was asked for.
    """
    source = config.model.init_from
    if not source:
        return config
    gone = continued and not (is_foreign(Path(source)) or Path(source, CONFIG_FILE).is_file())
    place = Path(config.run_dir if gone else source)
    model = model_of(place)
    default, shape = ModelConfig(), {}
    for field in dataclasses.fields(ModelConfig):
        asked, there = getattr(config.model, field.name), getattr(model, field.name)
        if field.name in OWN:
            continue
        if asked not in (there, getattr(default, field.name)):
            raise UserError(
                f"model.{field.name} is {asked}, but the model of {source} has {there}; leave it out, or start without "
                "model.init_from"
            )
        shape[field.name] = there
    path = str(Path(source) if is_foreign(Path(source)) else Path(source) / TOKENIZER_FILE)
    if gone:
        path = load_run_config(config.run_dir)[0].tokenizer.path
    if config.tokenizer.path not in ("", path):
        raise UserError(
            f"tokenizer.path is {config.tokenizer.path}, but the model of {source} knows only the ids of its own; "
            "leave it out"
        )
    tokenizer = dataclasses.replace(config.tokenizer, path=path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **shape), tokenizer=tokenizer)
    if not continued and imported_from(place):
        for name in DROPOUTS:
            if (rate := getattr(config.model, name)) > getattr(model, name):
                log(
                    f"model.{name} is {rate:g}, with which {source} may never have been trained: its loss can begin "
                    f"nats higher; --model.{name.replace('_', '-')} 0 leaves it out"
                )
    if continued or config.training.sequence_length:
        return config
    length, reason = _row_length(place, model)
    log(f"rows of {length} tokens: {reason}; training.sequence_length decides otherwise")
    return dataclasses.replace(config, training=dataclasses.replace(config.training, sequence_length=length))


def _row_length(place: Path, model: ModelConfig) -> tuple[int, str]:
    """Tokens of a row where nobody says how many, and why so many."""
    if not is_foreign(place):
        return load_run_config(place)[0].sequence_length, f"those of {place}"
    length = foreign_row_tokens(model)
    if length == model.context_length:
        return length, f"the context of {place}"
    return length, f"at most so many of the {model.context_length} that {place} can read"


def critic_model(config: Config) -> ModelConfig:
    """PPO's critic: the model of `ppo.critic_from`, of the reward model, or of the run that the policy starts from."""
    judge = config.rl.reward if os.path.isdir(config.rl.reward) else config.model.init_from
    folder = config.ppo.critic_from or judge
    own = {name: getattr(config.model, name) for name in ("scan_layers", "remat", "attention_kernel", "compute_dtype")}
    no_dropout = dict.fromkeys(DROPOUTS, 0.0)
    saved = model_of(Path(folder))
    return dataclasses.replace(saved, value_head=True, init_from=folder, fp8=False, **own, **no_dropout)


def networks_of(config: Config, rows: Rows | None = None) -> NetworksOf:
    """What `workload.networks` makes of a configuration, with the models that other folders hold.

    Args:
        rows: of a sequence; None: the least that the data can make of it.
    """
    rewarded = config.stage in ("ppo", "grpo") and os.path.isdir(config.rl.reward)
    judge = model_of(Path(config.rl.reward)) if rewarded else None
    critic = critic_model(config) if config.stage == "ppo" else None

    def found(config: Config) -> Networks:
        known = None if critic is None else dataclasses.replace(critic, compute_dtype=config.model.compute_dtype)
        return networks(config, rows or fewest_rows(config), known, judge)

    return found


def model_of(place: Path) -> ModelConfig:
    """The model of a run, or of another program.

    Raises:
        UserError: it is neither.
    """
    return read_config(place) if is_foreign(place) else load_run_config(place)[0].model


def tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of `tokenizer.path`, which is that of `model.init_from` where there is one.

    Raises:
        UserError: there is neither: what is learned from examples is learned by a model that knows a language.
    """
    if not config.tokenizer.path:
        raise UserError(
            f"stage {config.stage} starts from a run: give --model.init-from RUN (or --tokenizer.path, to begin with "
            "drawn parameters)"
        )
    loaded = load_tokenizer(config.tokenizer.path)
    return loaded.with_vocab_size(config.model.vocab_size) if config.model.init_from else loaded


def start_params(config: Config, model: GPT, log: Callable[[str], None]) -> Params:
    """The parameters of `model.init_from`, with a value head that is drawn where that has none."""
    source = load_run(config.model.init_from, log=log)
    params = source.params
    if model.config.value_head and VALUE_HEAD[0] not in params:
        params = params | draw_params(model, config.training.seed, VALUE_HEAD)
    elif not model.config.value_head:
        params = {name: leaf for name, leaf in params.items() if name not in VALUE_HEAD}
    log(f"parameters of {source.directory}, step {source.step}")
    return params


def with_word_vectors(path: str, tokenizer: Tokenizer, params: Params, log: Callable[[str], None]) -> Params:
    """Drawn parameters, whose token embedding begins as the word vectors of a file, in the same shards.

    Raises:
        UserError: as `embed_words`.
    """
    drawn = params["embedding"]
    made = embed_words(Path(path), tokenizer, np.asarray(jax.device_get(drawn)), log)
    return params | {"embedding": jax.device_put(made, drawn.sharding)}
