"""Runs made of Hugging Face directories, and directories made of runs."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax.config import Config, TokenizerConfig, TrainingConfig, foreign_row_tokens
from gptjax.data.folders import is_empty, written_whole
from gptjax.errors import UserError
from gptjax.interop import huggingface
from gptjax.interop.places import is_foreign, read_values, template_of
from gptjax.resolve import resolve
from gptjax.text.chat import ChatFormat, chat_format
from gptjax.text.special_tokens import END_OF_DOCUMENT, GENERATION_CONFIG, TOKENIZER_CONFIG, ids
from gptjax.text.templates import TEMPLATE_FILE
from gptjax.text.tokenizer import Tokenizer
from gptjax.training import checkpoint, run_dir
from gptjax.training.load import Run
from gptjax.training.summary import read_summary

IMPORTED = "imported"
"""Under this name the environment of a run that was imported says where from."""
CARD = "README.md"
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.bpe", "*.jinja", "*.model")
"""What is fetched of a model on the hub: no pickles."""


def find_source(name: str, log: Callable[[str], None]) -> Path:
    """A directory or a GGUF file, or a model on the Hugging Face hub, `OWNER/NAME` or `hf://OWNER/NAME`, which is
    fetched.

    Raises:
        UserError: there is neither.
    """
    path, repository = Path(name), name.removeprefix("hf://")
    if path.is_dir() or path.is_file():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(
            f"{name} is no directory, no GGUF file and no model of the Hugging Face hub, such as hf://OWNER/NAME"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f'{name} is no directory here; to fetch it from the Hugging Face hub: pip install "gptjax[hub]"'
        ) from None
    log(f"fetching {repository} from the Hugging Face hub")
    try:
        return Path(snapshot_download(repository, allow_patterns=[*PATTERNS]))
    except Exception as error:  # of many kinds: the network's, the hub's, the file system's
        raise UserError(f"{repository} cannot be fetched from the Hugging Face hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def import_model(source: Path, run: Path, log: Callable[[str], None]) -> None:
    """Make a run of a Hugging Face directory or a GGUF file, with one checkpoint at step 0, under the current mesh.

    The run appears whole or not at all. It keeps what the model's files say of special tokens, and its chat template.

    Raises:
        UserError: the run's folder is not empty; or as `huggingface.read_params` and `read_tokenizer`.
    """
    if not is_empty(run):
        raise UserError(f"{run} is there already, and not an empty folder; choose another one")
    if not is_foreign(source):
        read_values(source)  # says what is wrong with a place that has no model
        raise UserError(f"{source} is no model of another program; a run is used as it is")
    model = huggingface.read_config(source)
    tokenizer = huggingface.read_tokenizer(source, model, log)
    config = Config(
        model=model,
        tokenizer=TokenizerConfig(path=str((run / run_dir.TOKENIZER_FILE).absolute())),
        training=TrainingConfig(sequence_length=foreign_row_tokens(model)),
        run_dir=str(run),
    )
    config = resolve(config, jax.devices(), tokenizer)
    if model.rope_scaling == "longrope" and model.context_length > model.rope_original_length:
        log(
            f"LongRoPE: the factors for long texts are used for all, where transformers uses the short ones for texts "
            f"up to {model.rope_original_length} tokens"
        )
    params = huggingface.read_params(source, config.model)
    with run_dir.writable(run), written_whole(run, run_dir.CONFIG_FILE) as folder:
        for name, text in tokenizer.texts().items():
            run_dir.write_text(folder / name, text)
        template = template_of(source)
        if template is not None:
            run_dir.write_text(folder / TEMPLATE_FILE, template[0])
        with checkpoint.open_checkpoints(folder / run_dir.CHECKPOINTS, config.checkpoint) as manager:
            metadata = {IMPORTED: str(source.absolute()), "tokenizer": tokenizer.to_json()}
            checkpoint.save(manager, 0, {"params": params}, metadata)
        run_dir.save_config(folder, config, run_dir.environment() | {IMPORTED: {"from": str(source.absolute())}})


def export_run(
    run: Run,
    directory: Path,
    *,
    dtype: str = "float32",
    licence: str = "unknown",
    log: Callable[[str], None] = lambda line: None,
) -> str:
    """Write a run as a Hugging Face directory: weights, configuration, tokenizer, chat template and a model card.

    What was imported says of its special tokens there what it said before; what has learned to talk names every token
    that ends an answer. A chat template that cannot be laid out here is written as it is, and `log` is told.

    Returns:
        The `model_type` that it has there.

    Raises:
        UserError: the directory is not empty, transformers has no such model, or there is no such type of weights.
    """
    if dtype not in huggingface.TYPES:
        raise UserError(f"--dtype {dtype} is no type of weights; those that can be written are {[*huggingface.TYPES]}")
    if not is_empty(directory):
        raise UserError(f"{directory} is there already, and not an empty folder; nothing was written")
    huggingface.to_theirs(run.config.model)  # what it refuses is refused before a folder is made
    template = template_of(run.directory)
    form = _format(run.tokenizer, template, log)
    directory.mkdir(parents=True, exist_ok=True)
    generation = _generation_config(run.tokenizer, form)
    family = huggingface.write_model(directory, run.config.model, run.params, dtype=dtype, generation=generation)
    (directory / run_dir.TOKENIZER_FILE).write_text(run.tokenizer.to_json(), encoding="utf-8")
    _write_json(directory / TOKENIZER_CONFIG, _tokenizer_config(run, form))
    if template is not None:
        (directory / TEMPLATE_FILE).write_text(template[0], encoding="utf-8")
    (directory / CARD).write_text(model_card(run, dtype, licence), encoding="utf-8")
    return family.model_type


def _format(tokenizer: Tokenizer, template: tuple[str, str] | None, log: Callable[[str], None]) -> ChatFormat | None:
    try:
        return None if template is None else chat_format(tokenizer, *template)
    except UserError as error:
        log(f"answers end with the tokens that end texts, as the chat template cannot say with which: {error}")
        return None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation_config(tokenizer: Tokenizer, form: ChatFormat | None) -> dict[str, Any]:
    """As it was read, with all tokens that end a text, or of a model that talks an answer."""
    stops = [*(tokenizer.stop_ids if form is None else form.stop_ids)]
    start = tokenizer.opening or (tokenizer.end_of_text_id,)
    values = {"bos_token_id": start[-1]} | dict(tokenizer.files.get(GENERATION_CONFIG, {}))
    if set(ids(values.get("eos_token_id"))) != set(stops):
        values["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    return values


def _tokenizer_config(run: Run, form: ChatFormat | None) -> dict[str, Any]:
    """As it was read, or else what programs need to know; `eos_token` ends answers, where the model talks."""
    tokenizer = run.tokenizer
    names = {i: name for name, i in tokenizer.special_token_ids.items()}
    end = names.get(tokenizer.end_of_text_id)
    values = dict(tokenizer.files.get(TOKENIZER_CONFIG, {}))
    if not values:
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": run.config.model.context_length,
            "clean_up_tokenization_spaces": False,
            "eos_token": end,
            "bos_token": end,
            "pad_token": next((name for name in ("<|pad|>", "<pad>") if name in tokenizer.special_token_ids), end),
        }
    if form is not None and form.end_id not in (tokenizer.end_of_text_id, *tokenizer.stop_ids):
        values |= {"eos_token": names[form.end_id], END_OF_DOCUMENT: end}
    return values


def imported_from(directory: Path) -> str | None:
    """Where a run was imported from, or the place itself of another program's model; None: it was trained here."""
    if is_foreign(directory):
        return str(directory)
    return run_dir.load_run_config(directory)[1].get(IMPORTED, {}).get("from")


def model_card(run: Run, dtype: str, licence: str) -> str:
    """What a model is, how it came about and what it reached, as the hub shows it."""
    config, summary = run.config, read_summary(run.directory) or {}
    source = imported_from(run.directory)
    rows = [
        ("stage", config.stage),
        ("made from", source or config.model.init_from or "drawn parameters"),
        ("data", "unknown" if source else ", ".join(config.data.path) or "unknown"),
        ("step", f"{run.step:,}"),
        ("tokens trained on", f"{summary['tokens']:,}" if summary.get("tokens") is not None else "unknown"),
    ]
    named = {"val_loss": "held-out loss, nats a token", "val_bits_per_byte": "held-out bits a byte"}
    rows += [(what, f"{summary[name]:.4f}") for name, what in named.items() if summary.get(name) is not None]
    rows += [("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(run.params)):,}"), ("weights", dtype)]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    shape = json.dumps(dataclasses.asdict(config.model), indent=2)
    return (
        f"---\nlicense: {licence}\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- gptjax\n---\n\n"
        f"# {run.directory.absolute().name}\n\nTrained and exported with gptjax.\n\n| | |\n|---|---|\n{table}\n\n"
        f"## Model\n\n```json\n{shape}\n```\n"
    )
