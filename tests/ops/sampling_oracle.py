"""What a sampler should do, in float64 and step by step; and a chi-square test of what it did.

Nothing here comes from the ops: each step takes probabilities and gives probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SEED = 20240607
MIN_EXPECTED = 25.0  # draws of a bin of the chi-square test; rarer tokens share one


@dataclass(frozen=True)
class Setting:
    """One row's logits, what stands in its prompt and output, and how it is sampled."""

    name: str
    vocab: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def logits(self) -> np.ndarray:
        """float32 [vocab], of both signs, with a tie and a banned token."""
        rng = np.random.default_rng([SEED, self.vocab, len(self.name)])
        logits = rng.normal(0, 2.0, self.vocab).astype(np.float32)
        logits[11], logits[13] = logits[17], -np.inf
        return logits

    @property
    def prompt(self) -> list[int]:
        return [0, 3, 3, 5, 8, 21, *np.argsort(self.logits)[-3:].tolist()]

    @property
    def output(self) -> list[int]:
        return [5, 6, 6, 6, 21, 30, 30, *np.argsort(self.logits)[-5:-2].tolist()]


BIAS = {2: 4.0, 5: 3.0, 6: -5.0, 30: 2.5, 13: 7.0, 40: -math.inf}
ALL_PENALTIES = {"repetition": 1.3, "presence": 0.4, "frequency": 0.3, "bias": BIAS}
SETTINGS = [
    Setting("temperature 0.3", 50, temperature=0.3),
    Setting("temperature 1", 50),
    Setting("temperature 2", 50, temperature=2.0),
    Setting("top-k", 50, top_k=7),
    Setting("top-k, cooler", 50, top_k=12, temperature=0.7),
    Setting("top-p", 50, top_p=0.8),
    Setting("top-p, hotter", 50, top_p=0.9, temperature=1.6),
    Setting("min-p", 50, min_p=0.08),
    Setting("min-p, hotter", 50, min_p=0.15, temperature=1.8),
    Setting("repetition", 50, repetition=1.6),
    Setting("repetition below 1", 50, repetition=0.8),
    Setting("presence", 50, presence=1.1),
    Setting("frequency", 50, frequency=0.7),
    Setting("frequency below 0", 50, frequency=-0.4),
    Setting("logit bias", 50, bias=BIAS),
    Setting("top-k and top-p", 150, top_k=20, top_p=0.85, temperature=1.4),
    Setting("every cut", 150, top_k=25, top_p=0.93, min_p=0.02, temperature=1.5),
    Setting("every penalty", 150, **ALL_PENALTIES),
    Setting("everything", 150, top_k=30, top_p=0.9, min_p=0.01, temperature=1.3, **ALL_PENALTIES),
    Setting("many tokens", 400, top_p=0.97, temperature=1.2, **ALL_PENALTIES),
]

# ------------------------------------------------------------------------------ the steps


def penalised(setting: Setting) -> np.ndarray:
    """float64 [V]: bias, then repetition over prompt and output, then presence and frequency."""
    logits = [float(x) for x in setting.logits]
    for token, bias in setting.bias.items():
        logits[token] += bias
    repetition = _single(setting.repetition)
    for token in {*setting.prompt, *setting.output}:
        x = logits[token]
        logits[token] = x / repetition if x > 0 else x * repetition
    for token in set(setting.output):
        logits[token] -= _single(setting.presence)
    for token in setting.output:
        logits[token] -= _single(setting.frequency)
    return np.array(logits)


def softmax(logits: Sequence[float] | np.ndarray) -> np.ndarray:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return np.array([w / total for w in weights])


