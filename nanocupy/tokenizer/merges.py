"""Whether a merge list and plain rank merging give the same ids, and which ranks do it.

Hugging Face's BPE joins only the pairs its list names; tiktoken and SentencePiece join any two
neighbours whose concatenation is a token, lowest rank first. Write BPE(T) for what the list makes
of the spelling of token T alone, and call T *reachable* if that is [T] again. Two facts carry this
module:

1. Merges strictly inside a stretch of text do not depend on what surrounds it, as long as none
   crosses its ends. So if neighbours that spell T ever stand side by side, BPE(T) passes through
   exactly that pair. If T is reachable, that pair is the one listed merge that ends BPE(T): rank
   merging never joins anything else into T. An unreachable T is never produced by the list.
2. Hence, with the unreachable tokens left out, rank merging with rank(T) = rank of the merge that
   ends BPE(T) equals the list exactly, and taking a word that is a token as a whole changes
   nothing. Where the tokenizer says `ignore_merges` (a word that is a token is taken whole,
   however the list would spell it) an unreachable T may stay if BPE(T) has more than two tokens:
   its halves then never meet. If it has exactly two, rank merging would be wrong, and the
   tokenizer is refused.

A list that names every way to cut every token, token by token, is rank merging by definition, as
long as the engine takes words whole only where the list's owner does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nanocupy.errors import TokenizerError

# A token of n symbols costs about n² steps to spell out; real vocabularies need some 10⁷ in all.
MAX_SPELLING_STEPS = 60_000_000


@dataclass(frozen=True)
class RankedVocab:
    """order: spellings that take part in merging, by rank. dropped: those that never come about."""

    order: list
    dropped: list


def rank_vocabulary(
    symbols: Sequence,
    tokens: Sequence,
    merges: Sequence[tuple],
    *,
    whole_words: bool,
    takes_words_whole: bool = True,
) -> RankedVocab:
    """Order `tokens` so that rank merging equals the merge list.

    symbols  spellings of one symbol (bytes of length 1, or one-character strings)
    tokens   every spelling that is a token, longer than a symbol; same type as symbols
    merges   (left, right) spellings, best first
    whole_words  whether a word that is a token is to be taken whole (`ignore_merges`)
    takes_words_whole  whether the engine does so anyway (tiktoken does, SentencePiece does not)

    Raises TokenizerError for a merge whose parts or result are no tokens, and for a vocabulary
    that rank merging cannot reproduce.
    """
    spellings = [*symbols, *tokens]
    index = {spelling: i for i, spelling in enumerate(spellings)}
    num_symbols = len(symbols)
    if len(set(merges)) != len(merges):  # of a pair named twice, the later rank counts
        merges = list(reversed(dict.fromkeys(reversed(merges))))
    left = np.empty(len(merges), np.int64)
    right = np.empty(len(merges), np.int64)
    result = np.empty(len(merges), np.int64)
    for rank, (a, b) in enumerate(merges):
        try:
            left[rank], right[rank], result[rank] = index[a], index[b], index[a + b]
        except KeyError:
            raise TokenizerError(
                f"merge {rank} joins {a!r} and {b!r}, but not all of these and their "
                f"concatenation are in the vocabulary"
            ) from None
    best = np.full(len(spellings), -1, np.int64)  # rank of the merge that makes each token
    merged, first = np.unique(result, return_index=True)
    best[merged] = first
    best[:num_symbols] = -1
    if len(merged) == len(merges):
        reachable = _reachable_single(left, right, result, best, num_symbols)
        if reachable is not None:
            return _finish(spellings, index, num_symbols, merges, best, reachable, whole_words)
    elif whole_words >= takes_words_whole and _names_every_cut(tokens, index, result):
        order = [spellings[i] for i in result[np.sort(first)]]
        orphans = [t for t in tokens if best[index[t]] < 0]
        if whole_words:  # a token that no merge makes is still taken whole
            for token in orphans:
                for cut in range(1, len(token)):
                    if token[:cut] in index and token[cut:] in index:
                        raise _never_merged(token, token[:cut], token[cut:])
            return RankedVocab([*symbols, *order, *orphans], [])
        return RankedVocab([*symbols, *order], orphans)
    reachable = _reachable_by_spelling(spellings, index, num_symbols, merges, best)
    return _finish(spellings, index, num_symbols, merges, best, reachable, whole_words)


def _finish(
    spellings: Sequence,
    index: Mapping,
    num_symbols: int,
    merges: Sequence[tuple],
    best: np.ndarray,
    reachable: np.ndarray,
    whole_words: bool,
) -> RankedVocab:
    ids = np.flatnonzero(reachable[num_symbols:]) + num_symbols
    order = [*spellings[:num_symbols], *(spellings[i] for i in ids[np.argsort(best[ids])])]
    unreachable = [spellings[i] for i in np.flatnonzero(~reachable)]
    if not whole_words:
        return RankedVocab(order, unreachable)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    _check_steps(unreachable)
    for token in unreachable:
        parts = spell(token, ranks)
        if len(parts) == 2:
            raise _never_merged(token, *parts)
    return RankedVocab([*order, *unreachable], [])


def _never_merged(token: object, left: object, right: object) -> TokenizerError:
    return TokenizerError(
        f"token {token!r} can be a word of its own (ignore_merges), yet its parts {left!r} and "
        f"{right!r} are never merged: this kind of vocabulary is not supported"
    )


def spell(token: bytes | str, ranks: Mapping[tuple, int]) -> list:
    """BPE of one spelling by the list: the plain algorithm, quadratic in the length."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        found = [(rank, i) for i, pair in enumerate(pairs) if (rank := ranks.get(pair)) is not None]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _reachable_by_spelling(
    spellings: Sequence,
    index: Mapping,
    num_symbols: int,
    merges: Sequence[tuple],
    best: np.ndarray,
) -> np.ndarray:
    """Reachability of every token by spelling it out; sets `best` to the merge that ends it."""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    _check_steps(spellings[num_symbols:])
    reachable = np.zeros(len(spellings), bool)
    reachable[:num_symbols] = True
    halves: dict = {}
    for a, b in merges:
        halves.setdefault(a + b, []).append((a, b))
    for token, cuts in halves.items():
        if len(token) < 2:
            continue
        # With T itself taken out of the list, a reachable T ends as the two halves of one merge.
        parts = spell(token, _Without(ranks, cuts))
        if len(parts) == 2 and (rank := ranks.get((parts[0], parts[1]))) is not None:
            reachable[index[token]] = True
            best[index[token]] = rank
    return reachable


