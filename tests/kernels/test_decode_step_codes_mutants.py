"""Bugs planted in the decode step of one launch where its weights are codes: each must be found."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.kernels.test_decode_step import ShimStep, check, make
from tests.kernels.test_decode_step_codes import CASES, TILED, tiled_room
from tests.kernels.test_decode_step_mutants import sources
from tests.shim import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

INT4, INT8, HALVES, LARGE = ("int4", 32), ("int8", 32), ("int4", 16), ("int4", 128)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the sources, where it is `times` times; found by the case of that name
    in test_decode_step_codes, or "tiles", with weights of this storage."""

    name: str
    old: str
    new: str
    case: str = "two, norms of q and k"
    storage: tuple[str, int] = INT4
    times: int = 1


MUTANTS = [
    Mutant(
        "no wait for room in the ring",
        "mbarrier_wait(&memory.is_free[place.stage], place.phase ^ 1);",
        "",
        "inputs beyond a stage",
        times=2,
    ),
    Mutant(
        "no wait for a stage of codes",
        "mbarrier_wait(&memory.is_full[own.stage], own.phase);",
        "",
        times=2,
    ),
    Mutant(
        "a stage is left before it is read",
        "        wait();\n        load_codes(weights, at.stage, 0);\n",
        "        wait();\n        leave();\n        load_codes(weights, at.stage, 0);\n",
        "whole chunks",
        LARGE,
    ),
    Mutant(
        "weights that were read ahead meet the inputs before theirs",
        "            ChunkProduct::multiply(sums, weights, values);\n            go_to(next);",
        "            ChunkProduct::multiply(sums, ahead, values);\n            go_to(next);",
        "whole chunks",
        LARGE,
    ),
    Mutant(
        "a group of warps takes every stage",
        "const int beyond = stage + 2 - stages;",
        "const int beyond = stage + 1 - stages;",
        "whole chunks",
        LARGE,
    ),
    Mutant(
        "of units of one stage every one is taken",
        "stages == 1 ? 2 : 1);",
        "1);",
    ),
    Mutant(
        "all tiles count as whole",
        "if (num_inputs % STAGE_INPUTS == 0) {",
        "if (true) {",
    ),
    Mutant(
        "products of the second chain are lost",
        "for (int i = 0; i < 4; ++i) group[0][c][i] += group[CHAINS - 1][c][i];",
        "for (int i = 0; i < 0; ++i) {}",
        "whole chunks",
        LARGE,
    ),
    Mutant(
        "the ring's end is gone beyond",
        "const bool is_last = stage >= RING_STAGES - 2;",
        "const bool is_last = stage > RING_STAGES - 2;",
        "inputs beyond a stage",
    ),
    Mutant(
        "a chunk is not announced",
        "mbarrier_arrive_expecting(full, bytes);",
        "mbarrier_arrive_expecting(full, bytes - CHUNK_BYTES);",
    ),
    Mutant(
        "the last chunk is not brought",
        "strip + k / CHUNK * CHUNK_BYTES, bytes,",
        "strip + k / CHUNK * CHUNK_BYTES, bytes - CHUNK_BYTES,",
        "inputs beyond a stage",
    ),
    Mutant(
        "every stage brings the first chunks",
        "strip + k / CHUNK * CHUNK_BYTES, bytes,",
        "strip, bytes,",
        "inputs beyond a stage",
    ),
    Mutant(
        "chunks are counted from the tile",
        "strip + k / CHUNK * CHUNK_BYTES, bytes,",
        "strip + (k - first) / CHUNK * CHUNK_BYTES, bytes,",
        "tiles",
    ),
    Mutant(
        "strips without the chunk that is not whole",
        "num_chunks = (num_inputs + CHUNK - 1) / CHUNK;",
        "num_chunks = max(1, num_inputs / CHUNK);",
        "inputs beyond a stage",
    ),
    Mutant(
        "inputs that do not exist are read",
        "if (k < left) inputs[c][q] = ld_shared_16(first + k);",
        "inputs[c][q] = ld_shared_16(first + k);",
    ),
    Mutant(
        "chunks that do not exist are read",
        "if (c * CHUNK_DISTANCE < left) load_chunk(c, from);",
        "load_chunk(c, from);",
        "whole chunks",
        LARGE,
    ),
    Mutant(
        "a warp's second chunk is its neighbour's",
        "from + c * CHUNK_DISTANCE_BYTES;",
        "from + c * CHUNK_BYTES;",
        "whole chunks",
        LARGE,
    ),
    Mutant(
        "a warp's next chunks are those it had",
        "warp + turn * CHUNKS_AT_ONCE * GROUP_WARPS; };",
        "warp; };",
        "inputs beyond a stage",
    ),
    Mutant(
        "the scales of row g for both rows",
        "to_float(read.halves.data[i / 2 * 2]);",
        "to_float(read.halves.data[0]);",
    ),
    Mutant(
        "the scales of the strip's first rows for all",
        "lane_id() / 4 * 8);",
        "0);",
        storage=INT8,
    ),
    Mutant(
        "the scales of the first group for all",
        "weights.scales[c][number]",
        "weights.scales[c][0]",
    ),
    Mutant(
        "the halves of a quarter change places",
        "(lane_id() & 2) / 2 == half",
        "(lane_id() & 2) / 2 != half",
        storage=HALVES,
    ),
    Mutant(
        "offsets meet the sum of the first group",
        "values.added[c][number]",
        "values.added[c][0]",
    ),
    Mutant(
        "every chunk takes the sums of the first",
        "group_sums + first * SUM_TOKENS",
        "group_sums",
        "inputs beyond a stage",
    ),
    Mutant(
        "a warp's second chunk takes the sums of its first",
        "(c * (CHUNK_DISTANCE / GROUP) + i)",
        "i",
        "whole chunks",
        LARGE,
    ),
    Mutant(
        "sums of groups that do not exist are read",
        "if (c * CHUNK_DISTANCE < left) load_sums(c, first_sums);",
        "load_sums(c, first_sums);",
        "whole chunks",
        LARGE,
    ),
    Mutant(
        "half of a group's inputs are summed",
        "warp_sum<GROUP_LANES / N>(sums[0])",
        "warp_sum<GROUP_LANES / N / 2>(sums[0])",
        "whole chunks",
        LARGE,
    ),
    Mutant(
        "sums of chunks change places",
        "N == 4 ? part / 2 + part % 2 * 2 : part;",
        "part;",
        "whole chunks",
        LARGE,
    ),
    Mutant(
        "sums of chunks that do not exist are put",
        "stores_sum<TOGETHER>() && place.chunk() * CHUNK < count",
        "stores_sum<TOGETHER>()",
        "inputs beyond a stage",
    ),
    Mutant(
        "all tokens have the first one's sums",
        "group * SUM_TOKENS + place.token",
        "group * SUM_TOKENS",
    ),
    Mutant(
        "tokens 2 and 3 take the sums of 0 and 1",
        "lane_id() % SUM_PAIRS * 2",
        "0",
        "four",
    ),
    Mutant(
        "no barrier behind the sums of groups",
        "put_inputs(rows, place_of, end, spans);\n    }\n    users_sync();",
        "put_inputs(rows, place_of, end, spans);\n    }",
    ),
    Mutant(
        "sums of a strip stay for the next",
        "for (int n = 0; n < 4; ++n) sums[n] = 0.0f;",
        "for (int n = 4; n < 4; ++n) sums[n] = 0.0f;",
        "inputs beyond a stage",
    ),
    Mutant(
        "sums of the tiles before are lost",
        "*own = adds ? *own + sums[i] : sums[i];",
        "*own = sums[i];",
        "tiles",
    ),
    Mutant(
        "up is the row behind gate",
        "other = HAS_CODES ? UNIT_ROWS / 2 : 1;",
        "other = 1;",
    ),
    Mutant(
        "sums of the other group",
        "0 : unit % 2 * GROUP_WARPS",
        "0 : 0",
    ),
    Mutant(
        "the unit of another matrix",
        "product.unit = layer.units[kind];",
        "product.unit = layer.units[0];",
    ),
    Mutant(
        "no unit for up",
        "second *= product.unit;",
        "",
    ),
    Mutant(
        "no barrier before sums are added up",
        "        users_sync();\n        float sum = 0.0f, second",
        "        float sum = 0.0f, second",
    ),
    Mutant(
        "sums are overwritten before they are added up",
        "if (SUM_BUFFERS == 1 && first > share.first_unit) users_sync();",
        "",
        "inputs beyond a stage",
    ),
    Mutant(
        "the residual stream ends in the first token's place",
        "return x + own.token * sizes.hidden_size + own",
        "return x + own",
    ),
]


def launched(mutant: Mutant, source: str, order: int) -> None:
    """Raises where the step is not that of the ops."""
    model, tuning = make(CASES.get(mutant.case, TILED), "bfloat16", storage=mutant.storage)
    card = {"max_shared": tiled_room(model)} if mutant.case == "tiles" else {}
    check(model, model.launch(ShimStep(order, source), tuning, **card))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_planted_bugs_are_found(mutant: Mutant) -> None:
    from tests.shim.driver import KernelFault

    found = []
    for order in (0, 1):
        launched(mutant, sources(), order)
        try:
            launched(mutant, sources(mutant.old, mutant.new, mutant.times), order)
        except (KernelFault, AssertionError) as exc:
            found.append(str(exc).splitlines()[0])
    assert found, "no step noticed it"
