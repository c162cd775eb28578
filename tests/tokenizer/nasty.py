"""Strings that break tokenizers, from a seeded generator."""

from __future__ import annotations

import random
from functools import lru_cache

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<|eot_id|>"),
    *("<|begin_of_text|>", "<think>", "</think>", "<tool_call>", "<0x0A>", "[INST]", "<|im_"),
)
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'RE", "'Ve", "'LL", "'D")
CONTRACTIONS += ("’s", "'\u017f", "''s", "s'", "'é")
EMOJI = (
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",  # a family, joined
    "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f44d\U0001f3fd",
    "\U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea",
    "1\ufe0f\u20e3",
    "\u2764\ufe0f",
    "\U0001f9d1\U0001f3ff\u200d\U0001f680",
    "\U0001f600",
)
RANGES = (
    *((0x20, 0x7E), (0x20, 0x7E), (0x20, 0x7E), (0x00, 0x1F), (0x7F, 0xFF), (0x100, 0x24F)),
    *((0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF)),
    *((0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x2000, 0x206F)),
    *((0x2150, 0x218F), (0x2460, 0x24FF), (0x2580, 0x259F), (0x3000, 0x30FF), (0x4E00, 0x9FFF)),
    *((0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xFB00, 0xFB4F), (0xFE00, 0xFE0F), (0xFF00, 0xFFEF)),
    *((0x10300, 0x1034F), (0x1D400, 0x1D7FF), (0x1F300, 0x1F6FF), (0x20000, 0x2A6DF)),
    *((0xE0000, 0xE007F), (0x10FF00, 0x10FFFF)),
)
SPACES = (" ", " ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2003", "\u200b", "\x0b", "\x85")
WORDS = (
    *("the", "quick", "Brown", "naïve", "don't", "e.g.", "def", "__init__(self):", "x+=1;"),
    *("3.14159", "http://a.b/c?d=e", "\ufb01", "Å", "中文字符", "日本語テキスト", "한국어"),
    *("русский", "العربية", "हिन्दी", "ไทย", "a\u0301b", "＃１"),
)


def _chunk(rng: random.Random) -> str:
    kind = rng.randrange(9)
    if kind == 0:
        low, high = rng.choice(RANGES)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))
    if kind == 1:
        return rng.choice(SPACES) * rng.choice((1, 1, 2, 3, 5, 17, 80))
    if kind == 2:
        return "".join(rng.choice("0123456789٣५Ⅷ½") for _ in range(rng.choice((1, 2, 3, 4, 7, 40))))
    if kind == 3:
        return rng.choice(CONTRACTIONS)
    if kind == 4:
        return rng.choice(EMOJI)
    if kind == 5:
        return rng.choice(SPECIALS)
    if kind == 6:
        return "".join(
            rng.choice("=-_/*#.,;:!?'\"()[]{}<>|\\~`@$%^&\x00\x04\x1d") for _ in range(6)
        )
    return rng.choice(("", " ", " ")) + rng.choice(WORDS)


@lru_cache
def nasty_strings(count: int = 2000, seed: int = 20240607) -> tuple[str, ...]:
    """`count` strings without surrogates; equal for equal arguments."""
    rng = random.Random(seed)
    strings = ["", " ", "\x00", "a\x00b", "\ufeffx", "\ufffd", "  \n  x", "a" * 300, " " * 400]
    strings += [
        f"x{space * n}{end}" for space in SPACES for n in (1, 2, 3) for end in ("", "y", "5")
    ]
    while len(strings) < count:
        strings.append("".join(_chunk(rng) for _ in range(rng.randint(1, 9))))
    return tuple(strings[:count])
