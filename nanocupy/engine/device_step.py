"""A decode step of few sequences as one launch: the forward's calls, recognised and put together.

The launch does what the calls do one after the other, so it is only an optimisation; whoever wants
to see the calls one by one still can. Which models and cards it is for, the ops say, and whether
the head is a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanocupy.engine.device_lane import Lane
from nanocupy.model.forward import Buffer, OpCall, WeightRef
from nanocupy.ops.launch_decode_step import table_words
from nanocupy.ops.launch_quantized import PackedFormat
from nanocupy.ops.packed_matrix import PackedMatrix

_LAYER_OPS = ("norm_linear", "attend", "linear_add", "norm_swiglu", "linear_add")
_FIRST_OPS = ("embed", "rope_table")


class WholeStep:
    """`forward` as one launch on `lane`. Made once, before the first step."""

    def __init__(self, lane: Lane, forward: Sequence[OpCall]) -> None:
        self._lane = lane
        self._first = [call for call in forward if call.op in _FIRST_OPS]
        self._head_call = forward[-1]
        self._head = self._head_call.arguments
        self._attend = next(call for call in forward if call.op == "attend").arguments
        self._layers = lane.view("step_layers")

    def run(self, inputs: Mapping[str, Any], dims: Mapping[str, int]) -> None:
        """The logits of a step of decodes alone. inputs, dims: as `Lane.run` takes them."""
        lane = self._lane
        lane.run(self._first, inputs, dims)
        count, head = dims["T"], self._head
        widths = {"T": count, "S": count}

        def view(buffer: Buffer) -> Any:
            shape = tuple(widths.get(n, n) if isinstance(n, str) else n for n in buffer.shape)
            return lane.view(buffer.name, shape)

        attend = self._attend
        buffers = {
            "x": view(head["x"]), "logits": view(head["out"]),
            "key_cache": lane.view(attend["key_cache"].name),
        }  # fmt: skip
        batch = {name: inputs[name] for name in ("slots", "kv_lens", "block_tables")}
        batch["angles"] = view(attend["rope"])
        has_head = lane.ops.step_has_head
        norm, weight = (
            lane.weight(head[name]) if has_head else None for name in ("norm_weight", "weight")
        )
        lane.ops.decode_step(
            self._layers, norm, weight, batch, buffers, head["eps"], attend["scale"]
        )
        if not has_head:
            lane.run([self._head_call], inputs, dims)


def layer_table(
    forward: Sequence[OpCall],
    address: Callable[[Any], int],
    weights: Mapping[str, Any],
    form: PackedFormat | None,
) -> np.ndarray:
    """Addresses uint64 [L, 14], as LAYER_POINTERS of ops.launch_decode_step names them; 0 for what
    a model does not have. Where the layers' matrices are packed codes, of the form `form`, two
    words more: the units of qkv, o, gate_up, down in `weights`, float32, which are known once these
    are loaded. address: of a WeightRef or Buffer, of None too."""
    calls = [call.arguments for call in forward if call.layer is not None]
    rows = []
    for i in range(0, len(calls), len(_LAYER_OPS)):
        qkv, attend, o, ffn, down = calls[i : i + len(_LAYER_OPS)]
        row = [
            qkv["norm_weight"], qkv["weight"], qkv["bias"], attend["q_norm"], attend["k_norm"],
            attend["key_cache"], attend["value_cache"], o["weight"], o["bias"],
            ffn["norm_weight"], ffn["weight"], ffn["bias"], down["weight"], down["bias"],
        ]  # fmt: skip
        words = [address(reference) for reference in row]
        if form is not None:
            units = [weights[call["weight"].name].unit for call in (qkv, o, ffn, down)]
            words += np.array(units, np.float32).view(np.uint64).tolist()
        assert len(words) == table_words(form)
        rows.append(words)
    return np.array(rows, np.uint64)


def addresses_on(lane: Lane) -> Callable[[WeightRef | Buffer | None], int]:
    """Where on the lane's device a weight or a cache lies."""

    def address(reference: WeightRef | Buffer | None) -> int:
        if reference is None:
            return 0
        array = (
            lane.weight(reference)
            if isinstance(reference, WeightRef)
            else lane.view(reference.name)
        )
        return lane.device.address(array.packed if isinstance(array, PackedMatrix) else array)

    return address
