"""stub until the reader lands"""

from pathlib import Path


def is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix == ".gguf"


class GgufFile:
    pass
