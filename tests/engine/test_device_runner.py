"""The GPU's runner on the host shim: the same tokens as the NumPy runner, graphs and all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.engine.batch import ForwardBatch, build_batch
from nanocupy.engine.device_plan import plan_limits
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import Schedule, ScheduledRequest
from nanocupy.engine.step_inputs import fill, step_shape
from nanocupy.errors import CapacityError, ConfigError
from nanocupy.model.load import load_numpy_weights
from nanocupy.ops.cuda_launch import CudaLauncher
from nanocupy.profiling.profile import profile
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.engine.device_runs import (
    CONFIGS,
    FLOAT32,
    GREEDY,
    arrivals,
    generate,
    runners,
)
from tests.shim import build
from tests.shim.device import MODERN, OLD, ShimDevice, ShimMaps

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["in step", "run ahead"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("traits", [MODERN, OLD], ids=["modern", "old"])
def test_tokens_are_those_of_numpy(name, traits, run_ahead):
    device = ShimDevice(traits)
    on_device, on_numpy = runners(name, device)
    requests = arrivals(4, GREEDY)
    assert generate(on_device, requests, run_ahead) == generate(on_numpy, requests)
    assert device.counts["captured"]
    assert device.counts["replayed"] > device.counts["captured"]


@pytest.mark.parametrize("run_ahead", [False, True], ids=["in step", "run ahead"])
@pytest.mark.parametrize("others_first", [False, True])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_two_streams_give_the_same_tokens(temperature, others_first, run_ahead):
    params = GREEDY.with_(temperature=temperature, seed=2)
    device = ShimDevice(others_first=others_first)
    settings = replace(FLOAT32, two_streams=True)
    on_device, on_numpy = runners("qwen3-ntk", device, num_blocks=30, chunk=20, settings=settings)
    requests = {i: (at // 2, *rest) for i, (at, *rest) in arrivals(9, params, seed=1).items()}
    assert generate(on_device, requests, run_ahead) == generate(on_numpy, requests)
    assert device.counts["followed"] >= 6


@pytest.mark.parametrize("others_first", [False, True])
def test_prompts_beside_decodes_find_tokens_of_the_step_before(others_first):
    """One that ends in a token which nobody has read lies where the decodes will put theirs: they
    wait until it has been taken from there."""
    settings = replace(FLOAT32, two_streams=True)
    on_device, _ = runners("llama", ShimDevice(others_first=others_first), settings=settings)
    checkpoint = TinyCheckpoint(CONFIGS["llama"], seed=3)
    on_numpy = NumpyRunner(
        checkpoint.config, load_numpy_weights(checkpoint), on_device.limits, deferred=True
    )
    found = []
    for runner in (on_device, on_numpy):
        longer = Request("longer", [9, 30, 2, 8], GREEDY, 0, 60, block_ids=[5, 2])
        decodes = Request("decodes", [17, 40, 3], GREEDY, 0, 60, block_ids=[7])
        both = (ScheduledRequest(longer, 4, True), ScheduledRequest(decodes, 3, True))
        reads = [runner.launch(Schedule(both))]
        for request in (longer, decodes):
            request.num_computed_tokens = 3  # the last of the longer one is to be computed again
            request.num_tokens += 1
        both = (ScheduledRequest(decodes, 1, True), ScheduledRequest(longer, 2, True))
        reads.append(runner.launch(Schedule(both)))
        found.append([read() for read in reads])
    assert found[0] == found[1]
    assert len({*found[0][0], *found[0][1]}) == 4


@pytest.mark.parametrize("run_ahead", [False, True], ids=["in step", "run ahead"])
def test_sampling_and_penalties_are_those_of_numpy(run_ahead):
    on_device, on_numpy = runners("llama", ShimDevice())
    hot = GREEDY.with_(temperature=1.2, top_k=30, top_p=0.95, seed=5)
    requests = arrivals(3, hot) | {
        "penalised": (2, [1, 2, 3], hot.with_(repetition_penalty=1.3, frequency_penalty=0.5)),
        "biased": (4, [4, 5], GREEDY.with_(logit_bias={7: 100.0}, max_tokens=3)),
        "greedy": (5, [6], GREEDY),
    }
    assert generate(on_device, requests, run_ahead) == generate(on_numpy, requests)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["in step", "run ahead"])
def test_preemption_and_a_large_batch(run_ahead):
    on_device, on_numpy = runners("llama", ShimDevice(), num_blocks=17)
    requests = {i: (0, ids, p) for i, (_, ids, p) in arrivals(11, GREEDY, seed=2).items()}
    assert generate(on_device, requests, run_ahead) == generate(on_numpy, requests)


def test_steps_with_prompts_repeat_as_graphs():
    """Prompts of other lengths and numbers, the same rounded shapes, the same tokens."""
    device = ShimDevice()
    on_device, on_numpy = runners("qwen2", device, num_blocks=60)
    rng = np.random.default_rng(5)
    for lengths in ([9, 13], [10, 12, 3], [16], [14], [7, 8]):
        requests = {
            str(i): (0, rng.integers(0, 48, n).tolist(), GREEDY.with_(max_tokens=1))
            for i, n in enumerate(lengths)
        }
        assert generate(on_device, requests) == generate(on_numpy, requests)
    assert device.counts["replayed"] >= 2


@pytest.mark.parametrize("seed", range(3))
def test_any_batch_fits_its_rounded_shape(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        counts = rng.integers(1, 30, rng.integers(1, 20))
        lens = counts + rng.integers(0, 40, len(counts))
        num_rows = int(rng.integers(0, len(counts) + 1))
        batch = ForwardBatch(
            *(rng.integers(0, 9, counts.sum()).astype(np.int32) for _ in range(4)),
            query_starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            kv_lens=lens.astype(np.int32),
            block_tables=rng.integers(1, 9, (len(counts), -(-lens.max() // 4))).astype(np.int32),
            sample_rows=np.arange(num_rows, dtype=np.int32),
        )
        most = {"max_tokens": 600, "max_num_seqs": 24, "max_table_width": 20, "max_rows": 24}
        shape = step_shape(batch, **most, few_queries=1)
        assert counts.sum() <= shape.num_tokens <= max(64, counts.sum() * 9 / 8 + 1)
        memory = np.full(shape.num_bytes, 0xAB, np.uint8)
        fill(memory, shape, batch, None)
        for name, values in vars(batch).items():
            offset, dtype, size = shape.arrays[name]
            got = memory[offset : offset + int(np.prod(size)) * 4].view(dtype).reshape(size)
            part = tuple(slice(0, n) for n in values.shape)
            np.testing.assert_array_equal(got[part], values)
            wanted = counts.sum() if name == "query_starts" else 0
            rest = np.ones(size, bool)
            rest[part] = False
            assert (got[rest] == wanted).all()


def test_a_decode_step_of_a_fixed_batch_sends_nothing():
    device = ShimDevice()
    on_device, _ = runners("llama", device)
    engine = LLMEngine(on_device.config, on_device)
    for number in range(2):
        engine.add_request(str(number), [1, 2, 3, 4, 5], GREEDY.with_(max_tokens=16))
    sent = []
    while engine.has_unfinished:
        before = device.counts["to_device"]
        engine.step()
        sent.append(device.counts["to_device"] - before)
    # Step 0 is the prompt, step 1 makes the batch; step n decodes position n + 4, and where that
    # begins a block of 4 tokens, its number is sent. All other steps send nothing.
    assert sent[1:] == [int(n == 1 or (n + 4) % 4 == 0) for n in range(1, len(sent))]
    assert device.counts["replayed"] >= 13


@pytest.mark.parametrize("wgmma", [False, True])
def test_logits_in_sixteen_bits(wgmma: bool, monkeypatch: pytest.MonkeyPatch):
    """With wgmma by warpgroup products; not attention, which takes no blocks of 4."""
    monkeypatch.setattr(CudaLauncher, "_maps", ShimMaps())
    checkpoint = TinyCheckpoint(CONFIGS["qwen2"], seed=3, dtype="bfloat16")
    limits = RunnerLimits(40, 4 if wgmma else 16, 96, 64, 40)
    device = ShimDevice(replace(MODERN, wgmma=wgmma))
    device_runner = DeviceRunner(checkpoint.config, device, limits)
    device_runner.upload_weights(checkpoint)
    exact = NumpyRunner(
        checkpoint.config, load_numpy_weights(checkpoint, np.float64), limits, np.float64
    )
    ids = np.random.default_rng(1).integers(0, 48, 37).tolist()
    request = Request("a", ids, GREEDY, 0, 60)
    request.block_ids = [5, 2, 9, 1, 3, 12, 11, 4, 8, 30][: -(-37 // limits.block_size)]
    batch = build_batch(
        [ScheduledRequest(request, 37, True)], block_size=limits.block_size,
        table_width=96 // limits.block_size,
    )  # fmt: skip
    batch = type(batch)(**vars(batch) | {"sample_rows": np.arange(37, dtype=np.int32)})
    wanted, got = exact.logits(batch), device_runner.logits(batch)
    assert ("wide_logits" in device.kernels.launched) == wgmma
    rms = np.sqrt(np.mean(wanted**2, axis=-1, keepdims=True))
    assert np.abs(got - wanted).max() < 0.06 * rms.max()
    assert np.abs(got - wanted).mean() < 0.02 * rms.mean()


def test_random_weights_are_made_on_the_device():
    checkpoint = RandomCheckpoint(CONFIGS["qwen2"], "float32", seed=4)
    runner = DeviceRunner(checkpoint.config, ShimDevice(), RunnerLimits(40, 4, 96, 32, 12), FLOAT32)
    runner.upload_weights(checkpoint)
    for weight in runner.weights.values():
        assert np.isfinite(weight).all()
        assert np.count_nonzero(weight) == weight.size
    gate_up = runner.weights["layers.0.gate_up.weight"]
    assert abs(gate_up.std() * gate_up.shape[1] ** 0.5 - 1) < 0.05
    assert not np.array_equal(gate_up[:64], gate_up[64:])
    assert len(generate(runner, {"a": (0, [1, 2, 3], GREEDY)})["a"]) == 7


def test_the_cache_takes_what_is_left_and_too_little_is_refused():
    config = CONFIGS["llama"]
    settings = {"max_context": 96, "max_num_seqs": 4, "max_step_tokens": 32}
    roomy = plan_limits(config, ShimDevice(), FLOAT32, **settings)
    assert roomy.num_blocks == 1 + 4 * 6  # all that four sequences can use
    runner = DeviceRunner(config, ShimDevice(), roomy, FLOAT32)
    fixed = runner.plan.total_bytes
    slots = 1 + settings["max_num_seqs"]
    assert runner.bytes_by_owner()["penalties"] == slots * (4 * 1032 + 2 * config.vocab_size)
    block_bytes = 2 * config.num_layers * config.kv_size * 16 * 4
    tight = ShimDevice(memory_bytes=int((fixed - 10 * block_bytes) / 0.9) + 4096)
    limits = plan_limits(config, tight, FLOAT32, **settings)
    assert 10 <= limits.num_blocks <= 16
    assert DeviceRunner(config, tight, limits, FLOAT32).plan.total_bytes <= tight.free_bytes()
    with pytest.raises(ConfigError, match="head size 8: the kernels are made for 64, 80"):
        plan_limits(tiny_config(), ShimDevice(), FLOAT32, **settings)
    with pytest.raises(CapacityError, match="weights and workspaces need"):
        plan_limits(config, ShimDevice(memory_bytes=1 << 20), FLOAT32, **settings)


def test_a_profile_of_the_device_sees_every_call():
    device = ShimDevice()
    on_device, on_numpy = runners("llama", device)
    settings = {"prompt_tokens": 9, "output_tokens": 4, "batch": 2, "itemsize": 4}
    spans = profile(on_device, **settings).decode
    on_host = profile(on_numpy, **settings).decode
    assert [(s.name, s.layer, s.cost) for s in spans] == [
        (s.name, s.layer, s.cost) for s in on_host
    ]
    assert device.counts["captured"]  # before it was observed


def test_a_name_can_be_used_again():
    on_device, on_numpy = runners("llama", ShimDevice())
    for ids in ([1, 2, 3], [9, 8, 7, 6]):
        requests = {"same": (0, ids, GREEDY)}
        assert generate(on_device, requests) == generate(on_numpy, requests)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["in step", "run ahead"])
def test_logprobs_are_those_of_numpy(run_ahead):
    """Of sampled and of prompt tokens, in chunks, beside requests that do not ask."""
    found = []
    for runner in runners("qwen2", ShimDevice(), chunk=16):
        engine = LLMEngine(runner.config, runner, run_ahead=run_ahead and runner.can_run_ahead)
        asking = GREEDY.with_(temperature=0.8, seed=3, logprobs=3, prompt_logprobs=2)
        engine.add_request("asks", list(range(1, 23)), asking)
        engine.add_request("penalised", [7, 8, 9], asking.with_(repetition_penalty=1.5, n=2))
        engine.add_request("plain", [5, 6], GREEDY)
        outputs: dict[str, list] = {}
        while engine.has_unfinished:
            for output in engine.step():
                outputs.setdefault((output.request_id, output.sample_index), []).append(output)
        found.append(outputs)
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[1].items():
        got = found[0][name]
        assert [o.token_id for o in got] == [o.token_id for o in wanted]
        for a, b in zip(got, wanted, strict=True):
            assert (a.logprobs is None) == (b.logprobs is None) == (name[0] == "plain")
            pairs = [(a.logprobs, b.logprobs)] if b.logprobs else []
            assert (a.prompt_logprobs is None) == (b.prompt_logprobs is None)
            pairs += list(zip(a.prompt_logprobs or (), b.prompt_logprobs or (), strict=True))
            for x, y in pairs:
                assert (x.token_id, x.rank) == (y.token_id, y.rank)
                assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
                assert [i for i, _ in x.top] == [i for i, _ in y.top]
    assert len(found[0]["asks", 0][0].prompt_logprobs) == 21


def test_a_row_that_is_no_number_fails_its_request_alone():
    on_device, _ = runners("llama", ShimDevice())
    head = on_device.weights["embed.weight" if CONFIGS["llama"].tied_lm_head else "lm_head.weight"]
    outputs: dict[str, list] = {}
    engine = LLMEngine(on_device.config, on_device, run_ahead=True)
    embedding = on_device.weights["embed.weight"]
    embedding[47] = np.nan  # only who has this token in its prompt is hit
    assert head is not embedding
    engine.add_request("good", [1, 2, 3], GREEDY)
    engine.add_request("bad", [1, 47, 3], GREEDY)
    while engine.has_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert [o.finish_reason for o in outputs["bad"]] == ["error"]
    assert len(outputs["good"]) == 7
    assert outputs["good"][-1].finish_reason == "length"


def test_the_kernels_that_steps_need_are_known_beforehand():
    device = ShimDevice()
    on_device, _ = runners("qwen3-ntk", device)
    known = {(file, tuple(sorted(m.items()))) for file, m in on_device.kernel_variants()}
    asked: set = set()
    get = device.kernels.get

    def noted(file: str, entry: str, **macros: int):
        asked.add((file, tuple(sorted(macros.items()))))
        return get(file, entry, **macros)

    device.kernels.get = noted
    generate(on_device, arrivals(12, GREEDY.with_(temperature=0.7)))
    assert asked - known <= {m for m in asked if m[0] == "gemv.cu"}, "batches between the powers"
    assert len(asked & known) >= 8


def test_an_abort_between_steps_leaves_others_log_probabilities_alone():
    """The step in flight asked for some, and nobody who runs does any more."""
    found = []
    for runner in runners("qwen2", ShimDevice()):
        engine = LLMEngine(runner.config, runner, run_ahead=runner.can_run_ahead)
        engine.add_request("gone", [3, 1, 4], GREEDY.with_(logprobs=1))
        engine.step()
        engine.step()
        engine.abort("gone")
        for name in ("b", "c"):
            asking = GREEDY.with_(logprobs=2, prompt_logprobs=1)
            engine.add_request(name, [2, 7, 1, 8, ord(name) % 40], asking)
        outputs: dict[str, list] = {}
        while engine.has_unfinished:
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
        assert [len(outputs[name][0].prompt_logprobs) for name in ("b", "c")] == [4, 4]
        found.append({n: [o.token_id for o in each] for n, each in outputs.items()})
    assert found[0]["b"] == found[1]["b"]
    assert found[0]["c"] == found[1]["c"]
