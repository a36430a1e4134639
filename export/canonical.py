"""The canonical model: ONNX with our operators, each with its body. Lowering starts here and needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from attn_deploy.export.functions import inline_functions
from attn_deploy.session import DimBounds, TensorSpec

EXTERNAL_DATA_BYTES = 1_900_000_000
"""Beyond this, weights go to a file of their own: a protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class CanonicalSite:
    """A recognized site in ONNX: `node` is its operator's name, the root of every name that it is lowered to.
    `kind` is one of recognize.site.Kind."""

    kind: str
    module: str
    source_line: str
    operator: str
    node: str
    fx_node: str
    proven: bool
    flops: int
    bytes: int


@dataclass(frozen=True)
class CanonicalModel:
    """`model` holds the operators with their bodies attached; treat it as frozen and lower from `model.clone()`."""

    model: ir.Model
    sites: tuple[CanonicalSite, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimBounds]


def portable(canonical: CanonicalModel) -> ir.Model:
    """The same model with the functions inlined: standard ONNX for every other engine and tool."""
    model = canonical.model.clone()
    inline_functions(model)
    check_model(model)
    return model


def save_model(model: ir.Model, path: Path, *, external_data_bytes: int = EXTERNAL_DATA_BYTES) -> tuple[Path, ...]:
    """Writes the model and returns the files made: one, or two when the weights are beyond `external_data_bytes`."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size <= external_data_bytes:
        ir.save(model, path)
        return (path,)
    data = path.with_name(path.name + ".data")
    ir.save(model.clone(), path, external_data=data.name)
    return (path, data)


def check_model(model: ir.Model) -> None:
    """The ONNX checker, on the graph alone where weights would pass a protobuf's size."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size < EXTERNAL_DATA_BYTES:
        onnx.checker.check_model(ir.to_proto(model), full_check=False)
