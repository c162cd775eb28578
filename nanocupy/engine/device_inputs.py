"""What a step sends to the device and gets back, through pinned memory that two steps share.

Two steps may be under way: the host prepares one while the device runs the other. So whatever the
host writes or reads there is twice, and `turn` goes to the other one; on the device, where steps
run one after the other, it is once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanocupy.cuda.device import Device
from nanocupy.engine.batch import ForwardBatch, SamplerBatch
from nanocupy.engine.device_plan import MAX_UPDATES, MIN_INPUT_BYTES
from nanocupy.engine.step_inputs import StepShape, fill

_ALIGNMENT = 16  # bytes


@dataclass
class Staging:
    """Pinned memory of one step."""

    inputs: np.ndarray  # uint8
    updates: np.ndarray  # int32 [MAX_UPDATES, 2]
    sampled: np.ndarray  # int32 [max_rows]


class DeviceInputs:
    """Sends arrays to `memory`, uint8 on the device, which a step's kernels read."""

    def __init__(self, device: Device, memory: Any, max_rows: int) -> None:
        self._device = device
        self._memory = memory
        self._used = 0  # bytes that the step has taken
        self._stagings = [
            Staging(
                device.pinned(memory.nbytes),
                device.pinned(8 * MAX_UPDATES).view(np.int32).reshape(-1, 2),
                device.pinned(4 * max_rows).view(np.int32),
            )
            for _ in range(2)
        ]

    @property
    def staging(self) -> Staging:
        """Of the step that is being prepared."""
        return self._stagings[0]

    def turn(self) -> Staging:
        """The next step begins; the one before the last has been read."""
        self._stagings.reverse()
        self._used = 0
        return self.staging

    @property
    def num_bytes(self) -> int:
        """How much the step has sent so far."""
        return self._used

    def make_room(self, num_bytes: int) -> None:
        """See to it that MIN_INPUT_BYTES can be sent, by waiting if it must be, until all is used
        that lies behind the first `num_bytes`."""
        if self._used > self._memory.nbytes - MIN_INPUT_BYTES:
            self._device.synchronize("sending penalties")
            self.rewind(num_bytes)

    def rewind(self, num_bytes: int) -> None:
        """Use the memory behind the first `num_bytes` again: the device has read it."""
        self._used = num_bytes

    def send_step(
        self,
        shape: StepShape,
        batch: ForwardBatch,
        sampler: SamplerBatch | None,
        penalty_slots: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """The inputs of a step, at places that follow from `shape`; each as an array of the device,
        by name."""
        fill(self.staging.inputs, shape, batch, sampler, penalty_slots)
        self._used = shape.num_bytes
        self._copy(0, shape.num_bytes)
        return self.arrays_of(shape)

    def arrays_of(self, shape: StepShape) -> dict[str, Any]:
        """Where the inputs of a step of this shape lie, by name."""
        return {name: self.array_at(*place) for name, place in shape.arrays.items()}

    def send(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """More arrays in one copy, behind what the step has sent so far."""
        start = self._used
        sent = {}
        for name, array in arrays.items():
            offset, end = self._used, self._used + array.nbytes
            assert end <= self._memory.nbytes, f"the inputs of a step outgrew their memory: {name}"
            self.staging.inputs[offset:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
            sent[name] = self.array_at(offset, array.dtype, array.shape)
        self._copy(start, min(self._used, self._memory.nbytes))
        return sent

    def copy_to(self, target: Any, array: np.ndarray) -> None:
        """Copy an array to one of the device, through the memory behind what was sent so far."""
        staged = self.staging.inputs[self._used : self._used + array.nbytes]
        staged[...] = array.reshape(-1).view(np.uint8)
        self._device.to_device(target, staged.view(array.dtype).reshape(array.shape))
        self._used += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT

    def _copy(self, start: int, stop: int) -> None:
        if stop > start:
            self._device.to_device(self._memory[start:stop], self.staging.inputs[start:stop])

    def array_at(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> Any:
        """The memory from byte `offset` on, as an array of the device."""
        end = offset + math.prod(shape) * dtype.itemsize
        return self._memory[offset:end].view(dtype).reshape(shape)
