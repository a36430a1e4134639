"""What the opened session really runs: which nodes run each site, and how much is multiplied in which type."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from attn_deploy.ops import FORMS
from attn_deploy.receipt import SiteRun
from attn_deploy.target import Target


class Tensor(Protocol):
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Node(Protocol):
    """A node that ran, as attn_deploy.runtimes.RunNode gives it."""

    @property
    def name(self) -> str: ...
    @property
    def op_type(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def inputs(self) -> tuple[Tensor, ...]: ...
    @property
    def outputs(self) -> tuple[Tensor, ...]: ...


LINEAR = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat",
                    "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits"})  # fmt: skip
CONVOLUTIONS = frozenset({"Conv", "FusedConv", "QLinearConv", "ConvInteger", "NhwcFusedConv"})
BLOCKED = "Blocked"
"""How our operators on ONNX Runtime's blocked layout begin; they are made on the host and are no forms."""

BLOCKED_CONVOLUTIONS = ("BlockedPointwise", "BlockedDepthwise")
EXPANDING = "BlockedExpandDepthwise"
ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention"})
INTEGER_INSIDE = frozenset({"DynamicQuantizeMatMul", "QGemm", "MatMulNBits"})
"""Operators that read floats and multiply integers: MatMulNBits at the accuracy level that we ask for."""


def site_runs(sites: Iterable[tuple[str, str]], nodes: Sequence[Node]) -> tuple[SiteRun, ...]:
    """For each (module, operator's node name): what runs it.

    A node belongs to a site when its name is the site's or starts with it: lowering names everything so, and ONNX
    Runtime keeps the beginning of a name when it fuses. A site of which no node is left was folded into others.
    """
    runs = []
    for module, root in sites:
        own = _running(root, [n for n in nodes if any(is_of(name, root) for name in _names(n))])
        runs.append(
            SiteRun(
                module=module,
                implementation=_implementation(own),
                provider=", ".join(sorted({n.provider for n in own})),
                nodes=tuple(n.op_type for n in own),
            )
        )
    return tuple(runs)


PROVIDERS = {
    Target.ONNXRUNTIME_CPU: "CPUExecutionProvider",
    Target.ONNXRUNTIME_CUDA: "CUDAExecutionProvider",
    Target.TENSORRT: "TensorRT",
}
"""Who must run what computes, by target."""

_NAMED_AT_MOST = 4


def provider_fault(expected: str, nodes: Sequence[Node]) -> str | None:
    """Why not every node that computes runs where it was asked to, naming the others; or None.

    Arithmetic on shapes (integers of a few elements) is put on the host by every runtime, and belongs there.
    """
    elsewhere = [n for n in nodes if n.provider != expected and any(_computes(t) for t in n.outputs)]
    if not elsewhere:
        return None
    named = ", ".join(f"{n.name} ({n.op_type} on {n.provider or 'nothing'})" for n in elsewhere[:_NAMED_AT_MOST])
    more = f" and {len(elsewhere) - _NAMED_AT_MOST} more" if len(elsewhere) > _NAMED_AT_MOST else ""
    return f"{len(elsewhere)} of {len(nodes)} nodes do not run on {expected}: {named}{more}"


def _computes(result: Tensor) -> bool:
    return result.dtype.startswith(("float", "bfloat", "double")) or math.prod(result.shape) > SHAPE_ELEMENTS


SHAPE_ELEMENTS = 64
"""A result with more integers than this is no shape."""


def _names(node: Node) -> tuple[str, ...]:
    """The node's name, and those of the ONNX nodes that an engine's layer stands for."""
    return (node.name, *getattr(node, "covers", ()))


def is_of(name: str, root: str) -> bool:
    """Whether what runs under `name` comes from the node `root` of the canonical model."""
    return name == root or (name.startswith((root + "/", root + "_")) and not _belongs_to_other(name, root))


def _running(root: str, own: list[Node]) -> list[Node]:
    """An engine's layers that move a site's operands to the one kernel that multiplies them all are its neighbours."""
    multiplying = [n for n in own if any(is_of(p.name, root) for p in getattr(n, "products", ()))]
    products = sum(is_of(p.name, root) for n in multiplying for p in getattr(n, "products", ()))
    fused = products > 1 or any(re.search("mha|attention|flash", n.op_type, re.I) for n in multiplying)
    return multiplying if len(multiplying) == 1 and fused else own


def _belongs_to_other(name: str, root: str) -> bool:
    """`a/Gate_2` starts with `a/Gate` but is the second of its kind in the module."""
    rest = name[len(root) :]
    return rest[:1] == "_" and rest[1:].split("/")[0].isdigit()


def _implementation(nodes: Sequence[Node]) -> str:
    if not nodes:
        return "fused into its neighbours"
    types = {n.op_type for n in nodes}
    own = sorted(t for t in types - ATTENTION if t in FORMS or t.startswith(BLOCKED)) + sorted(
        n.op_type for n in nodes if n.op_type in FORMS and n.op_type in ATTENTION and _is_ours(n)
    )
    if own and len(nodes) == 1:
        return f"native:{own[0]}"
    engine = "trt" if nodes[0].provider == PROVIDERS[Target.TENSORRT] else "ort"
    fused = sorted(types & ATTENTION)
    if fused and not own:
        return f"{engine}:{fused[0]}"
    return "inlined" if len(nodes) > 1 else f"{engine}:{nodes[0].op_type}"


def _is_ours(node: Node) -> bool:
    """Our Attention reads [batch, tokens, heads, head_dim]; ONNX Runtime's contrib one reads rank 3."""
    return bool(node.inputs) and len(node.inputs[0].shape) == 4


