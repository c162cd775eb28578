"""SentencePiece's model file, read and written: just the protobuf fields that matter here.

Owns a strict, bounded reader and a writer of `ModelProto`. Knows nothing about text. Field numbers
are those of SentencePiece's published `sentencepiece_model.proto`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanocupy.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
DECODE_ONLY = 7  # ours: a piece that no text encodes to
UNIGRAM, BPE = 1, 2
SPACE = "▁"


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary, index = id. bos_id/eos_id: -1 where the model has none."""

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    model_type: int = BPE
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    bos_id: int = -1
    eos_id: int = -1


def check_pieces(pieces: Pieces) -> Pieces:
    """`pieces`, if SentencePiece will take them; raises TokenizerError naming the piece if not."""
    seen: set[str] = set()
    unknown = 0
    for index, (text, score, kind) in enumerate(
        zip(pieces.texts, pieces.scores, pieces.types, strict=True)
    ):
        if not text or text in seen:
            raise TokenizerError(f"piece {index} {text!r} is {'a duplicate' if text else 'empty'}")
        seen.add(text)
        if not math.isfinite(score):
            raise TokenizerError(f"piece {index} {text!r} has the score {score}")
        if kind not in range(NORMAL, DECODE_ONLY + 1):
            raise TokenizerError(f"piece {index} {text!r} has the unknown type {kind!r}")
        if kind == BYTE and byte_value(text) is None:
            raise TokenizerError(f"piece {index} {text!r} is marked as a byte but spells none")
        unknown += kind == UNKNOWN
    if unknown != 1:
        raise TokenizerError(f"the model has {unknown} unknown pieces; it must have exactly one")
    if pieces.model_type not in (UNIGRAM, BPE):
        raise TokenizerError(
            f"SentencePiece model type {pieces.model_type} is not supported, only BPE and unigram"
        )
    return pieces


def byte_value(text: str) -> int | None:
    """The byte that a piece such as "<0x0A>" stands for, else None."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            value = int(text[3:5], 16)
        except ValueError:
            return None
        return value if text == f"<0x{value:02X}>" else None
    return None


# --- writing


def write_model(pieces: Pieces, *, add_dummy_prefix: bool) -> bytes:
    """A `ModelProto` for the sentencepiece library. User-defined pieces without white space become
    control pieces: cutting text at whole-string tokens is done outside the library."""
    out = bytearray()
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.types, strict=True):
        if kind == DECODE_ONLY or (kind == USER_DEFINED and SPACE not in text):
            kind = CONTROL
        data = text.encode()
        body = b"\x0a" + _varint(len(data)) + data + b"\x15" + struct.pack("<f", score)
        body += bytes((0x18, kind))
        out += b"\x0a" + _varint(len(body)) + body
    types = set(pieces.types)
    trainer = _number(3, pieces.model_type) + _number(35, int(BYTE in types))
    trainer += _number(40, pieces.types.index(UNKNOWN))
    # The library insists that these are control pieces of these names or -1; ids are kept outside.
    trainer += b"".join(_number(field, -1) for field in (41, 42, 43))
    trainer += _string(45, pieces.texts[pieces.types.index(UNKNOWN)])
    normalizer = _string(1, "identity") + _number(3, int(add_dummy_prefix))
    normalizer += _number(4, int(pieces.remove_extra_whitespaces)) + _number(5, 1)
    out += b"\x12" + _varint(len(trainer)) + trainer
    out += b"\x1a" + _varint(len(normalizer)) + normalizer
    return bytes(out)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _string(field: int, text: str) -> bytes:
    data = text.encode()
    return _varint(field << 3 | 2) + _varint(len(data)) + data


# --- reading


def read_model(data: bytes) -> Pieces:
    """The vocabulary of a `.model` file.

    Raises TokenizerError for broken protobuf, and for a normaliser other than the identity (the
    LLaMA family's models have none).
    """
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(_as_bytes(value, "piece")))
            try:
                texts.append(_as_bytes(piece.get(1, b""), "piece text").decode())
            except UnicodeDecodeError:
                raise TokenizerError(f"piece {len(texts)} is not valid UTF-8") from None
            scores.append(_as_float(piece.get(2, 0.0)))
            types.append(_as_int(piece.get(3, NORMAL), "piece type"))
            if types[-1] > BYTE:
                raise TokenizerError(f"piece {len(types) - 1} has the unknown type {types[-1]}")
        elif field in (2, 3):
            (trainer if field == 2 else normalizer).update(_fields(_as_bytes(value, "spec")))
    if not texts:
        raise TokenizerError("the SentencePiece model has no pieces")
    if normalizer.get(2):
        name = bytes(_as_bytes(normalizer.get(1, b"?"), "normalizer name"))[:40]
        raise TokenizerError(
            f"the SentencePiece normalizer {name.decode('utf-8', 'replace')!r} is not supported, "
            f"only 'identity'"
        )
    if not _as_int(normalizer.get(5, 1), "escape_whitespaces"):
        raise TokenizerError("a SentencePiece model with escape_whitespaces=false is not supported")
    if _as_int(trainer.get(24, 0), "treat_whitespace_as_suffix"):
        raise TokenizerError("a SentencePiece model with white space as suffix is not supported")
    bos, eos = (
        _signed(_as_int(trainer.get(field, default), "bos/eos id"))
        for field, default in ((41, 1), (42, 2))
    )
    return check_pieces(
        Pieces(
            texts,
            scores,
            types,
            model_type=_as_int(trainer.get(3, UNIGRAM), "model type"),
            add_dummy_prefix=bool(_as_int(normalizer.get(3, 1), "add_dummy_prefix")),
            remove_extra_whitespaces=bool(
                _as_int(normalizer.get(4, 1), "remove_extra_whitespaces")
            ),
            bos_id=bos if 0 <= bos < len(types) and types[bos] == CONTROL else -1,
            eos_id=eos if 0 <= eos < len(types) and types[eos] == CONTROL else -1,
        )
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(field number, value) of one protobuf message; every length is checked."""
    at, end = 0, len(data)
    while at < end:
        key, at = _read_varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _read_varint(data, at)
        elif wire == 2:
            size, at = _read_varint(data, at)
            if size > end - at:
                raise TokenizerError(
                    f"not a SentencePiece model: a field of {size} bytes at offset {at} of {end}"
                )
            value, at = data[at : at + size], at + size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            if size > end - at:
                raise TokenizerError(f"not a SentencePiece model: it ends within a number at {at}")
            value = struct.unpack_from("<d" if wire == 1 else "<f", data, at)[0]
            at += size
        else:
            raise TokenizerError(f"not a SentencePiece model: wire type {wire} at offset {at}")
        yield field, value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise TokenizerError(f"not a SentencePiece model: a broken number at offset {at}")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    value = value - (1 << 64) if value >> 63 else value
    return value if -(1 << 31) <= value < 1 << 31 else -1


def _as_bytes(value: object, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise TokenizerError(f"not a SentencePiece model: its {what} is a number")
    return value


def _as_int(value: object, what: str) -> int:
    if not isinstance(value, int):
        raise TokenizerError(f"not a SentencePiece model: its {what} is not an integer")
    return value


def _as_float(value: object) -> float:
    if not isinstance(value, float):
        raise TokenizerError("not a SentencePiece model: a piece's score is not a number")
    return value
