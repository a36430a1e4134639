"""What an engine really runs: its inspector's JSON as nodes, each with the ONNX nodes that it stands for.

Needs an engine that was built with detailed profiling verbosity. The text differs between versions: up to 10.x a tensor
has `Format/Datatype` ("Half", or "Row major linear FP16 format" before Myelin took over), 11.x has `Datatype` and
`Format` apart (NVIDIA's migration guide from 10.x to 11.x, IEngineInspector). `Metadata` holds `[ONNX Layer: name]` for
every ONNX node that was merged into a layer, between control characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attn_deploy.errors import AttnDeployError
from attn_deploy.runtimes import RunNode, TensorInfo
from attn_deploy.runtimes.tensorrt_work import Product

PROVIDER = "TensorRT"

_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.+?)\](?=[\x1d-\x1f\[\s]|$)")
_PROFILE = re.compile(r" \[profile (\d+)\]$")
_MYELIN_END = re.compile(r"(?:_mye\d+)?_myl\d*_\d+$")
_TACTIC_HASH = re.compile(r"_?0x[0-9a-f]+$")
_ATTENTION = re.compile(r"mha|flash|attention|sdpa", re.IGNORECASE)
_POINTWISE = re.compile(r"^PWN\((.*)\)$")
_REFORMAT = "Reformatting CopyNode for "

_DTYPES = [
    (re.compile(r"bfloat16|bf16", re.I), "bfloat16"), (re.compile(r"half|fp16|float16", re.I), "float16"),
    (re.compile(r"fp8|e4m3|e5m2", re.I), "float8"), (re.compile(r"fp4|e2m1", re.I), "float4"),
    (re.compile(r"uint8", re.I), "uint8"), (re.compile(r"int8", re.I), "int8"), (re.compile(r"int64", re.I), "int64"),
    (re.compile(r"int32", re.I), "int32"), (re.compile(r"int4", re.I), "int4"), (re.compile(r"bool", re.I), "bool"),
    (re.compile(r"float|fp32", re.I), "float32"),
]  # fmt: skip
"""What a type's text holds -> NumPy's name; the first that fits."""

_OPERANDS = "tf32|bf16|f16|f32|i8|e4m3|e5m2"
_XMMA = re.compile(rf"_(?:{_OPERANDS}){{2}}_({_OPERANDS})(?:f16|f32|i32|bf16|tf32)_")
"""xmma kernels: types of A and C, then of B and of the sum: `gemm_f32f32_tf32f32_f32` multiplies in TF32."""

_LEGACY = [
    (re.compile(r"_bf16_s\d+|_s\d+gemm_bf16"), "bfloat16"), (re.compile(r"_tf32_s\d+|_s\d+gemm_tf32"), "tf32"),
    (re.compile(r"_h\d+gemm|_s\d+gemm_fp16|_fp16_s\d+|_hgemm|_h\d+cudnn|_hcudnn"), "float16"),
    (re.compile(r"_i\d+gemm|_imma|int8_i8816|_i8816"), "int8"), (re.compile(r"_sgemm|_scudnn"), "float32"),
]  # fmt: skip
"""cuBLAS and cuDNN kernels: h, s, i before the tile of the tensor core, and what s reads."""

_KERNEL_TYPES = {"tf32": "tf32", "bf16": "bfloat16", "f16": "float16", "f32": "float32", "i8": "int8",
                 "e4m3": "float8", "e5m2": "float8"}  # fmt: skip

_MULTIPLY = re.compile(r"gemm|gemv|conv|matrixmultiply|mha|attention|fc|dot|einsum|fprop|fusion", re.IGNORECASE)
"""Layers that multiply, by type, kernel or Myelin's list of what was fused. A Reformat or a Move does not, though its
metadata may name the product that it serves."""


@dataclass(frozen=True)
class EngineNode(RunNode):
    """A layer of an engine. `covers` are the ONNX nodes that were merged into it; `products` what of it multiplies, and
    `computes_in` the type that is done in (`tf32` for FP32 products with 10-bit mantissas)."""

    covers: tuple[str, ...] = ()
    products: tuple[Product, ...] = ()
    computes_in: str = ""


@dataclass(frozen=True)
class EngineLayer:
    """One layer as the inspector describes it."""

    name: str
    kind: str
    tactic: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    covers: tuple[str, ...]

    @property
    def kernel(self) -> str:
        """What to call it: an attention kernel by its own name, anything else by its type."""
        for text in (self.tactic, self.name if self.name.startswith("_") else "", self.kind):
            if _ATTENTION.search(text) and not text.startswith("__myl_"):
                return _MYELIN_END.sub("", _TACTIC_HASH.sub("", text)).strip("_")
        return self.kind

    @property
    def multiplies(self) -> bool:
        own_name = self.name if self.name.startswith("_") else ""
        moves = self.kind.lower() in ("reformat", "noop", "constant", "shuffle", "cast")
        return not moves and any(_MULTIPLY.search(text) for text in (self.kind, self.tactic, own_name))

    @property
    def computes_in(self) -> str:
        """By the kernel's name where it says so, else by what is read: the smallest integer, else the first float."""
        named = _XMMA.search(self.tactic)
        if named is not None:
            return _KERNEL_TYPES[named.group(1)]
        for pattern, dtype in _LEGACY:
            if pattern.search(self.tactic):
                return dtype
        read = [t.dtype for t in self.inputs]
        for small in ("int4", "int8", "uint8", "float8", "float4"):
            if small in read:
                return small
        return next((d for d in read if d in ("float16", "bfloat16", "float32")), read[0] if read else "")


