"""A conversation at the terminal."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gptjax.errors import UserError
from gptjax.plain_files import to_json
from gptjax.text.chat import Message

HELP = "/reset begins anew, /save FILE writes the conversation, /quit or Ctrl-D ends; Ctrl-C stops an answer"

Answer = Callable[[Sequence[Message]], tuple[Iterator[str], int]]
"""The pieces of an answer, and how many of the oldest messages it does not see."""


def converse(
    answer: Answer,
    system: str = "",
    *,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> list[Message]:
    """Talk until the user ends it; an answer that Ctrl-C stopped counts as far as it went.

    Args:
        system: what the conversation begins with; empty: nothing.
        read: asks for a line, as `input` does.
        write: shows text as it is.

    Returns:
        What was said since the last reset.
    """
    start = [Message("system", system)] if system else []
    said = [*start]
    write(f"{HELP}\n")
    while True:
        try:
            line = read("you: ")
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return said
        words = line.split(maxsplit=1)
        if not words:
            continue
        if words[0].startswith("/"):
            command, argument = words[0], words[1] if len(words) > 1 else ""
            if command == "/quit":
                return said
            if command == "/reset":
                said = [*start]
            write(f"{_command(command, argument, said)}\n")
            continue
        said.append(Message("user", line))
        if text := _answer(answer, said, write):
            said.append(Message("assistant", text))
        else:  # roles alternate: a question without an answer was not asked
            said.pop()


def save(path: Path, said: Sequence[Message]) -> None:
    """Write a conversation as a line of a `.jsonl` that can be trained on.

    Raises:
        UserError: the file cannot be written.
    """
    line = to_json({"messages": [message._asdict() for message in said]})
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _command(command: str, argument: str, said: Sequence[Message]) -> str:
    if command == "/reset":
        return "the conversation begins anew"
    if command == "/save":
        if not argument:
            return "/save needs the name of a file"
        try:
            save(Path(argument), said)
        except UserError as error:
            return str(error)
        return f"{len(said)} messages appended to {argument}"
    return HELP if command == "/help" else f"{command} is no command; {HELP}"


def _answer(answer: Answer, said: Sequence[Message], write: Callable[[str], None]) -> str:
    """Stream an answer; what there was of it when it ended."""
    text = ""
    try:
        pieces, dropped = answer(said)
        if dropped:
            write(f"(the oldest {dropped} messages no longer fit the context)\n")
        write("assistant: ")
        for piece in pieces:
            text += piece
            write(piece)
    except KeyboardInterrupt:
        write(" [stopped]")
    except UserError as error:
        write(f"error: {error}")
    write("\n")
    return text.strip()
