"""A tokenizer as one self-contained, deterministic byte string, and back.

Layout, little-endian: b"NANOTOK\\x01" · uint32 header length · header (JSON, UTF-8) · arrays ·
uint32 CRC-32 of all before. The header's `kind` is "bpe" or "spm"; the arrays are
  bpe  lengths uint16[count] · ids uint32[count] unless `identity` · the spellings, end to end
       (first `num_ranked` in rank order, then those that only decode)
  spm  scores float32[count] · types uint8[count] · lengths uint16[count] · the pieces' UTF-8

Reading is strict: a wrong checksum, a length that is not explained by the data, or a field of the
wrong type raises TokenizerError.
"""

from __future__ import annotations

import json
import struct
import zlib
from itertools import pairwise
from typing import Any

import numpy as np

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer.base import Tokenizer
from nanocupy.tokenizer.pieces import MAX_VOCAB, AddedToken, PieceTokenizer

MAGIC = b"NANOTOK\x01"
_FLAGS = ("special", "lstrip", "rstrip", "normalized")


def to_bytes(tokenizer: PieceTokenizer) -> bytes:
    """The serialisation of `tokenizer`; equal tokenizers give equal bytes."""
    from nanocupy.tokenizer.bpe import ByteLevelBPE
    from nanocupy.tokenizer.spm import SentencePieceTokenizer

    header: dict[str, Any] = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "add_bos": tokenizer.add_bos,
        "added": [
            [t.id, t.text, sum(getattr(t, flag) << i for i, flag in enumerate(_FLAGS))]
            for t in tokenizer.added
        ],
    }
    if isinstance(tokenizer, ByteLevelBPE):
        pairs = [*tokenizer.ranked, *tokenizer.unmerged]
        ids = [token_id for _, token_id in pairs]
        spellings = [token for token, _ in pairs]
        identity = ids == list(range(len(ids)))
        header |= {
            "kind": "bpe",
            "pattern": tokenizer.pattern,
            "nfc": tokenizer.nfc,
            "count": len(pairs),
            "num_ranked": len(tokenizer.ranked),
            "identity": identity,
        }
        arrays = [] if identity else [np.array(ids, "<u4").tobytes()]
        arrays.insert(0, _lengths(spellings))
    elif isinstance(tokenizer, SentencePieceTokenizer):
        pieces = tokenizer.pieces
        spellings = [text.encode() for text in pieces.texts]
        header |= {
            "kind": "spm",
            "count": len(spellings),
            "model_type": pieces.model_type,
            "remove_extra_whitespaces": pieces.remove_extra_whitespaces,
            "prefix": tokenizer.prefix,
            "prefix_once": tokenizer.prefix_once,
            "strips_leading_space": tokenizer.strips_leading_space,
        }
        arrays = [
            np.array(pieces.scores, "<f4").tobytes(),
            bytes(pieces.types),
            _lengths(spellings),
        ]
    else:
        raise TokenizerError(f"a {type(tokenizer).__name__} cannot be serialised")
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    data = b"".join([MAGIC, struct.pack("<I", len(text)), text, *arrays, *spellings])
    return data + struct.pack("<I", zlib.crc32(data))


