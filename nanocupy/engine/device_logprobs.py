"""Log-probabilities of a device's step: the logits that were asked for, brought to the host.

They are many bytes and are rarely asked for. So such a step waits for them, and they are computed
from on the host, by the same code as everywhere. Written against `cuda.device.Device`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nanocupy.cuda.device import Device
from nanocupy.engine.results import StepResult, TokenLogprob
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.schedule import Schedule
from nanocupy.engine.step_logprobs import PromptRows, asking_rows, prompt_rows, sampled_logprobs

_ROWS_AT_ONCE = 64  # of a prompt


class DeviceLogprobs:
    """What one step at a time keeps of its logits.

    head_of: (rows int32 [n], dims) -> logits [n, V] on the device, of rows of the step of `dims`
    that ran last.
    """

    def __init__(
        self,
        device: Device,
        vocab_size: int,
        head_of: Callable[[np.ndarray, Mapping[str, int]], Any],
        limits: RunnerLimits,
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._head_of = head_of
        self._max_rows = min(_ROWS_AT_ONCE, limits.max_num_seqs)
        self._memory: np.ndarray | None = None  # pinned, float32 [rows, V]

    def keep(self, schedule: Schedule, logits: Any, dims: Mapping[str, int]) -> None:
        """Start to copy what is asked for of a step's logits [S, V], before they are changed; the
        requests are as the step found them."""
        self._sampling = schedule.row_requests
        self._rows = asking_rows(self._sampling)
        self._of_prompts = prompt_rows(schedule)
        self._kept, self._dims = self._room(len(self._rows)), dims
        for kept, row in enumerate(self._rows):
            self._device.to_host(self._kept[kept], logits[row])

    def result(self, token_ids: list[int]) -> StepResult:
        """All that the step was asked for; it has ended, and no other was started since."""
        sampled = sampled_logprobs(self._kept, self._rows, self._sampling, token_ids)
        prompts = {rows.request: self._of_prompt(rows) for rows in self._of_prompts}
        return StepResult(token_ids, sampled, prompts)

    def _of_prompt(self, rows: PromptRows) -> list[TokenLogprob]:
        found: list[TokenLogprob] = []
        for part in rows.split(self._max_rows):
            host = self._room(len(part.rows))
            self._device.to_host(host, self._head_of(part.rows, self._dims))
            self._device.synchronize("the log-probabilities of a prompt")
            found += part.logprobs(host)
        return found

    def _room(self, num_rows: int) -> np.ndarray:
        """Pinned memory for so many rows; what was there before is no longer needed."""
        if self._memory is None or len(self._memory) < num_rows:
            num_rows_held = 1 << (max(1, num_rows) - 1).bit_length()  # it is not to grow often
            num_bytes = num_rows_held * self._vocab_size * 4
            self._memory = (
                self._device.pinned(num_bytes).view(np.float32).reshape(-1, self._vocab_size)
            )
        return self._memory[:num_rows]
