"""What TensorRT's ONNX parser takes, per version, and a check that names what it would not take.

The table (tensorrt_operators.json) was encoded from onnx/onnx-tensorrt: docs/operators.md of 9.2, 10.6 and 10.15,
docs/Changelog.md up to 10.15 (which says since when an operator is there), and for 11.0 to 11.5 the release notes of
NVIDIA/TensorRT ("Parsers"). Not written anywhere that was found: when Gelu and Mish came, which 9.2 lacks and 10.6 has
(taken as there in 10.3, since 10.0 moved to Gelu's opset 20). `opsets` is the highest opset by the first version that
has it: 10.6 and 10.15 by the table, 11.5 by its notes, 10.11 by the ONNX 1.18 that it moved to, 20 before 10.6 by the
ONNX of 10.0. The checks per operator are in tensorrt_restrictions.py.

Local functions and operators of other domains are refused, though the parser expands the first and looks for plugins
for the second: a lowered model holds neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from attn_deploy.errors import NotAsAskedError, UsageError
from attn_deploy.export.lower.tensorrt_restrictions import restriction
from attn_deploy.target import nearest

Version = tuple[int, ...]
"""(major, minor, ...): what follows the minor number is not looked at."""

OLDEST: Version = (10, 3)
"""JetPack 6.2 has it; anything older types weakly or lacks operators that our models need."""

NEWEST: Version = (11, 4)
"""What is lowered for unless another version is asked for."""

MIN_OPSET = 9
MAX_RANK = 8
"""nvinfer1::Dims::MAX_DIMS."""

NETWORK_ONLY = frozenset({ir.DataType.UINT8})
"""Types of network inputs and outputs alone."""

QUANTIZED = frozenset({ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN})
"""Types that only QuantizeLinear makes and only DequantizeLinear reads."""

DTYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT32, ir.DataType.INT64,
     ir.DataType.BOOL}
) | NETWORK_ONLY | QUANTIZED  # fmt: skip
"""DOUBLE is on the parser's list, but is computed in FP32: a model that says it computes in DOUBLE is refused."""


class _Table(msgspec.Struct, frozen=True):
    opsets: list[tuple[str, int]]
    types: dict[str, list[str]]
    operators: dict[str, list[str]]
    since: dict[str, str]


@dataclass(frozen=True)
class Support:
    """`dtypes` of the operator's first input (of a value that it only moves or makes: of the value)."""

    since: Version
    dtypes: frozenset[ir.DataType]


@dataclass(frozen=True)
class Fault:
    """A node that a version does not parse. `node` is empty for the model itself; `since` where a later one would."""

    node: str
    op_type: str
    reason: str
    since: Version | None = None

    @property
    def module(self) -> str:
        return self.node.partition("/")[0] if "/" in self.node else ""


@cache
def operators() -> dict[str, Support]:
    """The table, by operator name."""
    table = _table()
    support = {}
    for types, names in table.operators.items():
        dtypes = frozenset(ir.DataType[dtype] for group in types.split() for dtype in table.types[group])
        for name in names:
            support[name] = Support(parse_version(table.since.get(name, version_text(OLDEST))), dtypes)
    return support


def max_opset(version: Version) -> int:
    """The highest opset that the version parses."""
    return max(opset for first, opset in _table().opsets if parse_version(first) <= version)


@cache
def _table() -> _Table:
    path = Path(__file__).with_name("tensorrt_operators.json")
    return msgspec.json.decode(path.read_bytes(), type=_Table)


def parse_version(text: str) -> Version:
    """`10.15.1` -> (10, 15). Raises UsageError for what is no version."""
    parts = text.strip().split(".")
    if len(parts) < 2 or not all(part.isdigit() for part in parts[:2]):
        raise UsageError("this is no TensorRT version", got=text, expected="MAJOR.MINOR, such as 10.3 or 11.4")
    return int(parts[0]), int(parts[1])


def version_text(version: Version) -> str:
    return ".".join(str(part) for part in version[:2])


def check_version(version: Version) -> None:
    """Raises UsageError for a version before 10.3."""
    if tuple(version[:2]) < OLDEST:
        raise UsageError(
            "this TensorRT is too old", got=version_text(version), expected=f"{version_text(OLDEST)} or later",
            next_step="install a newer TensorRT, or use --target onnxruntime-cuda",
        )  # fmt: skip


def check_parses(model: ir.Model, version: Version) -> None:
    """Raises NotAsAskedError that names the first node that this version's parser does not take, what is wrong with
    it and what to do; UsageError for a version before 10.3."""
    check_version(version)
    found = list(faults(model, version))
    if not found:
        return
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise NotAsAskedError(
        f"TensorRT {version_text(version)} does not parse this model",
        where=first.node or None,
        got=f"{first.op_type}: {first.reason}" + (f", in module {first.module}" if first.module else "") + more,
        expected=f"what onnx-tensorrt {version_text(version)} lists as supported",
        next_step=_next_step(first),
    )