def tokenizer_from_bytes(data: bytes | bytearray | memoryview) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_bytes` serialised; TokenizerError for anything else."""
    data = bytes(data)
    if data[: len(MAGIC) - 1] != MAGIC[:-1]:
        raise TokenizerError("not a serialised tokenizer: the magic number is missing")
    if data[: len(MAGIC)] != MAGIC:
        raise TokenizerError(
            f"serialised tokenizer of version {data[len(MAGIC) - 1 : len(MAGIC)].hex()}; "
            f"this nanocupy reads version 01"
        )
    reader = _Reader(data)
    header = reader.header()
    added = []
    for entry in header.list("added"):
        if not (isinstance(entry, list) and [type(x) for x in entry] == [int, str, int]):
            raise TokenizerError(f"serialised tokenizer: {str(entry)[:80]} is no added token")
        flags = {flag: bool(entry[2] >> i & 1) for i, flag in enumerate(_FLAGS)}
        added.append(AddedToken(entry[0], entry[1], **flags))
    options: dict[str, Any] = {
        "bos_id": header.optional_int("bos"),
        "eos_id": header.optional_int("eos"),
        "add_bos": header.bool("add_bos"),
    }
    count = header.int("count")
    if not 0 < count <= MAX_VOCAB:
        raise TokenizerError(f"serialised tokenizer: count is {count}")
    kind = header.str("kind")
    if kind == "bpe":
        return _read_bpe(reader, header, count, added, options)
    if kind == "spm":
        return _read_spm(reader, header, count, added, options)
    raise TokenizerError(f"serialised tokenizer of the unknown kind {kind[:40]!r}")


def _read_bpe(
    reader: _Reader, header: _Header, count: int, added: list[AddedToken], options: dict[str, Any]
) -> Tokenizer:
    from nanocupy.tokenizer.bpe import ByteLevelBPE

    num_ranked = header.int("num_ranked")
    if not 0 <= num_ranked <= count:
        raise TokenizerError(f"serialised tokenizer: num_ranked is {num_ranked} of {count}")
    lengths = reader.array("<u2", count)
    ids = range(count) if header.bool("identity") else reader.array("<u4", count).tolist()
    spellings = reader.spellings(lengths)
    if not int(lengths.min()):
        raise TokenizerError("serialised tokenizer: it holds an empty token")
    if len(set(spellings)) != count:
        raise TokenizerError("serialised tokenizer: it spells the same token twice")
    pairs = list(zip(spellings, ids, strict=True))
    return ByteLevelBPE(
        pairs[:num_ranked],
        added,
        pattern=header.str("pattern"),
        unmerged=pairs[num_ranked:],
        nfc=header.bool("nfc"),
        **options,
    )


def _read_spm(
    reader: _Reader, header: _Header, count: int, added: list[AddedToken], options: dict[str, Any]
) -> Tokenizer:
    from nanocupy.tokenizer.spm import SentencePieceTokenizer
    from nanocupy.tokenizer.spm_proto import Pieces, check_pieces

    scores = reader.array("<f4", count).tolist()
    types = reader.array("u1", count).tolist()
    spellings = reader.spellings(reader.array("<u2", count))
    try:
        texts = [spelling.decode() for spelling in spellings]
    except UnicodeDecodeError:
        raise TokenizerError("serialised tokenizer: a piece is not valid UTF-8") from None
    pieces = Pieces(
        texts,
        scores,
        types,
        model_type=header.int("model_type"),
        remove_extra_whitespaces=header.bool("remove_extra_whitespaces"),
    )
    return SentencePieceTokenizer(
        check_pieces(pieces),
        added,
        prefix=header.str("prefix"),
        prefix_once=header.bool("prefix_once"),
        strips_leading_space=header.bool("strips_leading_space"),
        **options,
    )


def _lengths(spellings: list[bytes]) -> bytes:
    longest = max(map(len, spellings), default=0)
    if longest > 0xFFFF:
        raise TokenizerError(f"a token of {longest} bytes cannot be serialised, at most 65535")
    return np.array([len(s) for s in spellings], "<u2").tobytes()


class _Header:
    """The JSON header, its fields read with their types checked."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def _get(self, name: str, kind: type) -> Any:
        value = self._fields.get(name)
        if type(value) is not kind:
            raise TokenizerError(
                f"serialised tokenizer: {name} is {str(value)[:40]!r}, expected {kind.__name__}"
            )
        return value

    def int(self, name: str) -> int:
        return self._get(name, int)

    def str(self, name: str) -> str:
        return self._get(name, str)

    def bool(self, name: str) -> bool:
        return self._get(name, bool)

    def list(self, name: str) -> list:
        return self._get(name, list)

    def optional_int(self, name: str) -> int | None:  # type: ignore[valid-type]
        return None if self._fields.get(name) is None else self._get(name, int)


class _Reader:
    """Walks the data front to back; nothing is taken that is not there."""

    def __init__(self, data: bytes) -> None:
        if len(data) < len(MAGIC) + 8:
            raise TokenizerError(f"serialised tokenizer: cut off after {len(data)} bytes")
        stored = struct.unpack_from("<I", data, len(data) - 4)[0]
        if zlib.crc32(data[:-4]) != stored:
            raise TokenizerError("serialised tokenizer: the checksum is wrong, the data is damaged")
        self._data = data
        self._at = len(MAGIC)
        self._end = len(data) - 4

    def _take(self, size: int) -> int:
        if size > self._end - self._at:
            raise TokenizerError(
                f"serialised tokenizer: {size} bytes expected at {self._at}, "
                f"{self._end - self._at} are there"
            )
        self._at += size
        return self._at - size

    def header(self) -> _Header:
        size = struct.unpack_from("<I", self._data, self._take(4))[0]
        at = self._take(size)
        try:
            fields = json.loads(self._data[at : at + size].decode())
        except (ValueError, RecursionError):
            raise TokenizerError("serialised tokenizer: the header is not JSON") from None
        if not isinstance(fields, dict):
            raise TokenizerError("serialised tokenizer: the header is not an object")
        return _Header(fields)

    def array(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self._data, dtype, count, self._take(count * np.dtype(dtype).itemsize))

    def spellings(self, lengths: np.ndarray) -> list[bytes]:
        """The rest of the data, cut by `lengths`, which must use it up."""
        ends = np.cumsum(lengths, dtype=np.int64)
        total = int(ends[-1])
        start = self._take(total)
        if self._at != self._end:
            raise TokenizerError(
                f"serialised tokenizer: {self._end - self._at} bytes follow the last token"
            )
        data = self._data
        return [data[a:b] for a, b in pairwise([start, *(ends + start).tolist()])]
