"""Chat templates of Hugging Face models: where they lie, and Jinja as transformers runs it."""

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.plain_files import read_json, read_text
from gptjax.text.special_tokens import TOKENIZER_CONFIG

TEMPLATE_FILE = "chat_template.jinja"
"""Where a run, as a Hugging Face model, keeps its template: a run that has one can be talked to."""

Render = Callable[[list[Mapping[str, str]], bool], str]
"""A conversation as text, from messages with `role` and `content`, and whether an answer is to follow."""


def template_file(folder: Path) -> Path | None:
    """The file of a run, or of a Hugging Face directory, that has its template; None: it has not learned to talk."""
    if (folder / TEMPLATE_FILE).is_file():
        return folder / TEMPLATE_FILE
    path = folder / TOKENIZER_CONFIG
    try:
        values = read_json(path)
    except (OSError, UserError):
        return None
    return path if isinstance(values, dict) and values.get("chat_template") else None


def read_template(path: Path) -> str:
    """A template's text, from a Jinja file or from the `chat_template` of a `tokenizer_config.json`.

    Of several that have names it is the default.

    Raises:
        UserError: the file is missing, or holds none.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(f"data.chat_template {path} cannot be read: {error.strerror}") from None
    if path.suffix != ".json":
        return text
    try:
        found = json.loads(text)["chat_template"]
        named = {"default": found} if isinstance(found, str) else {t["name"]: str(t["template"]) for t in found}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"data.chat_template {path} has no text under chat_template") from None
    if "default" not in named and len(named) != 1:
        raise UserError(
            f"data.chat_template {path} has no template named default, but {', '.join(named) or 'none'}; give the text "
            "of one of them in a file of its own"
        )
    return named.get("default", next(iter(named.values())))


def compile_template(template: str, source: str, tokens: Mapping[str, str], today: datetime.date | None) -> Render:
    """A template in Jinja's immutable sandbox, with what transformers gives it.

    Args:
        source: what errors call it.
        tokens: special tokens by the names that templates have for them, such as `bos_token`.
        today: the date that `strftime_now` gives; None: that of the clock, at each call.

    Raises:
        UserError: jinja2 is missing; or, from the result, the template is broken or refuses a conversation.
    """
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ModuleNotFoundError:
        raise UserError('chat templates need jinja2: pip install "gptjax[chat]"') from None

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}`, which marks answers for trainers that ask the template."""

        tags = {"generation"}  # noqa: RUF012 -- as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(reason: str) -> None:
        raise UserError(f"{source}: {reason}")

    def strftime_now(form: str) -> str:
        now = datetime.datetime.now()
        return (now if today is None else datetime.datetime.combine(today, now.time())).strftime(form)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.globals |= tokens | {"raise_exception": refuse, "strftime_now": strftime_now}
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"{source} cannot be rendered: {error}") from None

    def render(messages: list[Mapping[str, str]], add_generation_prompt: bool) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt)
        except UserError:
            raise
        except Exception as error:  # a template is a program, and may fail like any other
            raise UserError(f"{source} cannot be rendered: {error}") from None

    return render