def parse_layers(text: str, *, profile: int = 0) -> list[EngineLayer]:
    """Layers of one optimization profile from `IEngineInspector.get_engine_information(JSON)`.

    Raises AttnDeployError: no JSON, or layer names alone (the engine was built without detailed verbosity).
    """
    try:
        entries = json.loads(text)["Layers"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise AttnDeployError("TensorRT's engine inspector gave no JSON", got=text[:200]) from error
    if any(isinstance(entry, str) for entry in entries):
        raise AttnDeployError(
            "the engine does not say what its layers are",
            got=f"{len(entries)} layers by name alone",
            expected="an engine built with detailed profiling verbosity",
            next_step="build it again from the bundle: attn-deploy cache clear",
        )
    return [_layer(entry) for entry in _of_profile(entries, profile)]


def _of_profile(entries: Sequence[Mapping[str, Any]], profile: int) -> list[Mapping[str, Any]]:
    """Layers of other profiles than the first end in ` [profile N]`."""
    marked = [(entry, _PROFILE.search(str(entry.get("Name", "")))) for entry in entries]
    own = [entry for entry, mark in marked if mark is not None and int(mark.group(1)) == profile]
    return own or [entry for entry, mark in marked if mark is None]


def own_name(name: str) -> str:
    """A layer's name without the profile that it is for."""
    return _PROFILE.sub("", name)


def _layer(entry: Mapping[str, Any]) -> EngineLayer:
    name = own_name(str(entry.get("Name", "")))
    return EngineLayer(
        name=name,
        kind=str(entry.get("LayerType", "unknown")),
        tactic=str(entry.get("TacticName", "")),
        inputs=_tensors(entry.get("Inputs")),
        outputs=_tensors(entry.get("Outputs")),
        covers=onnx_names(str(entry.get("Metadata", ""))) or _names_joined(name),
    )


def _tensors(entries: Sequence[Mapping[str, Any]] | None) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(_dtype(entry), tuple(entry.get("Dimensions", ()))) for entry in entries or ())


def _dtype(entry: Mapping[str, Any]) -> str:
    text = str(entry.get("Datatype") or entry.get("DataType") or entry.get("Format/Datatype") or "")
    return next((name for pattern, name in _DTYPES if pattern.search(text)), text)


def onnx_names(metadata: str) -> tuple[str, ...]:
    """The ONNX nodes that a layer's metadata names, each once."""
    return tuple(dict.fromkeys(_ONNX_LAYER.findall(metadata)))


def _names_joined(name: str) -> tuple[str, ...]:
    """Without metadata a fused layer's name is those of its nodes, joined by ` + `."""
    if name.startswith((_REFORMAT, "__myl", "{ForeignNode")):
        return ()
    parts = [part.strip() for part in name.split(" + ")]
    return tuple(dict.fromkeys(_POINTWISE.sub(r"\1", part) for part in parts if part))


def run_nodes(
    layers: Sequence[EngineLayer], products: Sequence[Product], times_ms: Mapping[str, float] | None = None
) -> list[EngineNode]:
    """Layers as nodes. Each product is counted once, at the layer that multiplies it.

    Products that no layer names are the last node's, computed in `unknown`: TensorRT folds those of constants, and any
    other would have to be explained, so a share by type never leaves them out.
    """
    owned: dict[int, list[Product]] = {}
    lost: list[Product] = []
    for product in products:
        names = onnx_names(product.name) or (product.name,)
        owner = _owner(layers, names)
        (lost if owner is None else owned.setdefault(owner, [])).append(Product(names[0], product.multiply_adds))
    times = times_ms or {}
    nodes = [
        EngineNode(
            name=layer.name,
            op_type=layer.kernel,
            provider=PROVIDER,
            inputs=layer.inputs,
            outputs=layer.outputs,
            time_us=times.get(layer.name, 0.0) * 1000,
            covers=layer.covers,
            products=tuple(owned.get(index, ())),
            computes_in=layer.computes_in,
        )
        for index, layer in enumerate(layers)
    ]
    if lost:
        nodes.append(EngineNode("(named by no layer)", "unknown", PROVIDER, (), (), 0.0, (), tuple(lost), "unknown"))
    return nodes


def _owner(layers: Sequence[EngineLayer], names: Sequence[str]) -> int | None:
    """The layer that covers the node and multiplies; where none says that it multiplies, the first that covers it."""
    covering = [index for index, layer in enumerate(layers) if not set(names).isdisjoint(layer.covers)]
    multiplying = [index for index in covering if layers[index].multiplies]
    return next(iter(multiplying or covering), None)