def _next_step(fault: Fault) -> str:
    if fault.since is not None:
        return f"use TensorRT {version_text(fault.since)} or later, or lower for the version that will run it"
    if fault.op_type in ("QuantizeLinear", "DequantizeLinear") and fault.module:
        return f"leave the layer in floating point: --exclude {fault.module}"
    return "replace the operator in the model, or use --target onnxruntime-cuda"


def minimum_version(model: ir.Model) -> Version | None:
    """The oldest version that parses the model; None where none that is known does."""
    table = _table()
    steps = {OLDEST, NEWEST, *map(parse_version, table.since.values()), *(parse_version(v) for v, _ in table.opsets)}
    steps |= {(10, minor) for minor in range(3, 17)} | {(11, minor) for minor in range(6)}
    return next((version for version in sorted(steps) if not any(faults(model, version))), None)


def faults(model: ir.Model, version: Version) -> Iterator[Fault]:
    """Everything that the version's parser would not take, in the order of the nodes."""
    version = tuple(version[:2])
    opset = model.opset_imports.get("", 0)
    if not MIN_OPSET <= opset <= max_opset(version):
        since = next((parse_version(v) for v, highest in _table().opsets if highest >= opset > 0), None)
        reason = f"opset {opset} is outside {MIN_OPSET} to {max_opset(version)}"
        yield Fault("", "model", reason, since if opset > MIN_OPSET else None)
    for identifier in model.functions:
        yield Fault("", f"{identifier[0]}.{identifier[1]}", "a local function was left in the model")
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        yield from _value_faults("", value, value in model.graph.inputs)
    for node in _typed(model).graph.all_nodes():
        yield from _node_faults(node, version, opset)


def _typed(model: ir.Model) -> ir.Model:
    """With the type of every value known, as far as ONNX can tell."""
    if all(o.dtype is not None and o.shape is not None for node in model.graph.all_nodes() for o in node.outputs):
        return model
    copy = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    return copy


def _node_faults(node: ir.Node, version: Version, opset: int) -> Iterator[Fault]:
    name = str(node.name)
    if node.domain not in ("", "ai.onnx"):
        yield Fault(name, f"{node.domain}.{node.op_type}", "an operator of another domain needs a plugin")
        return
    support = operators().get(node.op_type)
    if support is None:
        yield Fault(name, node.op_type, f"not an operator that the parser has; {nearest(node.op_type, operators())}")
        return
    if version < support.since:
        reason = f"since TensorRT {version_text(support.since)}"
        yield Fault(name, node.op_type, reason, support.since)
        return
    moved = _typed_value(node)
    if moved is not None and moved.dtype is not None and moved.dtype not in support.dtypes:
        yield Fault(name, node.op_type, f"computes {_types(support.dtypes)}, not {moved.dtype.name}")
    for output in node.outputs:
        yield from (Fault(name, node.op_type, f.reason) for f in _value_faults(name, output, output.is_graph_output()))
    broken = restriction(node, version, opset)
    if broken is not None:
        yield Fault(name, node.op_type, broken.reason, broken.since)


def _typed_value(node: ir.Node) -> ir.Value | None:
    """The value whose type the table is about."""
    if node.op_type in (
        "Constant",
        "ConstantOfShape",
        "RandomNormal",
        "RandomUniform",
        "If",
        "Loop",
        "Scan",
        "EyeLike",
    ):
        return node.outputs[0]
    position = 1 if node.op_type == "Where" else 2 if node.op_type == "OneHot" else 0
    return node.inputs[position] if len(node.inputs) > position else None


def _value_faults(node: str, value: ir.Value, at_border: bool) -> Iterator[Fault]:
    dtype, what = value.dtype, f"value {value.name}"
    if dtype is not None and dtype not in DTYPES:
        yield Fault(node, what, f"{dtype.name} is no type of TensorRT's networks; it takes {_types(DTYPES)}")
    elif dtype in NETWORK_ONLY and not at_border and value.const_value is None:
        yield Fault(node, what, f"{dtype.name} is for inputs and outputs of the network alone")
    elif dtype in NETWORK_ONLY and value.const_value is not None:
        yield Fault(node, what, f"a constant of type {dtype.name}; quantized values are INT8 with zero point 0")
    elif dtype in QUANTIZED and not _is_quantized(value):
        yield Fault(node, what, f"{dtype.name} stands only between QuantizeLinear and DequantizeLinear")
    if value.shape is not None and len(value.shape) > MAX_RANK:
        yield Fault(node, what, f"rank {len(value.shape)} is beyond {MAX_RANK}")


def _is_quantized(value: ir.Value) -> bool:
    """INT8 between Q and DQ; a constant that only DQ (or Q, as a zero point) reads."""
    producer = value.producer()
    made = value.const_value is not None or (producer is not None and producer.op_type == "QuantizeLinear")
    readers = {use.op_type for use, _ in value.uses()}
    return made and readers <= {"DequantizeLinear", "QuantizeLinear", "Reshape", "Transpose"}


def _types(dtypes: frozenset[ir.DataType]) -> str:
    return ", ".join(sorted(dtype.name for dtype in dtypes))