def multiply_adds(node: Node) -> int:
    """Multiply-adds of a matrix product or convolution, from the shapes it ran with; 0 for anything else."""
    if not node.outputs or not node.inputs:
        return 0
    result = math.prod(node.outputs[0].shape)
    if node.op_type in ATTENTION and not _is_ours(node):
        return 2 * result * _key_length(node)
    if node.op_type in FORMS:
        return _of_form(node)
    if node.op_type in LINEAR:
        return result * _summed(node.inputs[0].shape, node.outputs[0].shape)
    if node.op_type.startswith(EXPANDING):  # x, weight and bias of a 1x1 convolution, those of the depthwise one
        expanded = math.prod(node.inputs[0].shape) * node.inputs[1].shape[0]
        return expanded + result * math.prod(node.inputs[3].shape[1:])
    if node.op_type in CONVOLUTIONS or node.op_type.startswith(BLOCKED_CONVOLUTIONS):
        weight = next((t for t in node.inputs[1:] if len(t.shape) == len(node.outputs[0].shape)), None)
        return result * math.prod(weight.shape[1:]) if weight is not None else 0
    return 0


MULTIPLYING = frozenset({"Attention", "AttentionBlock", "ChannelAttention", "FeedForward", "Linear", "PackedAttention",
                         "QuantizedAttentionBlock", "QuantizedFeedForward", "QuantizedLinear"})  # fmt: skip
"""Operators of ours that are matrix products, as opposed to gates and pools."""

QUANTIZED_CONVOLUTIONS = frozenset({"QuantizedConv", "QuantizedDepthwise"})
"""Those of 8-bit maps, whose paddings, which are attributes, say how many multiply-adds they have."""

QUANTIZED = frozenset(name for name, form in FORMS.items() if form.operator.startswith("Quantized"))
"""Those whose weights are in 8 bits. They read floats and multiply integers, but for an attention inside."""


def _of_form(node: Node) -> int:
    """How many multiply-adds an attention has does not depend on its attributes: heads times head_dim is given."""
    form = FORMS[node.op_type]
    if form.operator in QUANTIZED_CONVOLUTIONS:
        return math.prod(node.outputs[0].shape) * math.prod(node.inputs[1].shape[1:])
    if form.operator not in MULTIPLYING:
        return 0
    attributes = {name: 1 for name in form.attributes}
    return form.multiply_adds(*(t.shape for t in node.inputs), **attributes)


def _key_length(node: Node) -> int:
    """Of a fused attention: tokens of the key [batch, tokens, hidden] or [batch, heads, tokens, head_dim], or of packed
    operands [batch, tokens, heads, 3, head_dim]. Each of both products takes that many for an element of the result."""
    operand = node.inputs[1] if len(node.inputs) > 1 and len(node.inputs[1].shape) >= 3 else node.inputs[0]
    return operand.shape[-2] if len(operand.shape) in (3, 4) else operand.shape[1]


def _summed(first: tuple[int, ...], result: tuple[int, ...]) -> int:
    """Length of the dimension that a matrix product sums over: the last of its first operand, or the one before it
    where ONNX Runtime folded a transpose in (Gemm, FusedMatMul): then the last is the rows of the result."""
    transposed = len(first) > 1 and len(result) > 1 and first[-2] != result[-2] and first[-1] == result[-2]
    return first[-2] if transposed else first[-1]


def compute_type(node: Node) -> str:
    """`int8`, `float32`, ...: what the node multiplies in."""
    if node.op_type in INTEGER_INSIDE | QUANTIZED or node.inputs[0].dtype in ("uint8", "int8"):
        return "int8"
    return node.inputs[0].dtype


def dtype_shares(nodes: Sequence[Node], site_roots: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Share of multiply-adds by type: (over everything, over linear layers and convolutions alone).

    A product inside a site (query with key, weights with value) is no linear layer.
    """
    everything: collections.Counter[str] = collections.Counter()
    weighted: collections.Counter[str] = collections.Counter()
    for name, work, kind in (row for node in nodes for row in _work(node)):
        everything[kind] += work
        if not any(is_of(name, root) for root in site_roots):
            weighted[kind] += work
    return _shares(everything), _shares(weighted)


def _work(node: Node) -> list[tuple[str, int, str]]:
    """(ONNX node, multiply-adds, type) of what it multiplies: a layer of an engine may stand for many products."""
    products = getattr(node, "products", None)
    if products is not None:
        return [(p.name, p.multiply_adds, getattr(node, "computes_in", "")) for p in products]
    work = multiply_adds(node)
    kind = compute_type(node) if work else ""
    linear = _of_linear_layers(node)
    attention = node.inputs[0].dtype if linear else kind
    return [row for row in ((node.name, work - linear, attention), ("", linear, kind)) if row[1]]


def _of_linear_layers(node: Node) -> int:
    """Of an attention block, which is named after its site, what is done by the linear layers around the site."""
    form = FORMS.get(node.op_type)
    if form is None or form.operator not in ("AttentionBlock", "QuantizedAttentionBlock"):
        return 0
    weights = [t for t, given in zip(node.inputs, form.inputs, strict=False) if given.name.startswith("weight_")]
    return math.prod(node.inputs[0].shape) * sum(t.shape[1] for t in weights if len(t.shape) == 2)


def _shares(work: collections.Counter[str]) -> dict[str, float]:
    total = sum(work.values())
    return {kind: round(count / total, 6) for kind, count in work.most_common()} if total else {}
