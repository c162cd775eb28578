"""Bugs planted in the decode step of one launch where its weights are codes: each must be found."""

from __future__ import annotations

import pytest

from tests.kernels.decode_step_mutants import Mutant, assert_is_found
from tests.shim import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

INT4, INT8, HALVES, LARGE = ("int4", 32), ("int8", 32), ("int4", 16), ("int4", 128)

MUTANTS = [
    Mutant(
        "no wait for room in the ring",
        "mbarrier_wait(&memory.is_free[place.stage], place.phase ^ 1);",
        "",
        "inputs beyond a stage",
        storage=INT4,
        times=2,
    ),
    Mutant(
        "no wait for a stage of codes",
        "mbarrier_wait(&memory.is_full[own.stage], own.phase);",
        "",
        storage=INT4,
        times=2,
    ),
    Mutant(
        "a stage is left before it is read",
        "        wait();\n        load_codes(weights, at.stage, 0);\n",
        "        wait();\n        leave();\n        load_codes(weights, at.stage, 0);\n",
        "whole chunks",
        storage=LARGE,
    ),
    Mutant(
        "weights that were read ahead meet the inputs before theirs",
        "            ChunkProduct::multiply(sums, weights, values);\n            go_to(next);",
        "            ChunkProduct::multiply(sums, ahead, values);\n            go_to(next);",
        "whole chunks",
        storage=LARGE,
    ),
    Mutant(
        "a group of warps takes every stage",
        "const int beyond = stage + 2 - stages;",
        "const int beyond = stage + 1 - stages;",
        "whole chunks",
        storage=LARGE,
    ),
    Mutant(
        "of units of one stage every one is taken",
        "stages == 1 ? 2 : 1);",
        "1);",
        storage=INT4,
    ),
    Mutant(
        "all tiles count as whole",
        "if (num_inputs % STAGE_INPUTS == 0) {",
        "if (true) {",
        storage=INT4,
    ),
    Mutant(
        "products of the second chain are lost",
        "for (int i = 0; i < 4; ++i) group[0][c][i] += group[CHAINS - 1][c][i];",
        "for (int i = 0; i < 0; ++i) {}",
        "whole chunks",
        storage=LARGE,
    ),
    Mutant(
        "the ring's end is gone beyond",
        "const bool is_last = stage >= RING_STAGES - 2;",
        "const bool is_last = stage > RING_STAGES - 2;",
        "inputs beyond a stage",
        storage=INT4,
    ),
    Mutant(
        "a chunk is not announced",
        "mbarrier_arrive_expecting(full, bytes);",
        "mbarrier_arrive_expecting(full, bytes - CHUNK_BYTES);",
        storage=INT4,
    ),
    Mutant(
        "the last chunk is not brought",
        "strip + k / CHUNK * CHUNK_BYTES, bytes,",
        "strip + k / CHUNK * CHUNK_BYTES, bytes - CHUNK_BYTES,",
        "inputs beyond a stage",
        storage=INT4,
    ),
    Mutant(
        "every stage brings the first chunks",
        "strip + k / CHUNK * CHUNK_BYTES, bytes,",
        "strip, bytes,",
        "inputs beyond a stage",
        storage=INT4,
    ),
    Mutant(
        "chunks are counted from the tile",
        "strip + k / CHUNK * CHUNK_BYTES, bytes,",
        "strip + (k - first) / CHUNK * CHUNK_BYTES, bytes,",
        "tiles",
        storage=INT4,
    ),
    Mutant(
        "strips without the chunk that is not whole",
        "num_chunks = (num_inputs + CHUNK - 1) / CHUNK;",
        "num_chunks = max(1, num_inputs / CHUNK);",
        "inputs beyond a stage",
        storage=INT4,
    ),
    Mutant(
        "inputs that do not exist are read",
        "if (k < left) inputs[c][q] = ld_shared_16(first + k);",
        "inputs[c][q] = ld_shared_16(first + k);",
        storage=INT4,
    ),
    Mutant(
        "chunks that do not exist are read",
        "if (c * CHUNK_DISTANCE < left) load_chunk(c, from);",
        "load_chunk(c, from);",
        "whole chunks",
        storage=LARGE,
    ),
    Mutant(
        "a warp's second chunk is its neighbour's",
        "from + c * CHUNK_DISTANCE_BYTES;",
        "from + c * CHUNK_BYTES;",
        "whole chunks",
        storage=LARGE,
    ),
    Mutant(
        "a warp's next chunks are those it had",
        "warp + turn * CHUNKS_AT_ONCE * GROUP_WARPS; };",
        "warp; };",
        "inputs beyond a stage",
        storage=INT4,
    ),
    Mutant(
        "the scales of row g for both rows",
        "to_float(read.halves.data[i / 2 * 2]);",
        "to_float(read.halves.data[0]);",
        storage=INT4,
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
        storage=INT4,
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
        storage=INT4,
    ),
    Mutant(
        "every chunk takes the sums of the first",
        "group_sums + first * SUM_TOKENS",
        "group_sums",
        "inputs beyond a stage",
        storage=INT4,
    ),
    Mutant(
        "a warp's second chunk takes the sums of its first",
        "(c * (CHUNK_DISTANCE / GROUP) + i)",
        "i",
        "whole chunks",
        storage=LARGE,
    ),
    Mutant(
        "sums of groups that do not exist are read",
        "if (c * CHUNK_DISTANCE < left) load_sums(c, first_sums);",
        "load_sums(c, first_sums);",
        "whole chunks",
        storage=LARGE,
    ),
    Mutant(
        "half of a group's inputs are summed",
        "warp_sum<GROUP_LANES / N>(sums[0])",
        "warp_sum<GROUP_LANES / N / 2>(sums[0])",
        "whole chunks",
        storage=LARGE,
    ),
    Mutant(
        "sums of chunks change places",
        "N == 4 ? part / 2 + part % 2 * 2 : part;",
        "part;",
        "whole chunks",
        storage=LARGE,
    ),
    Mutant(
        "sums of chunks that do not exist are put",
        "stores_sum<TOGETHER>() && place.chunk() * CHUNK < count",
        "stores_sum<TOGETHER>()",
        "inputs beyond a stage",
        storage=INT4,
    ),
    Mutant(
        "all tokens have the first one's sums",
        "group * SUM_TOKENS + place.token",
        "group * SUM_TOKENS",
        storage=INT4,
    ),
    Mutant(
        "tokens 2 and 3 take the sums of 0 and 1",
        "lane_id() % SUM_PAIRS * 2",
        "0",
        "four",
        storage=INT4,
    ),
    Mutant(
        "no barrier behind what a norm gives",
        "put_inputs(rows, place_of, end, spans);\n    }\n    users_sync();",
        "put_inputs(rows, place_of, end, spans);\n    }",
        storage=INT4,
    ),
    Mutant(
        "sums of a strip stay for the next",
        "for (int n = 0; n < 4; ++n) sums[n] = 0.0f;",
        "for (int n = 4; n < 4; ++n) sums[n] = 0.0f;",
        "inputs beyond a stage",
        storage=INT4,
    ),
    Mutant(
        "sums of the tiles before are lost",
        "*own = adds ? *own + sums[i] : sums[i];",
        "*own = sums[i];",
        "tiles",
        storage=INT4,
    ),
    Mutant(
        "up is the row behind gate",
        "other = HAS_CODES ? UNIT_ROWS / 2 : 1;",
        "other = 1;",
        storage=INT4,
    ),
    Mutant(
        "sums of the other group",
        "0 : unit % 2 * GROUP_WARPS",
        "0 : 0",
        storage=INT4,
    ),
    Mutant(
        "the unit of another matrix",
        "product.unit = layer.units[kind];",
        "product.unit = layer.units[0];",
        storage=INT4,
    ),
    Mutant(
        "no unit for up",
        "second *= product.unit;",
        "",
        storage=INT4,
    ),
    Mutant(
        "no barrier before sums are added up",
        "        users_sync();\n        float sum = 0.0f, second",
        "        float sum = 0.0f, second",
        storage=INT4,
    ),
    Mutant(
        "sums are overwritten before they are added up",
        "if (SUM_BUFFERS == 1 && first > share.first_unit) users_sync();",
        "",
        "inputs beyond a stage",
        storage=INT4,
    ),
    Mutant(
        "the residual stream ends in the first token's place",
        "return x + own.token * sizes.hidden_size + own",
        "return x + own",
        storage=INT4,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_planted_bugs_are_found(mutant: Mutant) -> None:
    assert_is_found(mutant)
