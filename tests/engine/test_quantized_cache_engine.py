"""Engines whose cache is quantised: the same tokens however they run, on NumPy and on the shim's
device, and what the settings allow where."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from nanocupy.engine.backend import device_settings, make_runner
from nanocupy.engine.batch import build_batch
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.device_kernels import kernel_variants
from nanocupy.engine.device_plan import DeviceSettings, op_sizes, plan_limits
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import ScheduledRequest
from nanocupy.engine.scheduler import SchedulerSettings
from nanocupy.errors import ConfigError
from nanocupy.kv_types import FP8, QUANTIZED, kv_row_bytes
from nanocupy.model.load import load_numpy_weights
from nanocupy.ops.cuda_sizes import fused_bounds, step_launch
from tests.checkpoint.tiny import TinyCheckpoint
from tests.engine import device_runs, test_equalities
from tests.engine.device_runs import GREEDY, arrivals, generate
from tests.engine.test_equalities import ROOMY, TIGHT, requests, run
from tests.shim import build
from tests.shim.device import MODERN, OLD, ShimDevice

KINDS = tuple(QUANTIZED.values())
ON_SHIM = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)


# ------------------------------------------------------------------------------ equalities


def numpy_engine(
    kind: str, *, num_blocks: int = ROOMY, chunk: int = 64, host_blocks: int = 64,
    prefix_cache: bool = True, run_ahead: bool = False, **settings,
) -> LLMEngine:  # fmt: skip
    config, weights = test_equalities.CONFIGS["plain"], test_equalities.weights_of("plain")
    limits = RunnerLimits(num_blocks, 4, 96, chunk, 6, host_blocks)
    runner = NumpyRunner(config, weights, limits, cache_dtype=kind, deferred=run_ahead)
    return LLMEngine(
        config, runner, SchedulerSettings(6, chunk, **settings),
        prefix_cache=prefix_cache, run_ahead=run_ahead,
    )  # fmt: skip


@cache
def alone(kind: str) -> list[list[int]]:
    outputs = []
    for _, ids, params, priority in requests():
        engine = numpy_engine(kind, prefix_cache=False, host_blocks=0)
        outputs += run(engine, [(0, ids, params, priority)])
    return outputs


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_chunked_cached(kind, chunk, prefix_cache):
    engine = numpy_engine(kind, chunk=chunk, prefix_cache=prefix_cache, run_ahead=chunk == 7)
    assert run(engine, requests()) == alone(kind)
    if prefix_cache:
        assert engine.pool.cache.counters.num_tokens_saved >= 12


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_preempted(kind, mode):
    engine = numpy_engine(kind, num_blocks=TIGHT, preemption=mode, run_ahead=True)
    assert run(engine, requests()) == alone(kind)
    counters = engine.scheduler.counters
    assert (counters.num_swapped_out if mode == "swap" else counters.num_recomputed) >= 2


def test_codes_cost_little_and_something():
    """Logits are near those of a cache in float32, int8's nearer than e4m3's, and not the same."""
    config, weights = test_equalities.CONFIGS["plain"], test_equalities.weights_of("plain")
    ids = np.random.default_rng(0).integers(0, 48, 60).tolist()
    request = Request("a", ids, GREEDY, 0, 70)
    request.block_ids = [3, 9, 4, 1]
    batch = build_batch([ScheduledRequest(request, 60, True)], block_size=16, table_width=6)
    batch = type(batch)(**vars(batch) | {"sample_rows": np.arange(60, dtype=np.int32)})
    limits = RunnerLimits(12, 16, 96, 64, 64)
    logits = {
        kind: NumpyRunner(config, weights, limits, cache_dtype=kind).logits(batch).copy()
        for kind in (None, *KINDS)
    }
    errors = {k: np.abs(logits[k] - logits[None]).mean() / logits[None].std() for k in KINDS}
    assert 1e-5 < errors["int8"] < errors[FP8] < 0.05


# ------------------------------------------------------------------------------ the device


def pair(name: str, kind: str, device: ShimDevice, num_blocks: int = 40, **more):
    """The device's and the NumPy runner over the same weights, in float32 but for the cache."""
    checkpoint = TinyCheckpoint(device_runs.CONFIGS[name], seed=3)
    limits = RunnerLimits(num_blocks, 4, 96, 32, 12, **more)
    settings = DeviceSettings("float32", "float32", kind)
    on_device = DeviceRunner(checkpoint.config, device, limits, settings)
    on_device.upload_weights(checkpoint)
    weights = load_numpy_weights(checkpoint)
    return on_device, NumpyRunner(checkpoint.config, weights, limits, cache_dtype=kind)


