"""Models of one operator, as the exporter would hand them to a lowering, and what to look for in what it makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.functions import attach_functions
from attn_deploy.export.lower.tensorrt import standard
from attn_deploy.ops import DOMAIN, FORMS, VERSION

Array = np.ndarray[Any, Any]

SCALE = 0.3
WINDOWS, LENGTH = 4, 6
ONE_FOR_ALL = frozenset({"bias", "mask", "head_scale", "index", "fill", "windows_bias", "bias_index", "cos", "sin",
                         "temperature"})  # fmt: skip
"""Operands that are not there once for each sample."""

OTHER_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "RotaryEmbedding": ((5, 4, 16), (1, 5, 16), (1, 5, 16)),
    "ChannelAttention": ((5, 3, 4, 8), (4,)),
    "ChannelAttentionChannelsFirst": ((3, 4, 8, 5), (4,)),
    "ContextPool": ((2, 7), (7, 6)),
    "ContextPoolChannelsFirst": ((2, 7), (6, 2, 7)),
    "BranchPool": ((3, 4, 5, 6), (3, 4, 1, 1)),
    "HardAttention": ((7,), (7, 6)),
    "ChannelPool": ((4, 5, 6),),
    "SpatialPool": ((4, 5, 6),),
    "Gate": ((4, 5, 6), (4, 1, 1), (4, 5, 6)),
}
"""Of the operands of the other families, without the batch where there is one for each sample."""

TOKENS = WINDOWS * LENGTH


def canonical(
    name: str, operands: Mapping[str, Array], constants: frozenset[str] = frozenset(), *, dynamic: str = "batch",
    **attributes: float,
) -> CanonicalModel:  # fmt: skip
    """One operator of ours in a model whose first axis is dynamic (the second too with dynamic="length"); operands
    named in `constants` are weights."""
    form = FORMS[name]
    inputs, values = [], []
    for operand in form.inputs:
        array = operands[operand.name]
        if operand.name in constants:
            value = ir.Value(name=operand.name, const_value=ir.tensor(array, name=operand.name))
        else:
            dims: list[int | str] = list(array.shape)
            if operand.name not in ONE_FOR_ALL:
                dims[0] = "batch"
                if dynamic == "length":
                    dims[1] = "key_len" if operand.name in ("key", "value") else "query_len"
            elif operand.name == "mask" and dims[0] > 1:
                dims[0] = "batch"
            if dynamic == "length" and operand.name in ("bias", "mask"):
                dims[2:] = ["query_len" if dims[2] != 1 else 1, "key_len"]
            value = ir.Value(name=operand.name, shape=ir.Shape(dims), type=ir.TensorType(_dtype(operand.dtype)))
            inputs.append(value)
        values.append(value)
    outputs = [ir.Value(name=o, type=ir.TensorType(ir.DataType.FLOAT)) for o in form.outputs]
    shapes = form.infer_shapes(*(operands[i.name].shape for i in form.inputs), **attributes)
    for output, shape in zip(outputs, shapes, strict=True):
        output.shape = ir.Shape(["batch", *shape[1:]] if dynamic == "batch" else ["batch", "query_len", *shape[2:]])
    node = ir.node(name, values, attributes, domain=DOMAIN, outputs=outputs, name=f"blocks.0.attn/{name}")
    graph = ir.Graph(
        inputs, outputs, nodes=[node], name="one_operator", opset_imports={"": 20, DOMAIN: VERSION},
        initializers=[v for v in values if v.const_value is not None],
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    attach_functions(model)
    return CanonicalModel(model, (), (), (), {})


def _dtype(name: str) -> ir.DataType:
    return {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "bool": ir.DataType.BOOL}[name]


def operands(
    name: str, batch: int, *, head_dim: int = 16, heads: int = 4, query_len: int = 5, key_len: int = 7,
    unseen: bool = True, seed: int = 0,
) -> dict[str, Array]:  # fmt: skip
    """Random operands of an attention form; a mask leaves one query without any key when `unseen`."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    made: dict[str, Array] = {}
    for operand in FORMS[name].inputs:
        packed = "qkv" in made
        rows = (query_len, query_len) if packed else (query_len, key_len)
        match operand.name:
            case "query":
                made["query"] = normal(batch, query_len, heads, head_dim)
            case "key" | "value":
                made[operand.name] = normal(batch, key_len, heads // 2 if "Grouped" in name else heads, head_dim)
            case "qkv":
                tokens = TOKENS if "Indexed" in name else query_len
                made["qkv"] = normal(batch, tokens, 3, heads, head_dim)
            case "bias":
                made["bias"] = normal(1, heads, *rows)
            case "mask":
                made["mask"] = rng.random((batch, 1, *rows)) < 0.6
                made["mask"][..., 0] = True
                if unseen:
                    made["mask"][:, :, 1] = False
            case "head_scale":
                made["head_scale"] = rng.uniform(1, 5, heads).astype(np.float32)
            case "index":
                made["index"] = window_index("Padded" in name, rng)
            case "fill":
                made["fill"] = normal(3, heads, head_dim)
            case "windows_bias":
                made["windows_bias"] = normal(2, heads, LENGTH, LENGTH)
            case "bias_index":
                made["bias_index"] = np.array([0, 1, 1, 0])
    return made


def other_operands(name: str, batch: int, seed: int = 0) -> dict[str, Array]:
    """Random operands of a form of another family."""
    rng = np.random.default_rng(seed)
    channels_first = "ChannelsFirst" if name.endswith("ChannelsFirst") else ""
    shapes = OTHER_SHAPES[FORMS[name].operator + channels_first]
    made = {}
    for operand, shape in zip(FORMS[name].inputs, shapes, strict=False):
        full = shape if operand.name in ONE_FOR_ALL else (batch, *shape)
        made[operand.name] = rng.standard_normal(full).astype(np.float32)
    return made


def window_index(padded: bool, rng: np.random.Generator) -> Array:
    """[windows, length] of shuffled token numbers; with padding, and one token of no window, when `padded`."""
    index = rng.permutation(TOKENS).reshape(WINDOWS, LENGTH)
    if padded:
        index[0, 2] = index[2, 5] = -1
    return index


def constants_of_windows(name: str) -> frozenset[str]:
    """What a windowed model knows when it is written."""
    known = {"index", "fill", "windows_bias", "bias_index", "head_scale"}
    return frozenset(known & {i.name for i in FORMS[name].inputs}) if "Indexed" in name else frozenset()


def attributes(name: str) -> dict[str, float]:
    given: dict[str, float] = {"scale": SCALE} if "scale" in FORMS[name].attributes else {}
    if "k" in FORMS[name].attributes:
        given["k"] = 3
    if "Softcap" in name:
        given["softcap"] = 2.0
    if "Indexed" in name:
        given["tokens"] = TOKENS
    return given


def expected(name: str, given: Mapping[str, Array]) -> Array:
    """The first output of the operator's float64 reference."""
    return all_expected(name, given)[0]


def all_expected(name: str, given: Mapping[str, Array]) -> tuple[Array, ...]:
    form = FORMS[name]
    return form.reference(*(given[i.name] for i in form.inputs), **attributes(name))


Run = Callable[[Mapping[str, Array]], dict[str, Array]]


def open_model(model: ir.Model) -> Run:
    """In ONNX Runtime on the CPU, which knows none of TensorRT's own attributes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = ir.to_proto(standard(model)).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    return lambda feeds: dict(
        zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True)
    )


def operator_counts(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def on_the_scores(model: ir.Model, sites: Sequence[str] = ("",)) -> list[str]:
    """The operators other than Add that stand between a product of two activations and the softmax of one of `sites`
    (names of our operators): what keeps TensorRT from fusing the two."""
    found = []
    for node in model.graph:
        if node.op_type != "Softmax" or not str(node.name).startswith(tuple(sites)):
            continue
        value = node.inputs[0]
        while value is not None and (producer := value.producer()) is not None and producer.op_type != "MatMul":
            if producer.op_type != "Add":
                found.append(str(producer.name))
            activations = [v for v in producer.inputs if v is not None and _depends_on_product(v)]
            value = activations[0] if len(activations) == 1 else None
    return found


def _depends_on_product(value: ir.Value) -> bool:
    pending, seen = [value], set()
    while pending:
        producer = pending.pop().producer()
        if producer is None or producer in seen:
            continue
        if producer.op_type == "MatMul":
            return True
        seen.add(producer)
        pending += [v for v in producer.inputs if v is not None]
    return False
