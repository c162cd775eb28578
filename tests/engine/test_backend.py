"""The runner on a GPU as `make_runner` builds it, on the host shim: what is done beside the upload,
and errors there."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from nanocupy.cuda import device as cuda_device
from nanocupy.cuda import probe
from nanocupy.engine import backend
from nanocupy.engine.backend import make_runner
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.errors import CapacityError, CheckpointError, CudaError
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