@ON_SHIM
@pytest.mark.parametrize("traits", [MODERN, OLD], ids=["modern", "old"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_numpy(kind, traits):
    device = ShimDevice(traits)
    on_device, on_numpy = pair("qwen3-ntk", kind, device)
    arriving = arrivals(4, GREEDY)
    assert generate(on_device, arriving, run_ahead=True) == generate(on_numpy, arriving)
    assert device.counts["captured"]


@ON_SHIM
@pytest.mark.parametrize("kind", KINDS)
def test_two_streams_give_the_same_tokens(kind):
    checkpoint = TinyCheckpoint(device_runs.CONFIGS["llama"], seed=3)
    limits = RunnerLimits(30, 4, 96, 20, 12)
    settings = DeviceSettings("float32", "float32", kind, two_streams=True)
    device = ShimDevice()
    on_device = DeviceRunner(checkpoint.config, device, limits, settings)
    on_device.upload_weights(checkpoint)
    weights = load_numpy_weights(checkpoint)
    on_numpy = NumpyRunner(checkpoint.config, weights, limits, cache_dtype=kind)
    arriving = {i: (at // 2, *rest) for i, (at, *rest) in arrivals(6, GREEDY, seed=1).items()}
    assert generate(on_device, arriving, run_ahead=True) == generate(on_numpy, arriving)


@ON_SHIM
@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_preempted_on_the_device(kind, mode):
    """Blocks that go to the host and back bring their scales along."""
    on_device, _ = pair("llama", kind, ShimDevice(), 13, num_host_blocks=20)
    _, on_numpy = pair("llama", kind, ShimDevice(), 60)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 48, 8).tolist() for _ in range(4)]
    outputs = []
    for runner, settings in (
        (on_device, SchedulerSettings(4, 32, preemption=mode)), (on_numpy, None)
    ):  # fmt: skip
        engine = LLMEngine(runner.config, runner, settings)
        tokens: dict[str, list[int]] = {}
        for number, ids in enumerate(prompts):
            engine.add_request(str(number), ids, GREEDY.with_(max_tokens=12))
        while engine.has_unfinished:
            for output in engine.step():
                tokens.setdefault(output.request_id, []).append(output.token_id)
        outputs.append(tokens)
        if settings is not None:
            counters = engine.scheduler.counters
            assert counters.num_swapped_out if mode == "swap" else counters.num_recomputed
    assert outputs[0] == outputs[1]


@ON_SHIM
@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_sixteen_bits(kind):
    """Prefill and decode attention on tensor cores, against NumPy with the same cache."""
    checkpoint = TinyCheckpoint(device_runs.CONFIGS["qwen2"], seed=3, dtype="bfloat16")
    limits = RunnerLimits(40, 16, 96, 64, 40)
    settings = DeviceSettings("bfloat16", "bfloat16", kind)
    device = ShimDevice()
    on_device = DeviceRunner(checkpoint.config, device, limits, settings)
    on_device.upload_weights(checkpoint)
    on_numpy = NumpyRunner(
        checkpoint.config, load_numpy_weights(checkpoint), limits, cache_dtype=kind
    )
    ids = np.random.default_rng(1).integers(0, 48, 37).tolist()
    request = Request("a", ids, GREEDY, 0, 60)
    request.block_ids = [5, 2, 9]
    for count, rows in ((36, 36), (1, 1)):
        batch = build_batch([ScheduledRequest(request, count, True)], block_size=16, table_width=6)
        batch = type(batch)(**vars(batch) | {"sample_rows": np.arange(rows, dtype=np.int32)})
        wanted, got = on_numpy.logits(batch), on_device.logits(batch)
        rms = np.sqrt(np.mean(wanted**2, axis=-1, keepdims=True))
        assert np.abs(got - wanted).mean() < 0.03 * rms.mean()
        request.num_computed_tokens = 36
    entries = set(device.kernels.launched)
    assert {"attention_prefill", "attention_decode_mma", "rope_write_kv"} <= entries


@ON_SHIM
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_that_steps_need_are_known_beforehand(kind):
    device = ShimDevice()
    on_device, _ = pair("qwen3-ntk", kind, device)
    known = {(file, tuple(sorted(m.items()))) for file, m in on_device.kernel_variants()}
    asked: set = set()
    get = device.kernels.get

    def noted(file: str, entry: str, **macros: int):
        asked.add((file, tuple(sorted(macros.items()))))
        return get(file, entry, **macros)

    device.kernels.get = noted
    generate(on_device, arrivals(5, GREEDY))
    assert {file for file, _ in asked - known} <= {"gemv.cu"}, "batches between the powers"
    assert any(file == "rope.cu" and dict(macros)["CACHE"] >= 3 for file, macros in asked)


def test_paths_that_take_no_codes_are_not_chosen():
    config = device_runs.CONFIGS["llama"]
    limits = RunnerLimits(40, 16, 96, 64, 4)
    traits = replace(MODERN, wgmma=True)
    plain = DeviceSettings("bfloat16", "bfloat16", "bfloat16")
    for settings in (plain, *(replace(plain, cache_dtype=kind) for kind in KINDS)):
        sizes = op_sizes(config, settings, limits)
        takes = settings is plain
        assert fused_bounds(sizes, traits, 1)  # which takes them
        assert step_launch(sizes, traits, 1) is None or takes
        files = {file for file, _ in kernel_variants(config, settings, limits, traits)}
        assert ("attention_prefill_hopper.cu" in files) == takes
        assert ("attention_prefill.cu" in files) != takes
        if not takes:
            assert "decode_step.cu" not in files


# ------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_scales(kind):
    config = device_runs.CONFIGS["llama"]
    token_bytes = 2 * config.num_layers * config.num_kv_heads * (config.head_size + 2)
    assert config.kv_bytes_per_token(kind) == token_bytes
    assert kv_row_bytes(64, kind) == 66
    limits = {"max_context": 96, "max_num_seqs": 4, "max_step_tokens": 32}
    settings = DeviceSettings("float32", "float32", kind)
    roomy = plan_limits(config, ShimDevice(), settings, **limits)
    runner = DeviceRunner(config, ShimDevice(), roomy, settings)
    assert runner.bytes_by_owner()["kv cache"] == token_bytes * roomy.num_blocks * 16
    # What is left holds more blocks than of float32, by nearly four times.
    fixed = runner.plan.total_bytes - token_bytes * roomy.num_blocks * 16
    tight = ShimDevice(memory_bytes=int((fixed + 10 * token_bytes * 16) / 0.9) + 4096)
    assert 10 <= plan_limits(config, tight, settings, **limits).num_blocks <= 16
    on_numpy = NumpyRunner(config, {}, RunnerLimits(7, 16, 96, 32, 4), cache_dtype=kind)
    assert on_numpy.bytes_by_owner()["kv cache"] == token_bytes * 7 * 16


@ON_SHIM
@pytest.mark.parametrize("kind", KINDS)
def test_swaps_cost_the_bytes_of_codes_and_scales(kind):
    on_device, _ = pair("llama", kind, ShimDevice(), num_host_blocks=20)
    costs = on_device.swap_costs()
    assert costs.block_bytes == on_device.config.kv_bytes_per_token(kind) * 4


# ------------------------------------------------------------------------------ settings


def test_what_cards_take():
    for dtype in ("float32", "float16", "bfloat16"):
        for kind, name in QUANTIZED.items():
            config = EngineConfig(dtype=dtype, kv_cache_dtype=kind)
            settings = device_settings(config, (8, 9))
            assert (settings.dtype, settings.cache_dtype) == (dtype, name)
    int8 = EngineConfig(kv_cache_dtype="int8")
    assert device_settings(int8, (7, 5)).cache_dtype == "int8"
    with pytest.raises(ConfigError, match=r"fp8, which cards from .* 8\.9 on have; .* 8\.6: take"):
        device_settings(EngineConfig(kv_cache_dtype="fp8"), (8, 6))
    with pytest.raises(ConfigError, match=r"float16 and dtype bfloat16; .*the cache int8 or fp8"):
        device_settings(EngineConfig(kv_cache_dtype="float16"), (9, 0))


@pytest.mark.parametrize(
    ("setting", "kind"), [("auto", None), ("float32", None), *QUANTIZED.items()]
)
def test_the_cpu_takes_both(setting, kind):
    checkpoint = TinyCheckpoint(device_runs.CONFIGS["llama"])
    config = EngineConfig(device="cpu", kv_cache_dtype=setting, max_num_seqs=2)
    runner = make_runner(checkpoint, config)
    caches = runner.bytes_by_owner()["kv cache"] // (runner.limits.num_blocks * 16)
    assert caches == checkpoint.config.kv_bytes_per_token(kind or "float32")
    assert len(generate(runner, {"a": (0, [1, 2, 3], GREEDY)})["a"]) == 7


def test_the_cpu_refuses_the_rest():
    checkpoint = TinyCheckpoint(device_runs.CONFIGS["llama"])
    with pytest.raises(
        ConfigError, match="kv_cache_dtype is float16; on the CPU it is float32, int8"
    ):
        make_runner(checkpoint, EngineConfig(device="cpu", kv_cache_dtype="float16"))


# ------------------------------------------------------------------------------ a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("use_graphs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_tokens_of_numpy(kind, use_graphs):
    """In float32, where a token differs at most after two nearly equal logits."""
    from nanocupy.cuda.device import CudaDevice

    on_device, on_numpy = pair("qwen3-ntk", kind, CudaDevice(use_graphs=use_graphs))
    arriving = arrivals(8, GREEDY)
    got = generate(on_device, arriving, run_ahead=True)
    wanted = generate(on_numpy, arriving)
    same = sum(got[name] == wanted[name] for name in wanted)
    assert same >= len(wanted) - 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_swaps_codes_and_scales(kind):
    from nanocupy.cuda.device import CudaDevice

    outputs = []
    for num_blocks, mode in ((13, "swap"), (13, "recompute"), (60, "auto")):
        runner, _ = pair("llama", kind, CudaDevice(), num_blocks, num_host_blocks=20)
        engine = LLMEngine(runner.config, runner, SchedulerSettings(4, 32, preemption=mode))
        rng = np.random.default_rng(4)
        tokens: dict[str, list[int]] = {}
        for number in range(4):
            ids = rng.integers(0, 48, 8).tolist()
            engine.add_request(str(number), ids, GREEDY.with_(max_tokens=12))
        while engine.has_unfinished:
            for output in engine.step():
                tokens.setdefault(output.request_id, []).append(output.token_id)
        outputs.append(tokens)
    assert outputs[0] == outputs[1] == outputs[2]
