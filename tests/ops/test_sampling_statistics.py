"""The NumPy sampler draws what it should: chi-square against probabilities of its own, bugs that
must show there, and the cases at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from nanocupy.ops import numpy_ops, philox
from nanocupy.ops.numpy_ops import NumpyOps, kept_probabilities
from tests.ops import sampling_oracle as oracle
from tests.ops.sampling_oracle import SETTINGS, Setting, p_value

DRAWS = 200_000  # of each setting
# 20 settings: a right sampler fails anywhere with a chance below 1e-6.
SMALLEST_P = 1e-8


def draw(num_draws: int, settings: list[Setting] = SETTINGS) -> dict[str, np.ndarray]:
    """How often NumpyOps draws each token of each setting; settings of one vocabulary are rows
    of the same calls, in random order."""
    counts = {}
    for vocab in {s.vocab: None for s in settings}:
        group = [s for s in settings if s.vocab == vocab]
        which = np.repeat(np.arange(len(group)), num_draws)
        np.random.default_rng(vocab).shuffle(which)
        table = np.zeros((len(group), vocab), np.int64)
        for seed, start in enumerate(range(0, len(which), 50_000)):
            rows = which[start : start + 50_000]
            penalties, options, logits = oracle.mixed_batch(group, rows, seed)
            out = np.full(len(rows), -1, np.int32)
            NumpyOps().penalize(logits, **penalties)
            NumpyOps().sample(logits, **options, out=out)
            np.add.at(table, (rows, out), 1)
        counts |= {s.name: row for s, row in zip(group, table, strict=True)}
    return counts


@pytest.fixture(scope="module")
def counts() -> dict[str, np.ndarray]:
    return draw(DRAWS)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_draws_follow_the_probabilities(setting: Setting, counts: dict[str, np.ndarray]) -> None:
    got = counts[setting.name]
    assert got.sum() == DRAWS
    assert p_value(got, oracle.probabilities(setting)) > SMALLEST_P


def test_the_settings_differ() -> None:
    """Each cut leaves something out and keeps something; the tails are not too thin to see."""
    for setting in SETTINGS:
        p = oracle.probabilities(setting)
        cuts = setting.top_k > 0 or setting.top_p < 1 or setting.min_p > 0
        full = oracle.tempered(oracle.softmax(oracle.penalised(setting)), setting.temperature)
        assert ((p == 0).sum() > (full == 0).sum()) == cuts
        assert (p * DRAWS >= oracle.MIN_EXPECTED).sum() >= 3


@pytest.mark.parametrize(
    ("distance", "degrees", "wanted"),
    [(3.841458820694124, 1, 0.05), (18.307038053275146, 10, 0.05), (0.0, 4, 1.0),
     (149.44925277903886, 100, 1e-3), (50.0, 100, 0.99999305), (2.0, 2, math.exp(-1))],
)  # fmt: skip
def test_chi_square_of_tables(distance: float, degrees: int, wanted: float) -> None:
    assert oracle.upper_gamma(degrees / 2, distance / 2) == pytest.approx(wanted, rel=1e-6)


def test_p_values_of_right_draws_are_even() -> None:
    rng = np.random.default_rng(0)
    p = oracle.probabilities(SETTINGS[-2])
    values = [p_value(rng.multinomial(20_000, p), p) for _ in range(400)]
    for bound in (0.05, 0.25, 0.5, 0.75):
        share = np.mean(np.array(values) < bound)
        assert abs(share - bound) < 4 * math.sqrt(bound * (1 - bound) / 400)


# ------------------------------------------------------------------------------ wrong samplers

BY_NAME = {s.name: s for s in SETTINGS}


def _changed(name: str, **changes) -> np.ndarray:
    setting = BY_NAME[name]
    return oracle.probabilities(Setting(**(vars(setting) | changes)))


def _top_p_before_temperature(s: Setting) -> np.ndarray:
    p = oracle.softmax(oracle.penalised(s))
    return oracle.tempered(oracle.renormalised(oracle.cut_top_p(p, s.top_p)), s.temperature)


def _top_p_of_what_top_k_left(s: Setting) -> np.ndarray:
    p = oracle.tempered(oracle.softmax(oracle.penalised(s)), s.temperature)
    return oracle.renormalised(oracle.cut_top_p(oracle.cut_top_k(p, s.top_k), s.top_p))


def _top_p_before_top_k(s: Setting) -> np.ndarray:
    p = oracle.tempered(oracle.softmax(oracle.penalised(s)), s.temperature)
    p = oracle.renormalised(oracle.cut_top_p(p, s.top_p))
    return oracle.renormalised(oracle.cut_top_k(p, s.top_k))


def _min_p_of_one(s: Setting) -> np.ndarray:
    p = oracle.tempered(oracle.softmax(oracle.penalised(s)), s.temperature)
    return oracle.renormalised(np.where(p >= s.min_p, p, 0))


def _min_p_before_temperature(s: Setting) -> np.ndarray:
    p = oracle.softmax(oracle.penalised(s))
    return oracle.tempered(oracle.renormalised(oracle.cut_min_p(p, s.min_p)), s.temperature)


def _repetition_divides_always(s: Setting) -> np.ndarray:
    logits = s.logits.astype(float)
    logits[[*{*s.prompt, *s.output}]] /= s.repetition
    return oracle.softmax(logits)


def _penalties_on(s: Setting, tokens: list[int]) -> np.ndarray:
    logits = s.logits.astype(float)
    for token in set(tokens):
        logits[token] -= s.presence
    for token in tokens:
        logits[token] -= s.frequency
    return oracle.softmax(logits)


def _bias_after_penalties(s: Setting) -> np.ndarray:
    logits = oracle.penalised(Setting(**(vars(s) | {"bias": {}})))
    for token, bias in s.bias.items():
        logits[token] += bias
    return oracle.softmax(logits)


WRONG: dict[str, tuple[str, Callable[[Setting], np.ndarray]]] = {
    "temperature off by 2 %": ("temperature 1", lambda s: _changed(s.name, temperature=1.02)),
    "top-p before temperature": ("top-p, hotter", _top_p_before_temperature),
    "top-p not of what top-k left": ("top-k and top-p", _top_p_of_what_top_k_left),
    "top-p before top-k": ("top-k and top-p", _top_p_before_top_k),
    "top-p leaves the last out": (
        "top-p", lambda s: _changed(s.name, top_p=0.8 - oracle.probabilities(s)[
            oracle.probabilities(s) > 0].min() * 0.8),
    ),
    "top-k keeps one more": ("top-k", lambda s: _changed(s.name, top_k=s.top_k + 1)),
    "top-k keeps one less": ("top-k", lambda s: _changed(s.name, top_k=s.top_k - 1)),
    "min-p of 1, not of the largest": ("min-p", _min_p_of_one),
    "min-p before temperature": ("min-p, hotter", _min_p_before_temperature),
    "repetition divides negative logits": ("repetition", _repetition_divides_always),
    "presence counts the prompt": ("presence", lambda s: _penalties_on(s, [*s.prompt, *s.output])),
    "frequency once": ("frequency", lambda s: _penalties_on(s, list(set(s.output)))),
    "frequency counts the prompt": (
        "frequency", lambda s: _penalties_on(s, [*s.prompt, *s.output])
    ),
    "bias after penalties": ("every penalty", _bias_after_penalties),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_sampler_shows(mistake: str) -> None:
    name, wrong = WRONG[mistake]
    drawn = np.random.default_rng(1).multinomial(DRAWS, wrong(BY_NAME[name]))
    assert p_value(drawn, oracle.probabilities(BY_NAME[name])) < SMALLEST_P


@pytest.mark.parametrize(
    "bias",
    [lambda u: u**1.05, lambda u: np.floor(u * 64) / 64, lambda u: u * 0.98],
    ids=["bent", "coarse", "short"],
)
def test_a_biased_draw_shows(bias, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the sampler itself."""
    honest = philox.uniforms
    monkeypatch.setattr(philox, "uniforms", lambda s, c: bias(honest(s, c)))
    setting = BY_NAME["temperature 1"]
    got = draw(DRAWS, [setting])[setting.name]
    assert p_value(got, oracle.probabilities(setting)) < SMALLEST_P


