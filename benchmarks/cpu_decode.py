"""Decode of SmolLM2-135M on the CPU, tokens a second, beside transformers in the same run.

    python -m benchmarks.cpu_decode [--model PATH] [--record]

Both run the same float32 weights, the same random prompt of 128 tokens and 128 greedy tokens, batch
1, in turns. Floor: every weight is read once a token, so bytes / the read rate of the memory, which
is measured here by summing an array of the weights' size on all cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import numpy as np

from benchmarks.records import write_record
from benchmarks.transformers_peer import make_peer
from nanocupy.checkpoint import Checkpoint, open_checkpoint
from nanocupy.engine.backend import make_engine
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.engine import LLMEngine
from nanocupy.hub import resolve_model
from nanocupy.sampling_params import SamplingParams

NUM_PROMPT, NUM_OUTPUT = 128, 128


def decode_nanocupy(engine: LLMEngine, prompt: list[int]) -> tuple[float, list[int]]:
    """Tokens a second after the first token, and the tokens."""
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)
    engine.add_request("bench", prompt, params)
    ids = [output.token_id for output in engine.step()]
    start = time.perf_counter()
    while engine.has_unfinished:
        ids += [output.token_id for output in engine.step()]
    return (NUM_OUTPUT - 1) / (time.perf_counter() - start), ids


def peer_of(checkpoint: Checkpoint):
    """The same model in transformers, float32; None where torch or transformers is missing."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        return None
    return make_peer(checkpoint, torch.float32)


def decode_peer(peer, prompt: list[int]) -> tuple[float, list[int]]:
    """The same through transformers' model with its own cache."""
    import torch

    with torch.inference_mode():
        out = peer(torch.tensor([prompt]), use_cache=True)
        ids = [int(out.logits[0, -1].argmax())]
        start = time.perf_counter()
        while len(ids) < NUM_OUTPUT:
            out = peer(
                torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True
            )
            ids.append(int(out.logits[0, -1].argmax()))
        return (NUM_OUTPUT - 1) / (time.perf_counter() - start), ids


def read_rate(num_bytes: int) -> float:
    """Bytes a second that a matrix-vector product reads from memory."""
    matrix = np.ones((num_bytes // 4 // 4096, 4096), np.float32)
    vector = np.ones((1, 4096), np.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        vector @ matrix.T
        times.append(time.perf_counter() - start)
    return matrix.nbytes / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/records/")
    args = parser.parse_args()

    checkpoint = open_checkpoint(resolve_model(args.model))
    config = EngineConfig(device="cpu", max_context=2048, max_num_seqs=1, prefix_cache=False)
    engine = make_engine(checkpoint, config)
    peer = peer_of(checkpoint)
    prompt = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, NUM_PROMPT).tolist()

    ours, theirs, agree = [], [], []
    for _ in range(args.rounds):
        rate, ids = decode_nanocupy(engine, prompt)
        ours.append(rate)
        if peer is not None:
            rate, peer_ids = decode_peer(peer, prompt)
            theirs.append(rate)
            agree.append(ids == peer_ids)
    num_bytes = checkpoint.config.num_parameters * 4
    ceiling = read_rate(num_bytes) / num_bytes
    median = statistics.median(ours)
    print(f"nanocupy      {median:7.1f} tok/s   ({min(ours):.1f} to {max(ours):.1f})")
    if theirs:
        print(
            f"transformers  {statistics.median(theirs):7.1f} tok/s   "
            f"({min(theirs):.1f} to {max(theirs):.1f}); same tokens: {all(agree)}"
        )
    else:
        print("transformers  not measured: install torch and transformers (nanocupy[bench])")
    print(f"ceiling       {ceiling:7.1f} tok/s   ({100 * median / ceiling:.0f} % of it reached)")
    if args.record:
        peer_figures = {}
        if theirs:
            import transformers

            peer_figures = {
                "peer": f"transformers {transformers.__version__} float32",
                "peer_value": round(statistics.median(theirs), 4),
            }
        write_record(
            "cpu",
            "cpu/decode/smollm2-135m",
            ours,
            "tok/s",
            device=f"{os.cpu_count()} cores {platform.machine()}",
            dtype="float32",
            bytes=num_bytes,
            flops=2 * checkpoint.config.num_parameters,
            ceiling=round(ceiling, 2),
            share=round(median / ceiling, 4),
            **peer_figures,
        )


if __name__ == "__main__":
    main()