class _Without:
    def __init__(self, ranks: Mapping[tuple, int], cuts: Sequence[tuple]) -> None:
        self._ranks, self._cuts = ranks, cuts

    def get(self, pair: tuple) -> int | None:
        return None if pair in self._cuts else self._ranks.get(pair)


def _check_steps(tokens: Sequence) -> None:
    steps = sum(len(token) ** 2 for token in tokens)
    if steps > MAX_SPELLING_STEPS:
        raise TokenizerError(
            f"the vocabulary's {len(tokens)} tokens without a plain merge order are too long to "
            f"check ({steps} steps, at most {MAX_SPELLING_STEPS})"
        )


def _names_every_cut(tokens: Sequence, index: Mapping, result: np.ndarray) -> bool:
    """Whether the list names each cut of each token into two tokens, a token's cuts in a row."""
    blocks = 1 + int(np.count_nonzero(np.diff(result)))
    if blocks != len(np.unique(result)):
        return False
    made = set(result.tolist())
    count = 0
    for token in tokens:
        if index[token] not in made:
            continue
        for cut in range(1, len(token)):
            count += token[:cut] in index and token[cut:] in index
        if count > len(result):
            return False
    return count == len(result)


def _reachable_single(
    left: np.ndarray, right: np.ndarray, result: np.ndarray, best: np.ndarray, num_symbols: int
) -> np.ndarray | None:
    """Reachability where each token has one merge, made of tokens merged earlier; else None.

    T = A·B is reachable if A and B are and nothing merges across their border while they grow.
    Their histories are undone together, latest merge first (of two equals the right one, as the
    left one merged first): whatever stood on both sides of the border until merge r was made must
    not itself have a merge before r. All tokens are walked in step.
    """
    num = len(best)
    if (best[left] >= np.arange(len(left))).any() or (best[right] >= np.arange(len(left))).any():
        return None
    child_left = np.full(num, -1, np.int64)
    child_right = np.full(num, -1, np.int64)
    child_left[result], child_right[result] = left, right
    keys = left * num + right
    by_key = np.argsort(keys)
    sorted_keys = keys[by_key]

    crossed = np.zeros(num, bool)
    what, a, b = result.copy(), left.copy(), right.copy()
    while len(what):
        rank_a, rank_b = best[a], best[b]
        undo_a = rank_a > rank_b
        more = np.maximum(rank_a, rank_b) >= 0
        what, a, b, undo_a = what[more], a[more], b[more], undo_a[more]
        limit = np.where(undo_a, best[a], best[b] + 1)
        a, b = np.where(undo_a, child_right[a], a), np.where(undo_a, b, child_left[b])
        key = a * num + b
        at = np.minimum(np.searchsorted(sorted_keys, key), len(sorted_keys) - 1)
        hit = (sorted_keys[at] == key) & (by_key[at] < limit)
        crossed[what[hit]] = True
        keep = ~hit
        what, a, b = what[keep], a[keep], b[keep]
    reachable = ~crossed
    reachable[num_symbols:] &= best[num_symbols:] >= 0
    # What is made of an unreachable token is unreachable; merges come in order, so one pass does.
    if not reachable.all():
        ok = reachable.tolist()
        for token, x, y in zip(result.tolist(), left.tolist(), right.tolist(), strict=True):
            ok[token] = ok[token] and ok[x] and ok[y]
        reachable = np.array(ok)
    return reachable
