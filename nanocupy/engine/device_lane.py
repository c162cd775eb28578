"""A stream of a device with what computing on it takes: workspaces, activations, a way to sample.

Two lanes may compute at once; they share weights, cache and the array of sampled ids, of which each
has its rows. A lane runs op calls, and a step's body as a graph; what a step is made of is not its
part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from nanocupy.cuda.device import Device
from nanocupy.cuda.step_stamps import StepStamps
from nanocupy.engine.binding import StepObserver, bind_calls, run_calls
from nanocupy.engine.device_inputs import DeviceInputs
from nanocupy.engine.device_plan import SECOND_LANE
from nanocupy.engine.runner import RunnerLimits
from nanocupy.model.forward import OpCall, WeightRef
from nanocupy.ops.cuda_ops import CudaOps
from nanocupy.ops.cuda_sampling import DecodePlaces
from nanocupy.ops.cuda_sizes import OpSizes, workspace_plan

SAMPLER_FIELDS = ("temperature", "top_k", "top_p", "min_p", "seeds")


class Lane:
    """Runs calls on `device`'s stream.

    arena_view: (name, shape) -> a buffer of the plan; own: of the second lane, the buffers that it
    does not share with the first. first_row: of `sampled`, where its ids go.
    """

    def __init__(
        self,
        device: Device,
        arena_view: Callable[..., Any],
        sizes: OpSizes,
        limits: RunnerLimits,
        weights: Mapping[str, Any],
        *,
        own: frozenset[str] = frozenset(),
    ) -> None:
        self.device = device
        self._arena_view = arena_view
        self._own = own
        self._weights = weights
        self._dims = {"N": limits.num_blocks, "P": limits.block_size, "M": 0}
        self._vocab_size = sizes.vocab_size
        self.first_row = limits.max_rows if own else 0
        workspaces = {name: self.view(name) for name in workspace_plan(sizes, device.traits)}
        for name in ("counters", "step_words", "step_moments"):
            if name in workspaces:
                device.fill(workspaces[name], 0)
        self.ops = CudaOps(device.kernels, device.matmul, workspaces, sizes, device.traits)
        self.inputs = DeviceInputs(device, self.view("inputs"), limits.max_rows)
        self._sampled = self.view("sampled")  # asked for in every step
        self.observer: StepObserver | None = None  # while there is one, nothing runs as a graph
        self.stamps: StepStamps | None = None  # where steps note when they start and end

    def view(self, name: str, shape: tuple[int, ...] | None = None) -> Any:
        """The start of a buffer, in `shape`."""
        return self._arena_view(SECOND_LANE + name if name in self._own else name, shape)

    def weight(self, reference: WeightRef) -> Any:
        return self._weights[reference.name]

    def step(
        self,
        key: tuple[Hashable, ...],
        body: Callable[[], None],
        kind: int,
        dims: Mapping[str, int],
        query_starts: np.ndarray,
        kv_lens: np.ndarray,
    ) -> None:
        """Do a step's `body`, as the graph of `key`. kind: for the stamps, as `step_stamps` has it.

        The observer, if there is one, is told dims, query_starts and kv_lens, with padding up to
        `dims`.
        """
        stamps = self.stamps

        def stamped() -> None:
            if stamps is not None:
                stamps.start()
            body()
            if stamps is not None:
                stamps.end(kind)

        if self.observer is None:
            self.device.run((*key, stamps), stamped)
            return
        # The calls of a graph cannot be seen one by one.
        missing = dims["B"] - len(kv_lens)
        starts = np.pad(query_starts, (0, missing), mode="edge").tolist()
        self.observer.begin_step(dims, starts, np.pad(kv_lens, (0, missing)).tolist())
        self.device.eager("observed", stamped)
        self.device.synchronize("a step")
        self.observer.end_step()

    def run(
        self,
        calls: Sequence[OpCall],
        inputs: Mapping[str, Any],
        dims: Mapping[str, int],
        observer: StepObserver | None = None,
    ) -> None:
        """Op calls, in order. `inputs`: the batch's arrays, where they lie."""

        def view(name: str, shape: tuple[int, ...]) -> Any:
            return inputs[name] if name in inputs else self.view(name, shape)

        bound = bind_calls(calls, self.ops, view, self._weights, {**self._dims, **dims})
        run_calls(bound, observer)

    def logits(self, num_rows: int) -> Any:
        """Those that the last forward left, float32 [num_rows, V]."""
        return self.view("logits", (num_rows, self._vocab_size))

    def sample(
        self,
        num_rows: int,
        params: Mapping[str, Any] | None,
        places: DecodePlaces | None = None,
    ) -> None:
        """Ids of the first rows of the logits, int32 [num_rows], to this lane's part of `sampled`.
        params: the sampler's arrays, by name; None takes the argmax. places: what moves on."""
        logits, sampled = self.logits(num_rows), self.sampled(num_rows)
        if params is None:
            self.ops.argmax(logits, sampled, places)
            return
        fields = {name: params[name] for name in SAMPLER_FIELDS}
        if places is None:
            self.ops.sample(logits, **fields, counters=params["counters"], out=sampled)
        else:
            self.ops.sample_places(logits, **fields, out=sampled, places=places)

    def penalize(self, slots: Any) -> None:
        """Change the logits of the first rows by their penalty slots, int32 [rows], 0 = none."""
        logits = self.logits(len(slots))
        self.ops.penalize_slots(
            logits, slots, self.view("penalty_records"), self.view("penalty_counts")
        )

    def count(self, slots: Any) -> None:
        """Count what the first rows have sampled in their penalty slots."""
        sampled = self.sampled(len(slots))
        self.ops.count_tokens(
            sampled, slots, self.view("penalty_records"), self.view("penalty_counts")
        )

    def penalize_drafts(self, row_places: Any, drafts: Any, starts: Any, slots: Any) -> None:
        """`penalize` for rows with drafts before them; slots of the places, int32 [B]."""
        logits = self.logits(len(row_places))
        state = self.view("penalty_records"), self.view("penalty_counts")
        self.ops.penalize_draft_rows(logits, row_places, drafts, starts, slots, *state)

    def count_accepted(self, drafts: Any, starts: Any, slots: Any) -> None:
        """Count the drafts that were right, and the tokens after them, in their penalty slots."""
        state = self.view("penalty_records"), self.view("penalty_counts")
        self.ops.count_accepted(self.sampled(len(drafts)), drafts, starts, slots, *state)

    def sampled(self, num_rows: int) -> Any:
        return self._sampled[self.first_row : self.first_row + num_rows]

    def fetch(self, num_rows: int) -> None:
        """Start to copy the sampled ids to the host's memory of this step."""
        if num_rows:
            staging = self.inputs.staging
            self.device.to_host(staging.sampled[:num_rows], self.sampled(num_rows))
