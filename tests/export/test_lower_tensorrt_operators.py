"""What TensorRT's parser would not take is refused by version, with the node, before there is a device."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from attn_deploy.errors import NotAsAskedError, UsageError
from attn_deploy.export.lower.tensorrt_operators import (
    NEWEST,
    OLDEST,
    check_parses,
    faults,
    max_opset,
    minimum_version,
    operators,
    parse_version,
)

ANY = (11, 5)


def model(body: str, inputs: str = "float[batch, 4, 8, 8] x", *, opset: int = 20, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text whose output is y; `blk_0__Op` stands for the node name `blk.0/Op`."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    g ({inputs}) => (float[] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in weights.items())
    made = ir.from_proto(proto)
    for node in made.graph.all_nodes():
        node.name = str(node.name).replace("__", "/").replace("_", ".")
    return made


def reasons(made: ir.Model, version: tuple[int, ...] = ANY) -> list[str]:
    return [f"{fault.op_type}: {fault.reason}" for fault in faults(made, version)]


SCALE = {"s": np.array(0.1, np.float32)}
INT8_ZERO = {**SCALE, "z": np.array(0, np.int8)}
QDQ = (
    "[blk_0_fc__QuantizeLinear] q = QuantizeLinear (x, s, z) "
    "[blk_0_fc__DequantizeLinear] y = DequantizeLinear (q, s, z)"
)
ATTENTION = "[blk_0_attn__Attention] y = Attention {attributes} (x, x, x{mask})"
MASK = "float[batch, 4, 8, 8] x, float[1, 1, 8, 8] m"
AXES = {"axes": np.array([1])}


def attention(
    attributes: str = "<scale: float = 0.5>", mask: str = "", inputs: str = "float[batch, 4, 8, 8] x"
) -> ir.Model:
    return model(ATTENTION.format(attributes=attributes, mask=mask), inputs, opset=23)


# -- what parses -----------------------------------------------------------------------------------------------------

TAKEN = {
    "Q and DQ": model(QDQ, **INT8_ZERO),
    "a mask that is added": attention(mask=", m", inputs=MASK),
    "causality": attention("<is_causal: int = 1>"),
    "a branch": model(
        "b = Constant <value: tensor = bool {1}> () "
        "y = If (b) <then_branch = t () => (float[] a) { a = Relu (x) }, "
        "else_branch = e () => (float[] c) { c = Abs (x) }>"
    ),
    "axes that are constants": model("y = ReduceMean (x, axes)", **AXES),
    "int64 shapes": model("s = Shape (x) y = Reshape (x, s)"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_parser_takes_is_let_through(name: str) -> None:
    check_parses(TAKEN[name], ANY)
    assert list(faults(TAKEN[name], ANY)) == []


# -- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "since"),
    [
        (attention(), (10, 14)),
        (
            model("[blk_0_norm__RMSNormalization] y = RMSNormalization (x, w)", opset=23, w=np.ones(8, np.float32)),
            (10, 15),
        ),
        (model("[blk_0_act__Swish] y = Swish (x)", opset=24), (11, 0)),
        (model("[blk_0__Squeeze] y = Squeeze (x)"), (11, 5)),
        (model("[blk_0__Pow] y = Pow (x, e)", e=np.array(2)), (10, 8)),
        (model('[blk_0__Einsum] y = Einsum <equation: string = "...ij->...ji"> (x)'), (10, 12)),
        (model("[blk_0__Relu] y = Relu (x)", opset=24), (10, 15)),
    ],
    ids=["Attention", "RMSNormalization", "Swish", "Squeeze", "Pow", "Einsum", "opset 24"],
)
def test_an_operator_of_a_later_version_is_refused_and_the_version_is_named(
    made: ir.Model, since: tuple[int, int]
) -> None:
    assert minimum_version(made) == since
    check_parses(made, since)
    before = max(v for v in [(10, m) for m in range(3, 17)] + [(11, m) for m in range(6)] if v < since)
    with pytest.raises(NotAsAskedError, match=rf"TensorRT {before[0]}\.{before[1]} does not parse") as caught:
        check_parses(made, before)
    assert f"TensorRT {since[0]}.{since[1]} or later" in str(caught.value.next_step)


def test_the_node_and_its_module_are_named() -> None:
    with pytest.raises(NotAsAskedError) as caught:
        check_parses(attention(), (10, 13))
    assert caught.value.where == "blk.0.attn/Attention"
    assert "Attention: since TensorRT 10.14" in str(caught.value.got)
    assert "blk.0.attn" in str(caught.value.got)
    assert caught.value.exit_code == 4


def test_a_version_before_the_oldest_is_refused() -> None:
    with pytest.raises(UsageError, match="too old") as caught:
        check_parses(TAKEN["causality"], (8, 6))
    assert caught.value.got == "8.6"


def test_what_follows_the_minor_number_is_not_looked_at() -> None:
    check_parses(attention(), (10, 14, 1, 48))
    assert parse_version("10.15.1.29") == (10, 15)
    with pytest.raises(UsageError, match="no TensorRT version"):
        parse_version("latest")


def test_opsets_grow_with_versions() -> None:
    versions = [OLDEST, (10, 6), (10, 15), NEWEST, (11, 5)]
    assert [max_opset(v) for v in versions] == [20, 22, 24, 24, 25]


def test_every_operator_of_the_table_is_one_of_onnx_or_was() -> None:
    """A misspelt name in the table would refuse what parses."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert set(operators()) <= known
    assert len(operators()) > 150
    assert not {"QLinearConv", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeLinear"} & set(operators())


# -- what no version parses ------------------------------------------------------------------------------------------

REFUSED = {
    "UINT8 between Q and DQ": (
        model(QDQ, s=SCALE["s"], z=np.array(0, np.uint8)), "quantizes to INT8 or FLOAT8E4M3FN, not UINT8",
    ),
    "a zero point that is not 0": (model(QDQ, s=SCALE["s"], z=np.array(3, np.int8)), "zero point must be 0, not 3"),
    "no zero point, which means UINT8": (
        model("q = QuantizeLinear (x, s) y = DequantizeLinear (q, s)", **SCALE),
        "quantizes to INT8 or FLOAT8E4M3FN, not UINT8",
    ),
    "a scale of 0": (model(QDQ, s=np.zeros((), np.float32), z=INT8_ZERO["z"]), "every scale must be positive"),
    "a scale that is computed": (
        model("s = ReduceMax <keepdims: int = 0> (x) " + QDQ, z=INT8_ZERO["z"]), "must be constants",
    ),
    "INT8 that is computed with": (
        model("q = QuantizeLinear (x, s, z) r = Relu (q) y = DequantizeLinear (r, s, z)", **INT8_ZERO),
        "stands only between",
    ),
    "DOUBLE": (model("d = Cast <to: int = 11> (x) e = Relu (d) y = Cast <to: int = 1> (e)"), "DOUBLE is no type"),
    "a DOUBLE weight": (model("d = CastLike (x, w) y = Cast <to: int = 1> (d)", w=np.ones(1)), "DOUBLE is no type"),
    "INT16": (model("d = Cast <to: int = 5> (x) y = Cast <to: int = 1> (d)"), "INT16 is no type"),
    "UINT8 inside": (
        model("d = Cast <to: int = 2> (x) e = Identity (d) y = Cast <to: int = 1> (e)"),
        "inputs and outputs of the network",
    ),
    "integers of the CPU": (model("y = DynamicQuantizeLinear (x)"), "not an operator that the parser has"),
    "an operator of another domain": (model("y = com.microsoft.FusedMatMul (x, x)"), "needs a plugin"),
    "an operator that needs float": (
        model("i = Cast <to: int = 7> (x) j = Sigmoid (i) y = Cast <to: int = 1> (j)"), "not INT64",
    ),
    "BFLOAT16 where the parser has none": (
        model("b = Cast <to: int = 16> (x) m = Mish (b) y = Cast <to: int = 1> (m)", opset=22), "not BFLOAT16",
    ),
    "TopK beyond its limit": (
        model("y, i = TopK (x, k)", "float[1, 5000] x", k=np.array([4000])), "K must be below 3840, not 4000",
    ),
    "reduction over axes that are computed": (
        model("s = Shape <start: int = 0, end: int = 1> (x) y = ReduceSum (x, s)"), "axes must be a constant",
    ),
    "scattering that adds": (
        model('y = ScatterND <reduction: string = "add"> (x, i, x)', i=np.zeros((1, 1), np.int64)),
        "reduction must be none",
    ),
    "pooling over one dimension": (
        model("y = MaxPool <kernel_shape: ints = [2]> (x)", "float[1, 4, 8] x"), "2 or 3 dimensions",
    ),
    "pooling with holes": (
        model("y = MaxPool <kernel_shape: ints = [2, 2], dilations: ints = [2, 2]> (x)"), "dilations must be 1",
    ),
    "antialiasing": (
        model('y = Resize <antialias: int = 1, mode: string = "linear"> (x, , f)', f=np.ones(4, np.float32)),
        "antialias must be 0",
    ),
    "statistics of a LayerNormalization": (
        model("n, mean = LayerNormalization (x, w) y = Add (n, mean)", w=np.ones(8, np.float32)),
        "only the first output",
    ),
    "rank 9": (
        model("r = Reshape (x, s) y = Relu (r)", s=np.ones(9, np.int64)), "rank 9 is beyond 8",
    ),
    "a mask and causality": (attention("<is_causal: int = 1>", ", m", MASK), "exclude each other"),
    "a soft cap": (attention("<softcap: float = 2.0>"), "softcap is not there"),
    "a stated precision of the softmax": (attention("<softmax_precision: int = 1>"), "softmax_precision"),
    "a scale without a root": (attention("<scale: float = -0.5>"), "scale must be positive"),
    "present keys": (
        model("y, k = Attention (x, x, x)", opset=23), "one output alone",
    ),
    "an operator inside a branch": (
        model(
            "b = Constant <value: tensor = bool {1}> () y = If (b) <then_branch = t () => (float[] a) "
            "{ a = Det (x) }, else_branch = e () => (float[] c) { c = Abs (x) }>"
        ),
        "Det: not an operator",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_version_takes_is_refused_with_its_reason(name: str) -> None:
    made, expected = REFUSED[name]
    assert any(expected in reason for reason in reasons(made)), reasons(made)
    with pytest.raises(NotAsAskedError):
        check_parses(made, ANY)
    assert minimum_version(made) is None


def test_a_quantized_layer_can_be_left_out_by_its_module() -> None:
    with pytest.raises(NotAsAskedError) as caught:
        check_parses(REFUSED["a zero point that is not 0"][0], ANY)
    assert caught.value.where == "blk.0.fc/QuantizeLinear"
    assert caught.value.next_step == "leave the layer in floating point: --exclude blk.0.fc"


def test_uint8_may_enter_and_leave_the_network() -> None:
    made = model("y = Cast <to: int = 1> (x)", "uint8[batch, 4] x")
    assert reasons(made) == []


def test_a_local_function_that_was_left_is_refused() -> None:
    function = ir.from_proto(
        onnx.parser.parse_function('<domain: "mine", opset_import: ["" : 20]> Twice (a) => (b) { b = Add (a, a) }')
    )
    made = model("y = Relu (x)")
    made.functions[function.identifier()] = function
    assert reasons(made) == ["mine.Twice: a local function was left in the model"]


def test_an_opset_of_old_is_refused() -> None:
    assert reasons(model("y = Relu (x)", opset=8)) == ["model: opset 8 is outside 9 to 25"]