# ------------------------------------------------------------------------------ pairs of draws


@pytest.mark.parametrize("axis", ["position", "sample", "seed"])
def test_neighbouring_draws_are_independent(axis: str) -> None:
    """Tokens of consecutive positions (sample indices, seeds): their pairs are evenly spread."""
    number = np.arange(100_000)
    counters = np.zeros((len(number), 2), np.uint32)
    seeds = np.full(len(number), 5, np.uint64)
    if axis == "seed":
        seeds = number.astype(np.uint64)
    else:
        counters[:, ("position", "sample").index(axis)] = number
    cells = (philox.uniforms(seeds, counters) * 16).astype(int)
    pairs = np.bincount(cells[:-1] * 16 + cells[1:], minlength=256)
    assert p_value(pairs, np.full(256, 1 / 256)) > SMALLEST_P


# ------------------------------------------------------------------------------ both paths


def _sample(logits: np.ndarray, options: dict[str, np.ndarray]) -> np.ndarray:
    out = np.full(len(logits), -1, np.int32)
    NumpyOps().sample(logits, **options, out=out)
    return out


def random_options(rng: np.random.Generator, rows: int, vocab: int) -> dict[str, np.ndarray]:
    """Parameters of rows, each option off in some of them."""
    off = rng.random((4, rows)) < [[0.1], [0.5], [0.4], [0.6]]
    temperature = np.where(off[0], 0, np.exp(rng.uniform(np.log(0.1), np.log(4), rows)))
    top_k = np.exp(rng.uniform(0, np.log(vocab + 1), rows)).astype(np.int32)
    return {
        "temperature": temperature.astype(np.float32),
        "top_k": np.where(off[1], -1, top_k).astype(np.int32),
        "top_p": np.where(off[2], 1, 1 - 10 ** rng.uniform(-4, 0, rows)).astype(np.float32),
        "min_p": np.where(off[3], 0, 10 ** rng.uniform(-5, 0, rows)).astype(np.float32),
        "seeds": rng.integers(0, 2**64, rows, dtype=np.uint64),
        "counters": rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
    }


