"""`nanocupy bench throughput` and `bench decode --idle`."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from nanocupy import cli
from nanocupy.bench import idle, measure
from nanocupy.bench.shapes import SHAPES
from nanocupy.bench.throughput import Workload, throughput
from nanocupy.cuda.step_stamps import StepStamps
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.watch import StepWatch
from nanocupy.errors import ConfigError
from nanocupy.model.load import load_numpy_weights
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.shim import build

CONFIG = tiny_config(max_context=512, tied_lm_head=True)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "smollm2-135m", CONFIG)


def make_engine(runner_type: type[NumpyRunner] = NumpyRunner, num_blocks: int = 200) -> LLMEngine:
    limits = RunnerLimits(num_blocks, 4, 512, 64, 4)
    runner = runner_type(CONFIG, load_numpy_weights(TinyCheckpoint(CONFIG)), limits)
    return LLMEngine(CONFIG, runner, prefix_cache=False)


def test_the_workload_is_the_published_one() -> None:
    requests = Workload().requests(151936)
    assert len(requests) == 256
    # What nano-vllm prints for its bench, and what vLLM's number beside it is of.
    assert sum(output for _, output in requests) == 133_966
    lengths = [len(ids) for ids, _ in requests] + [output for _, output in requests]
    assert min(lengths) >= 100
    assert max(lengths) <= 1024
    assert Workload().name == "nano"
    assert Workload(8, 1, 2, 3).name == "8x1-2-seed3"
    assert max(max(ids) for ids, _ in Workload(9, 90, 99).requests(48)) == 47
    for wrong in ((0, 1, 2), (1, 0, 2), (1, 3, 2)):
        with pytest.raises(ConfigError, match="the shortest first"):
            Workload(*wrong)


def test_throughput_counts_what_it_did() -> None:
    workload = Workload(5, 3, 9, 1)
    requests = workload.requests(CONFIG.vocab_size)
    reports = []
    found = throughput(
        make_engine(), "tiny", "float32", workload, 2, lambda *done: reports.append(done)
    )
    assert found.result.name == "throughput/5x3-9-seed1/tiny/float32"
    assert found.num_prompt_tokens == sum(len(ids) for ids, _ in requests)
    assert found.num_output_tokens == sum(output for _, output in requests)
    assert reports[-1] == (4 * found.num_output_tokens,) * 2
    for rate, seconds in zip(found.result.values, found.seconds, strict=True):
        assert rate * seconds == pytest.approx(found.num_output_tokens)
    assert found.num_steps >= max(output for _, output in requests)
    assert found.num_preemptions == 0

    # Position by position, as a model would go about it.
    kv_reads = flops = 0
    head = CONFIG.vocab_size * CONFIG.hidden_size
    body = CONFIG.num_parameters - head
    for ids, output in requests:
        for position in range(len(ids) + output - 1):
            sees = position + 1
            kv_reads += sees if position >= len(ids) else 1
            flops += 2 * body + 4 * CONFIG.num_layers * CONFIG.q_size * sees
            flops += 2 * head * (position >= len(ids) - 1)
    kv_bytes = 4 * 2 * CONFIG.num_layers * CONFIG.kv_size * kv_reads
    weight_bytes = 4 * CONFIG.num_parameters
    assert found.result.num_flops == flops
    assert found.result.num_bytes == kv_bytes + found.num_steps * weight_bytes


@pytest.mark.parametrize("head", ["float32", "bfloat16"])
def test_a_head_of_another_type_counts_as_it_is_kept(head: str) -> None:
    config = CONFIG.with_(tied_lm_head=False)
    dtypes = {"lm_head.weight": head, "final_norm.weight": head}
    weights = load_numpy_weights(TinyCheckpoint(config), dtypes=dtypes)
    engine = LLMEngine(config, NumpyRunner(config, weights, RunnerLimits(200, 4, 512, 64, 4)))
    # Both have the same prompts, and so the same bytes of keys and values.
    workload = Workload(2, 3, 5)
    plain = throughput(make_engine(), "tiny", "float32", workload)
    found = throughput(engine, "tiny", "float32", workload)
    assert found.num_steps == plain.num_steps
    less = (config.vocab_size + 1) * config.hidden_size * (4 - (4 if head == "float32" else 2))
    assert plain.result.num_bytes - found.result.num_bytes == found.num_steps * less


def test_preemptions_are_counted() -> None:
    found = throughput(make_engine(num_blocks=12), "tiny", "float32", Workload(4, 12, 20), 1)
    assert found.num_preemptions > 0


def test_the_command(tiny_shape: None, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "throughput", "--device", "cpu", "--requests", "3", "--max-len", "18"]
    assert cli.main([*argv, "--repeats", "2", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["name"] == "throughput/3x16-18/smollm2-135m/float32"
    assert (result["unit"], len(result["seconds"])) == ("tok/s", 2)
    assert result["spread"][0] <= result["value"] <= result["spread"][1]
    assert f"output tokens: {4 * result['output_tokens']}, done" in captured.err
    assert cli.main(argv) == 0
    assert "preemptions" in capsys.readouterr().out
    assert cli.main([*argv[:4], "--max-len", "300"]) == 2
    assert "takes 512 tokens, not 600" in capsys.readouterr().err
    assert cli.main([*argv, "--min-len", "19"]) == 2
    assert "3 requests of 19 to 18 tokens" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="this engine takes 512"):
        throughput(make_engine(), "tiny", "float32", Workload(2, 400, 400), 1)


def test_idle_without_a_device_clock(
    tiny_shape: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "DECODE_OUTPUT", 6)
    argv = ["bench", "decode", "--idle", "--device", "cpu", "--repeats", "1", "--batch", "1,2"]
    assert cli.main([*argv, "--json"]) == 0
    for line in capsys.readouterr().out.splitlines():
        result = json.loads(line)
        parts = result["host_parts_us"]
        assert list(parts) == ["schedule", "launch", "wait", "process"]
        assert parts["launch"] == max(parts.values())  # where a step is computed as it is launched
        assert result["host_step_us"] > parts["launch"]
        assert result["gpu_idle_share"] is None
    assert cli.main(argv) == 0
    assert "host: schedule" in capsys.readouterr().out


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
def test_idle_by_the_device_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.shim.device import ShimDevice

    class StampingRunner(NumpyRunner):
        """Every step takes two milliseconds more on the device, and three on the host."""

        stamps: StepStamps | None = None

        def stamp_steps(self, num_steps: int) -> StepStamps | None:
            self.clock_device = ShimDevice()
            self.stamps = StepStamps(self.clock_device, num_steps) if num_steps else None
            return self.stamps

        def run(self, schedule):
            if self.stamps is None:
                return super().run(schedule)
            self.clock_device.eager("timed", self.stamps.start)
            self.clock_device.synchronize("the start")
            ids = super().run(schedule)
            time.sleep(0.002)
            self.clock_device.eager("timed", self.stamps.end)
            self.clock_device.synchronize("the end")
            time.sleep(0.003)
            return ids

    monkeypatch.setattr(measure, "DECODE_OUTPUT", 8)
    monkeypatch.setattr(idle, "DECODE_OUTPUT", 8)
    engine = make_engine(StampingRunner)
    host = idle.decode_idle(engine, "tiny", "float32", 2)
    assert host.idle is not None
    assert host.idle.num_gaps >= 7
    assert host.idle.gap_ns >= 3e6
    assert host.idle.step_ns >= 2e6
    total = host.idle.idle_ns + host.idle.busy_ns
    assert host.idle.share == pytest.approx(host.idle.idle_ns / total)
    assert 1e3 * host.step_us >= 5e6
    assert type(engine.watch) is StepWatch
    assert engine.runner.stamps is None
    as_json = json.loads(json.dumps(host.as_dict()))
    assert as_json["gpu_gap_us"] == pytest.approx(host.idle.gap_ns / 1e3, abs=1e-3)
    assert np.isclose(as_json["gpu_idle_share"], host.idle.share, atol=1e-5)


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
@pytest.mark.parametrize("two_streams", [False, True])
def test_idle_of_the_runner_on_a_device(monkeypatch: pytest.MonkeyPatch, two_streams: bool) -> None:
    from nanocupy.engine.device_plan import DeviceSettings
    from nanocupy.engine.device_runner import DeviceRunner
    from tests.shim.device import ShimDevice

    monkeypatch.setattr(measure, "DECODE_PROMPT", 5)
    monkeypatch.setattr(measure, "DECODE_OUTPUT", 6)
    monkeypatch.setattr(idle, "DECODE_OUTPUT", 6)
    config = tiny_config(head_size=64, num_heads=2, num_kv_heads=1, max_context=32)
    checkpoint = TinyCheckpoint(config)
    limits = RunnerLimits(20, 4, 32, 16, 2)
    settings = DeviceSettings("float32", "float32", "float32", two_streams=two_streams)
    runner = DeviceRunner(config, ShimDevice(), limits, settings)
    runner.upload_weights(checkpoint)
    engine = LLMEngine(config, runner, prefix_cache=False, run_ahead=True)
    host = idle.decode_idle(engine, "tiny", "float32", 2)
    assert host.idle is not None
    # A first token comes of the prompt's step; the other five of steps that decode.
    assert host.idle.num_gaps == 4
    assert 0 < host.idle.share < 1
