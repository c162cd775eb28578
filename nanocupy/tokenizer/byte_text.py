"""GPT-2's way of writing bytes as printable characters, used in vocab.json, tokenizer.json, GGUF.

Printable Latin-1 bytes stand for themselves, the others, in order, for U+0100 and on.
"""

from __future__ import annotations

from nanocupy.errors import TokenizerError

_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in set(_PLAIN)]
BYTE_TO_CHAR = {byte: chr(byte) for byte in _PLAIN} | {
    byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)
}
# str.translate's table: characters that stand for bytes 128-255 must become those code points.
_CHAR_TO_LATIN1 = {ord(char): byte for byte, char in BYTE_TO_CHAR.items()}
# Latin-1 characters that stand for no byte would pass through the table as if they were one.
_NOT_BYTES = "".join(chr(byte) for byte in _OTHERS)
_FORBIDDEN = dict.fromkeys(map(ord, _NOT_BYTES), "\uffff")
_TABLE = _FORBIDDEN | _CHAR_TO_LATIN1


def to_bytes(text: str) -> bytes | None:
    """The bytes that `text` writes, or None if a character of it stands for no byte."""
    try:
        return text.translate(_TABLE).encode("latin-1")
    except UnicodeEncodeError:
        return None


def to_text(data: bytes) -> str:
    """The inverse of `to_bytes`."""
    return "".join(map(BYTE_TO_CHAR.__getitem__, data))


def merge_pairs(merges: object, where: str) -> list[tuple[bytes, bytes]]:
    """Merges, written "left right" or ["left", "right"], in bytes; TokenizerError names the bad."""
    return [
        (bytes_of(left, where), bytes_of(right, where)) for left, right in text_pairs(merges, where)
    ]


def text_pairs(merges: object, where: str) -> list[tuple[str, str]]:
    """Merges as pairs of strings, as they are written."""
    if not isinstance(merges, list):
        raise TokenizerError(f"{where}: the merges are not a list")
    pairs = []
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(part, str) and part for part in pair)
        ):
            raise TokenizerError(f"{where}: merge {number} is {str(merge)[:60]!r}, not a pair")
        pairs.append((pair[0], pair[1]))
    return pairs


def bytes_of(text: str, where: str) -> bytes:
    data = to_bytes(text)
    if data is None:
        raise TokenizerError(f"{where}: {text[:60]!r} is not written in byte-level characters")
    return data