def random_logits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """float32 [rows, vocab] as models give them: bell-shaped, long-tailed, rounded to 16 bits (so
    that many tie), with banned tokens; each row of its own width."""
    logits = rng.standard_normal((rows, vocab), np.float32)
    logits *= np.exp(rng.uniform(np.log(0.3), np.log(5), (rows, 1))).astype(np.float32)
    kind = rng.integers(0, 4, rows)
    logits[kind == 1] *= abs(logits[kind == 1]) ** 0.5
    rounded = logits[kind == 2].view(np.uint32) & np.uint32(0xFFFF0000)
    logits[kind == 2] = rounded.view(np.float32)
    masked = np.flatnonzero(kind == 3)
    banned = rng.random((len(masked), vocab)) < 0.5
    banned[:, rng.integers(0, vocab)] = False
    logits[masked] = np.where(banned, -np.inf, logits[masked])
    return logits


@pytest.mark.parametrize(("rows", "vocab"), [(600, 300), (300, 3000), (60, 40_000)])
def test_wide_rows_without_a_sort_are_rows_with_one(
    rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(vocab)
    logits, options = random_logits(rng, rows, vocab), random_options(rng, rows, vocab)
    found = []
    for limit in (0, 1 << 30):
        monkeypatch.setattr(numpy_ops, "WIDE_VOCAB", limit)
        found.append(_sample(logits, options))
    np.testing.assert_array_equal(*found)


def test_a_row_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(3)
    logits, options = random_logits(rng, 500, 190), random_options(rng, 500, 190)
    together = _sample(logits, options)
    order = rng.permutation(500)
    shuffled = _sample(logits[order], {n: v[order] for n, v in options.items()})
    np.testing.assert_array_equal(shuffled, together[order])
    for s in range(0, 500, 7):
        alone = _sample(logits[s : s + 1], {n: v[s : s + 1] for n, v in options.items()})
        assert alone[0] == together[s]


def test_kept_probabilities_are_the_drawn_ones() -> None:
    """The same cuts, asked for one row: they agree with the oracle's."""
    for s in SETTINGS:
        kept = kept_probabilities(
            oracle.penalised(s).astype(np.float32), s.temperature, s.top_k, s.top_p, s.min_p
        )
        assert kept.max() == 1
        np.testing.assert_allclose(kept / kept.sum(), oracle.probabilities(s), atol=1e-6)


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["wide", "batched"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize(("draw_at", "wanted"), [(0.0, 1), (0.5, 3), (1 - 2.0**-53, 3)])
def test_the_ends_of_the_draw(
    limit: int, top_p: float, draw_at: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 is the first token with weight, half of two halves the second, and the highest draw the
    last with weight: banned tokens stand around."""
    monkeypatch.setattr(numpy_ops, "WIDE_VOCAB", limit)
    monkeypatch.setattr(philox, "uniforms", lambda seeds, counters: np.full(len(seeds), draw_at))
    options = random_options(np.random.default_rng(0), 3, 7)
    options |= {"temperature": np.ones(3, "f4"), "top_p": np.full(3, top_p, "f4")}
    options |= {"top_k": np.full(3, -1, "i4"), "min_p": np.zeros(3, "f4")}
    row = np.array([-np.inf, 1, -np.inf, 1, -np.inf, -np.inf, -np.inf], np.float32)
    assert _sample(np.tile(row, (3, 1)), options).tolist() == [wanted] * 3
    # Sums that are no round numbers.
    logits = np.random.default_rng(1).standard_normal((3, 7)).astype(np.float32)
    logits[:, [0, 6]] = -np.inf
    if draw_at != 0.5 and top_p == 1:
        assert _sample(logits, options).tolist() == [1 if draw_at == 0 else 5] * 3
