"""How the tokens of a file write bytes: byte-level BPE's characters, and SentencePiece's pieces."""

import re


def _printable_bytes() -> list[str]:
    """The character by which byte-level BPE writes each byte: itself if visible in Latin-1, else from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]


CHARACTER_OF_BYTE = _printable_bytes()
"""How byte-level BPE writes each byte."""
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}


def byte_level_bytes(token: str) -> bytes:
    """What a token of byte-level BPE stands for."""
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def sentencepiece_bytes(token: str) -> bytes:
    """What a token of SentencePiece stands for: a space is U+2581, and some are single bytes."""
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(match[1])
    return token.replace("▁", " ").encode()


def decoder_types(decoder: dict | None) -> list[str]:
    """The types of a decoder's steps, as its file names them."""
    if decoder is None:
        return []
    return [step["type"] for step in decoder["decoders"]] if decoder["type"] == "Sequence" else [decoder["type"]]
