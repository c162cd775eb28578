"""The runner on a GPU as `make_runner` builds it, on the host shim: what is done beside the upload,
and errors there."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from nanocupy.cuda import device as cuda_device
from nanocupy.cuda import probe
from nanocupy.cuda.arena import ArenaPlan
from nanocupy.engine import backend, device_plan
from nanocupy.engine.backend import make_engine, make_runner
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.device_plan import (
    DeviceSettings,
    buffer_specs,
    draft_limits,
    plan_limits,
)
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.errors import CapacityError, CheckpointError, CudaError
from nanocupy.sampling_params import SamplingParams
from nanocupy.speculation.draft_model import DraftModelProposer
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.shim.device import ShimDevice

CHECKPOINT = TinyCheckpoint(tiny_config(head_size=64, num_heads=2, num_kv_heads=1, max_context=96))


class PreparedDevice(ShimDevice):
    """As CudaDevice to `make_runner`. `fails`: the part that raises, and with what."""

    def __init__(self, fails: dict[str, Exception]) -> None:
        super().__init__()
        self.fails = fails
        self.done: list[tuple[str, int]] = []  # what, and in which thread
        self.kernels.compiler = SimpleNamespace(compile_all=self._compile)
        self.kernels.arch = "sm_90a"
        self.kernels.load = self._load

    def _do(self, what: str) -> None:
        self.done.append((what, threading.get_ident()))
        if what in self.fails:
            raise self.fails[what]

    def _compile(self, variants: list[Any], *, arch: str) -> list[str]:
        self._do("compile")
        return [f"{file} for {arch}" for file, _ in variants]

    def _load(self, cubins: list[str]) -> None:
        assert cubins
        assert all(cubin.endswith(".cu for sm_90a") for cubin in cubins)
        self._do("load")

    def prepare_products(self) -> None:
        self._do("products")

    def uploader(self, total_bytes: int, progress: Any) -> Any:
        self._do("upload")
        return super().uploader(total_bytes, progress)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PreparedDevice:
    device = PreparedDevice({})
    monkeypatch.setattr(cuda_device, "CudaDevice", lambda use_graphs, whole_steps: device)
    status = SimpleNamespace(usable=True, require=lambda: None)
    monkeypatch.setattr(probe, "find_cuda", lambda: status)
    return device


CONFIG = EngineConfig(device="cuda", dtype="float32", max_context=64, max_num_seqs=2)


def test_kernels_and_products_are_made_beside_the_upload(device: PreparedDevice) -> None:
    runner = make_runner(CHECKPOINT, CONFIG)
    assert isinstance(runner, DeviceRunner)
    order = [what for what, _ in device.done]
    assert sorted(order) == ["compile", "load", "products", "upload"]
    assert order.index("load") > max(order.index("compile"), order.index("upload"))
    threads = dict(device.done)
    assert threads["upload"] == threads["load"] == threading.get_ident()
    assert threading.get_ident() not in (threads["compile"], threads["products"])


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("compile", CudaError("a.cu for sm_90a does not compile")),
        ("products", CapacityError("cublasCreate_v2 of the handle: the GPU's memory is full")),
        ("upload", CheckpointError("x.nano: cut off")),
        ("load", CudaError("loading a.cu for sm_90a failed")),
    ],
)
def test_an_error_of_a_thread_is_the_starts(
    device: PreparedDevice, what: str, error: Exception
) -> None:
    device.fails[what] = error
    before = threading.active_count()
    with pytest.raises(type(error)) as raised:
        make_runner(CHECKPOINT, CONFIG)
    assert raised.value is error
    assert threading.active_count() == before


def test_host_blocks_take_half_the_machine_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    token_bytes = CHECKPOINT.config.kv_bytes_per_token("bfloat16")
    block_bytes = token_bytes * 16
    config = EngineConfig(host_cache_gb=4)
    monkeypatch.setattr(backend, "_machine_memory", lambda: 20 * block_bytes)
    assert backend._num_host_blocks(config, 1000, token_bytes) == 10
    assert backend._num_host_blocks(config, 7, token_bytes) == 7
    monkeypatch.setattr(backend, "_machine_memory", lambda: 64 << 30)
    assert backend._num_host_blocks(config, 10**9, token_bytes) == 4_000_000_000 // block_bytes
    assert backend._num_host_blocks(config.with_(host_cache_gb=0), 1000, token_bytes) == 0


@pytest.mark.parametrize("head_dtype", ["auto", "float16"])
def test_a_draft_model_beside_the_model(head_dtype, device: PreparedDevice, monkeypatch) -> None:
    """Both in one budget, blocks for both, kernels for both, each on a stream of its own; with a
    matrix of two types, which both models have once, too."""
    original = device.second_stream

    def second_stream() -> Any:
        other = original()
        for name in ("compiler", "arch", "load"):
            setattr(other.kernels, name, getattr(device.kernels, name))
        return other

    monkeypatch.setattr(device, "second_stream", second_stream)
    draft = TinyCheckpoint(
        tiny_config(
            head_size=64, num_heads=1, num_kv_heads=1, num_layers=1, max_context=48,
            tied_lm_head=True,
        ),
        seed=4,
    )  # fmt: skip
    config = CONFIG.with_(draft_model="small.nano", draft_tokens=3, lm_head_dtype=head_dtype)
    engine = make_engine(CHECKPOINT, config, draft=draft)
    assert isinstance(engine.runner, DeviceRunner)
    proposer = engine.speculator.proposer
    assert isinstance(proposer, DraftModelProposer)
    assert proposer.runner.limits.max_context == 48
    assert engine.runner.limits.max_drafts == 3
    assert engine.runner.limits.max_draft_rows == 6
    assert [what for what, _ in device.done].count("compile") == 2
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.add_request("a", [1, 2, 3, 1, 2], params)
    while engine.has_unfinished:
        engine.step()


def test_memory_for_a_draft_model_is_planned_or_refused() -> None:
    device, settings = ShimDevice(), DeviceSettings("float32", "float32", "float32", 1.0)
    model, draft = CHECKPOINT.config, tiny_config(head_size=64, num_heads=1, num_kv_heads=1)
    sizes = {"max_context": 96, "max_num_seqs": 4, "max_step_tokens": 32, "block_size": 4}
    drafts = {"max_drafts": 5, "max_draft_rows": 20, "draft": (draft, settings)}
    whole = plan_limits(model, device, settings, **sizes, **drafts)
    assert (whole.max_drafts, whole.max_rows) == (5, 24)
    assert whole.num_blocks == 1 + 4 * 24

    def total(limits: Any, config: Any) -> int:
        return ArenaPlan(buffer_specs(config, device, settings, limits)).total_bytes

    small = replace(whole, num_blocks=2)
    least = total(small, model) + total(draft_limits(small, draft), draft)
    device._memory_bytes = least + 40_000
    some = plan_limits(model, device, settings, **sizes, **drafts)
    assert 2 < some.num_blocks < whole.num_blocks
    both = total(some, model) + total(draft_limits(some, draft), draft)
    assert both <= device.free_bytes()
    device._memory_bytes = least - 1
    with pytest.raises(CapacityError, match=r"for the draft model, .* may be used"):
        plan_limits(model, device, settings, **sizes, **drafts)


@pytest.mark.parametrize("kv_heads", [(1, 2), (2, 1)], ids=["more of the draft", "fewer"])
def test_heads_of_both_models_count_in_the_plan(kv_heads: tuple[int, int], monkeypatch) -> None:
    """A block takes the bytes of both models' heads, and neither cache may have more rows than
    kernels count."""
    device, settings = ShimDevice(), DeviceSettings("float32", "float32", "float32", 1.0)
    device._memory_bytes = 48 << 20
    model, draft = (
        tiny_config(head_size=64, num_heads=2, num_kv_heads=n, max_context=4096) for n in kv_heads
    )
    sizes = {"max_context": 4096, "max_num_seqs": 4, "max_step_tokens": 32, "block_size": 4}
    drafts = {"max_drafts": 5, "max_draft_rows": 20, "draft": (draft, settings)}
    some = plan_limits(model, device, settings, **sizes, **drafts)
    assert 2 < some.num_blocks < 4 * 1024

    def total(limits: Any, config: Any) -> int:
        return ArenaPlan(buffer_specs(config, device, settings, limits)).total_bytes

    def both(num_blocks: int) -> int:
        limits = replace(some, num_blocks=num_blocks)
        return total(limits, model) + total(draft_limits(limits, draft), draft)

    assert both(some.num_blocks) <= device.free_bytes() < both(some.num_blocks + 4)
    monkeypatch.setattr(device_plan, "_MAX_CACHE_ROWS", 2 * 4 * 50 + 7)
    assert plan_limits(model, device, settings, **sizes, **drafts).num_blocks == 50


def test_a_draft_model_of_short_context_leaves_its_room_to_the_model() -> None:
    device, settings = ShimDevice(), DeviceSettings("float32", "float32", "float32", 1.0)
    device._memory_bytes = 48 << 20
    model, draft = (
        tiny_config(head_size=64, num_heads=1, num_kv_heads=1, max_context=context)
        for context in (4096, 64)
    )
    sizes = {"max_context": 4096, "max_num_seqs": 4, "max_step_tokens": 32, "block_size": 4}
    some = plan_limits(model, device, settings, **sizes, draft=(draft, settings))
    own = draft_limits(some, draft)
    assert (own.max_context, own.num_blocks) == (64, 1 + 4 * 16)

    def both(num_blocks: int) -> int:
        limits = replace(some, num_blocks=num_blocks)
        pairs = (limits, model), (draft_limits(limits, draft), draft)
        plans = (buffer_specs(config, device, settings, lim) for lim, config in pairs)
        return sum(ArenaPlan(specs).total_bytes for specs in plans)

    assert own.num_blocks < some.num_blocks < 4 * 1024
    assert both(some.num_blocks) <= device.free_bytes() < both(some.num_blocks + 4)