def tempered(p: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities at a temperature, from those at 1."""
    return renormalised(p ** (1 / _single(temperature)))


def renormalised(p: np.ndarray) -> np.ndarray:
    return p / math.fsum(p)


def cut_min_p(p: np.ndarray, min_p: float) -> np.ndarray:
    return np.where(p >= _single(min_p) * p.max(), p, 0)


def cut_top_k(p: np.ndarray, top_k: int) -> np.ndarray:
    """Ties with the k-th stay; those that differ by rounding alone are ties."""
    if not 0 < top_k < len(p):
        return p
    return np.where(p >= sorted(p)[-top_k] * (1 - 1e-12), p, 0)


def cut_top_p(p: np.ndarray, top_p: float) -> np.ndarray:
    """The most likely tokens until they hold top_p, of a whole of 1; ties with the last stay."""
    held, last = 0.0, 0.0
    for value in sorted(p, reverse=True):
        if held >= _single(top_p) and value < last * (1 - 1e-12):
            break
        held, last = held + value, value
    return np.where(p >= last * (1 - 1e-12), p, 0)


def probabilities(setting: Setting) -> np.ndarray:
    """float64 [V]: what the tokens of a setting should be drawn with."""
    p = tempered(softmax(penalised(setting)), setting.temperature)
    p = renormalised(cut_min_p(p, setting.min_p))
    p = renormalised(cut_top_k(p, setting.top_k))
    return renormalised(cut_top_p(p, setting.top_p)) if setting.top_p < 1 else p


def _single(value: float) -> float:
    """As the sampler is given it: float32."""
    return float(np.float32(value))


# ------------------------------------------------------------------------------ draws


def mixed_batch(
    settings: Sequence[Setting], which: np.ndarray, seed: int
) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """Arguments of `penalize` (logits apart) and `sample`, and the logits [S, V], of the rows
    settings[which[s]]. Half the rows are the positions of one request, half are requests."""
    rows = len(which)
    rng = np.random.default_rng([SEED, seed])
    entries = []
    for setting in settings:
        ids = [*dict.fromkeys([*setting.prompt, *setting.output, *setting.bias])]
        entries.append(
            {
                "token_ids": np.array(ids, np.int32),
                "output_counts": np.array([setting.output.count(i) for i in ids], np.int32),
                "in_context": np.isin(ids, setting.prompt + setting.output),
                "bias": np.array([setting.bias.get(i, 0.0) for i in ids], np.float32),
            }
        )
    sizes = np.array([len(e["token_ids"]) for e in entries])

    def of_rows(name: str, dtype: Any = np.float32) -> np.ndarray:
        return np.array([getattr(setting, name) for setting in settings], dtype)[which]

    penalties = {
        "entry_starts": np.concatenate([[0], np.cumsum(sizes[which])]).astype(np.int32),
        **{name: np.concatenate([entries[w][name] for w in which]) for name in entries[0]},
        **{name: of_rows(name) for name in ("repetition", "presence", "frequency")},
    }
    seeds = rng.integers(0, 2**63, rows, dtype=np.uint64)
    seeds[::2] = seeds[0]
    counters = np.stack([np.arange(rows), rng.integers(0, 4, rows)], axis=1)
    counters[1::2, 0] = 77
    options = {
        **{name: of_rows(name) for name in ("temperature", "top_p", "min_p")},
        "top_k": of_rows("top_k", np.int32),
        "seeds": seeds,
        "counters": counters.astype(np.uint32),
    }
    return penalties, options, np.stack([s.logits for s in settings])[which]


# ------------------------------------------------------------------------------ chi-square


def upper_gamma(a: float, x: float) -> float:
    """Q(a, x), the regularised upper incomplete gamma function."""
    if x <= 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:  # the series of the lower one
        term = total = 1 / a
        n = a
        while term > total * 1e-16:
            n += 1
            term *= x / n
            total += term
        return max(0.0, 1 - scale * total)
    b, c, d = x + 1 - a, math.inf, 1 / (x + 1 - a)  # its continued fraction, by Lentz's method
    value = d
    for i in range(1, 100_000):
        step = -i * (i - a)
        b += 2
        d = 1 / (step * d + b)
        c = b + step / c
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return scale * value


def p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Chance that draws from p [V] stray at least as far as counts [V] do (Pearson's test).
    0 where a token was drawn that cannot be."""
    if counts[p == 0].any():
        return 0.0
    expected = counts.sum() * p
    rare = expected < MIN_EXPECTED
    wanted, got = list(expected[~rare]), list(counts[~rare])
    if expected[rare].sum() >= MIN_EXPECTED:
        wanted.append(expected[rare].sum())
        got.append(counts[rare].sum())
    elif rare.any():  # too few even together: the rarest of the others takes them in
        at = int(np.argmin(wanted))
        wanted[at] += expected[rare].sum()
        got[at] += counts[rare].sum()
    distance = sum((g - w) ** 2 / w for g, w in zip(got, wanted, strict=True))
    return upper_gamma((len(wanted) - 1) / 2, distance / 2) if len(wanted) > 1 else 1.0
