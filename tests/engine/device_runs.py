"""Engines on the shim's device and on NumPy, over the same weights."""

from __future__ import annotations

import numpy as np

from nanocupy.config import RopeScaling
from nanocupy.engine.device_plan import DeviceSettings
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.runner import RunnerLimits
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.shim.device import ShimDevice

SIZES = {"head_size": 64, "num_heads": 2, "num_kv_heads": 1, "max_context": 96}
CONFIGS = {
    "llama": tiny_config(**SIZES),
    "qwen2": tiny_config(architecture="qwen2", has_qkv_bias=True, tied_lm_head=True, **SIZES),
    "qwen3-ntk": tiny_config(
        architecture="qwen3", has_qk_norm=True, has_o_bias=True, has_mlp_bias=True,
        rope_scaling=RopeScaling("dynamic", factor=2.0, original_context=16), **SIZES,
    ),
}  # fmt: skip
FLOAT32 = DeviceSettings("float32", "float32", "float32")
GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)


def runners(
    name: str,
    device: ShimDevice,
    *,
    num_blocks: int = 40,
    chunk: int = 32,
    settings: DeviceSettings = FLOAT32,
    max_drafts: int = 0,
):
    """The device's and the NumPy runner over the same weights."""
    checkpoint = TinyCheckpoint(CONFIGS[name], seed=3)
    drafts = {"max_drafts": max_drafts, "max_draft_rows": 12} if max_drafts else {}
    limits = RunnerLimits(num_blocks, 4, 96, chunk, 12, **drafts)
    on_device = DeviceRunner(checkpoint.config, device, limits, settings)
    on_device.upload_weights(checkpoint)
    return on_device, NumpyRunner(checkpoint.config, load_numpy_weights(checkpoint), limits)


def generate(runner, requests, run_ahead=False):
    engine = LLMEngine(runner.config, runner, run_ahead=run_ahead)
    outputs: dict[str, list[int]] = {}
    waiting = dict(requests)
    step = 0
    while waiting or engine.has_unfinished:
        for request_id in list(waiting):
            at, ids, params = waiting[request_id]
            if step >= at:
                engine.add_request(request_id, ids, params)
                del waiting[request_id]
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output.token_id)
        step += 1
    return outputs


def arrivals(count: int, params: SamplingParams, seed: int = 0):
    """Prompts that come at different steps and end at different ones."""
    rng = np.random.default_rng(seed)
    return {
        str(i): (
            3 * i,
            rng.integers(0, 48, rng.integers(1, 30)).tolist(),
            params.with_(max_tokens=int(rng.integers(2, 10))),
        )
        for i in range(count)
    }


def penalised(temperature: float, count: int = 9):
    """Requests with every kind of penalty, and without."""
    base = GREEDY.with_(temperature=temperature, seed=4)
    kinds = [
        base.with_(repetition_penalty=1.4),
        base.with_(presence_penalty=1.5, frequency_penalty=-0.4),
        base.with_(frequency_penalty=1.1, logit_bias={3: 4.0, 9: -100.0}),
        base.with_(min_tokens=4, stop_token_ids=(5, 11), ignore_eos=False),
        base.with_(repetition_penalty=0.6, min_tokens=2, logit_bias={0: 3.0}),
        base,
    ]
    return {
        name: (at, ids, kinds[i % len(kinds)].with_(max_tokens=params.max_tokens + 4))
        for i, (name, (at, ids, params)) in enumerate(arrivals(count, base, seed=6).items())
    }
