"""What a Hugging Face folder's quantization_config says: AWQ, GPTQ or FP8, with which settings.

Owns the settings' meaning, and refuses by name what is not taken. Knows no tensors; which layers
are quantised, the stored tensors say themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanocupy.checkpoint.fields import Fields
from nanocupy.strict_json import shown

TAKEN = (
    "nanocupy takes awq (4 bits, version gemm), gptq (4 bits, or 8 with sym), fp8 (e4m3) and "
    "compressed-tensors (float-quantized; pack-quantized in 4 bits, or 8 if symmetric)"
)
# Layers that stay as they are; every method spells it in its own way.
_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore")


@dataclass(frozen=True)
class Scheme:
    """How the quantised layers of a folder are stored.

    method      "awq", "gptq", "fp8" (which compressed-tensors' float-quantized is, too), or
                "packed", its pack-quantized
    bits        of a code
    group_size  inputs with one scale; None: all of a row
    needs_zeros       awq without zero_point and packed symmetric layers may leave zeros out
    needs_order       act-order: the groups of inputs must be there
    zeros_less_one    gptq's first format stores its zeros less one
    block       rows and inputs with one scale (fp8); None: a scale a row, or one for all
    label       for people
    """

    method: str
    bits: int
    group_size: int | None
    needs_zeros: bool = True
    needs_order: bool = False
    zeros_less_one: bool = False
    block: tuple[int, int] | None = None
    label: str = ""


def quantization_scheme(config: Mapping[str, Any], where: str) -> Scheme | None:
    """What config.json, `config`, says in quantization_config or compression_config; None where the
    model is not quantised. Raises CheckpointError for what is broken, or not taken."""
    key = "quantization_config"
    if config.get(key) is None:
        key = "compression_config"  # as older versions of compressed-tensors call it
    raw = config.get(key)
    if raw is None:
        return None
    fields = Fields(f"{where}/config.json: {key}", raw if type(raw) is dict else {})
    if type(raw) is not dict:
        fields.fail(f"{shown(raw)} is not an object")
    for listed in _LISTS:
        names = fields.values.get(listed)
        if names is not None and not (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        ):
            fields.fail(f"{listed} is {shown(names)}; it must be a list of names")
    method = fields.text("quant_method")
    if method is None and key == "compression_config":
        method = "compressed-tensors"
    reader = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed}.get(
        method or ""
    )
    if reader is None:
        fields.fail(
            f"quant_method {shown(method)} is not supported; {TAKEN}; use one of these, or the "
            "model's float16 or bfloat16 weights"
        )
    return reader(fields)


def _awq(fields: Fields) -> Scheme:
    _require(fields, "bits", fields.integer("bits"), (4,))
    version = (fields.text("version") or "gemm").lower()
    _require(fields, "version", version, ("gemm",))
    group_size = _group_size(fields)
    zero_point = fields.flag("zero_point", True)
    label = f"awq, 4 bits, {_grouped(group_size)}"
    return Scheme("awq", 4, group_size, needs_zeros=zero_point, label=label)


def _gptq(fields: Fields) -> Scheme:
    bits = fields.integer("bits")
    _require(fields, "bits", bits, (4, 8))
    symmetric, act_order = fields.flag("sym", True), fields.flag("desc_act")
    if bits == 8 and not symmetric:
        fields.fail(f"sym is false with 8 bits: not supported; {TAKEN}")
    form = fields.text("checkpoint_format") or "gptq"
    _require(fields, "checkpoint_format", form, ("gptq", "gptq_v2"))
    if fields.flag("is_marlin_format"):
        fields.fail(f"is_marlin_format is true: not supported; {TAKEN}")
    packed = fields.text("pack_dtype") or "int32"
    _require(fields, "pack_dtype", packed, ("int32",))
    exceptions = fields.values.get("dynamic")
    if exceptions and not (
        # "-:PATTERN" leaves layers as they are; others give layers settings of their own.
        isinstance(exceptions, dict) and all(key.startswith("-:") for key in exceptions)
    ):
        fields.fail(f"dynamic is {shown(exceptions)}: settings by layer are not supported")
    group_size = _group_size(fields)
    order = ", act-order" if act_order else ""
    label = f"{form}, {bits} bits, {_grouped(group_size)}{order}"
    return Scheme(
        "gptq",
        bits,
        group_size,
        needs_order=act_order,
        zeros_less_one=form == "gptq",
        label=label,
    )


def _fp8(fields: Fields) -> Scheme:
    kind = fields.text("fmt") or "e4m3"
    _require(fields, "fmt", kind, ("e4m3", "float8_e4m3fn"))
    block = _block(fields, "weight_block_size")
    return Scheme("fp8", 8, None, block=block, label=f"fp8, {_blocked(block)}")


def _compressed(fields: Fields) -> Scheme:
    form = fields.text("format")
    _require(fields, "format", form, ("float-quantized", "pack-quantized"))
    sparsity = fields.values.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") in (None, "dense")):
        fields.fail(f"sparsity_config is {shown(sparsity)}: not supported; {TAKEN}")
    groups = fields.values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        fields.fail(f"config_groups is {shown(groups)}; it must be an object of groups")
    read = _compressed_floats if form == "float-quantized" else _compressed_words
    schemes: set[Scheme] = set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            fields.fail(f"config_groups: {shown(name)} has no weights; {TAKEN}")
        schemes.add(read(Fields(f"{fields.where}: config_groups: {shown(name)}: weights", weights)))
    if len(schemes) > 1:
        fields.fail("config_groups differ in how weights are stored: not supported")
    return schemes.pop()


def _compressed_floats(weights: Fields) -> Scheme:
    _require(weights, "num_bits", weights.integer("num_bits"), (8,))
    _require(weights, "type", weights.text("type"), ("float",))
    strategy = weights.text("strategy")
    _require(weights, "strategy", strategy, ("tensor", "channel", "block"))
    if not weights.flag("symmetric", True):
        weights.fail(f"symmetric is false: not supported; {TAKEN}")
    block = _block(weights, "block_structure")
    if (strategy == "block") != (block is not None):
        weights.fail(f"strategy {shown(strategy)} contradicts block_structure {shown(block)}")
    return Scheme("fp8", 8, None, block=block, label=f"compressed-tensors, fp8, {_blocked(block)}")


def _compressed_words(weights: Fields) -> Scheme:
    bits = weights.integer("num_bits")
    _require(weights, "num_bits", bits, (4, 8))
    _require(weights, "type", weights.text("type") or "int", ("int",))
    strategy = weights.text("strategy")
    _require(weights, "strategy", strategy, ("group", "channel"))
    group_size = _group_size(weights) if strategy == "group" else None
    symmetric = weights.flag("symmetric", True)
    if bits == 8 and not symmetric:
        weights.fail(f"symmetric is false with 8 bits: not supported; {TAKEN}")
    act_order = weights.values.get("actorder")
    _require(weights, "actorder", act_order, (None, False, "static", "weight", "group", "dynamic"))
    return Scheme(
        "packed",
        bits,
        group_size,
        needs_zeros=not symmetric,
        # The other orders leave nothing behind: groups are of consecutive inputs.
        needs_order=act_order in ("group", "dynamic"),
        label=f"compressed-tensors, {bits} bits, {_grouped(group_size)}",
    )


def _require(fields: Fields, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        fields.fail(f"{key} is {shown(value)}: not supported; {TAKEN}")


def _group_size(fields: Fields) -> int | None:
    group_size = fields.integer("group_size", low=-1)
    if group_size == 0:
        fields.fail("group_size is 0; it must be -1 (a row) or the inputs of a group")
    return None if group_size == -1 else group_size


def _block(fields: Fields, key: str) -> tuple[int, int] | None:
    block = fields.values.get(key)
    if block is None:
        return None
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(size) is int and 1 <= size <= 1 << 20 for size in block)
    ):
        fields.fail(f"{key} is {shown(block)}; it must be two numbers, the rows and columns")
    return block[0], block[1]


def _grouped(group_size: int | None) -> str:
    return "a group a row" if group_size is None else f"groups of {group_size}"


def _blocked(block: tuple[int, int] | None) -> str:
    return "a scale a matrix or row" if block is None else f"blocks of {block[0]} × {block[1]}"
