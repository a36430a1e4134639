"""Where a candidate is cut, what a block is called, and that parts compute what they did in the whole."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from attn_deploy import runtimes
from attn_deploy.export.blocks import Block, Owners, pair_blocks
from attn_deploy.export.cut import Cutter
from attn_deploy.target import Precision, Target

X = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)

PLAIN = """
    up/Add: up = Add (x, one)
    attn/Shape: shape = Shape (up)
    attn/Reshape: flat = Reshape (up, shape)
    attn/Gate: site = Mul (flat, two)
    attn/Gate_2: other = Mul (site, up)
    down/Relu: down = Relu (other)
    Identity: y = Identity (down)
"""


def model(body: str, initializers: str = "float one = {1.0}, float two = {2.0}") -> ir.Model:
    """`body` has a line `name: outputs = Operator (inputs)` for each node."""
    lines = [line.strip().split(": ", 1) for line in body.strip().splitlines()]
    statements = "\n".join(statement for _, statement in lines)
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 4] x) => (float[batch, 4] y) <{initializers}> {{ {statements} }}"""
    made = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    for node, (name, _) in zip(made.graph, lines, strict=True):
        node.name = name
    return made


def run(content: bytes, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return next(iter(runtimes.open_session(Target.ONNXRUNTIME_CPU, content, threads=1).run(feeds).values()))


def blocks_of(candidate: ir.Model, portable: ir.Model, sites: tuple[str, ...] = ()) -> dict[str, Block]:
    pairs = pair_blocks(candidate, portable, portable, portable, sites)
    return {block.value: block for block in pairs.in_order}


def test_a_part_is_fed_at_its_boundary_and_computes_what_it_did_in_the_whole() -> None:
    whole = model(PLAIN)
    values = {str(o.name): o for node in whole.graph for o in node.outputs}
    cutter = Cutter(whole)
    part = cutter.part(values["down"], {"up", "site", "down"})
    assert set(part.input_names) == {"up", "site"}
    assert [n.name for n in part.nodes] == ["attn/Gate_2", "down/Relu"]
    feeds = {"up": X, "site": X + 1}
    np.testing.assert_array_equal(run(cutter.model_of(part, feeds), feeds), np.maximum(X * (X + 1), 0))
    assert len(list(whole.graph)) == 7
    assert [o.name for o in whole.graph.outputs] == ["y"]


def test_the_value_that_a_part_goes_through_is_computed_and_not_fed() -> None:
    whole = model(PLAIN)
    values = {str(o.name): o for node in whole.graph for o in node.outputs}
    part = Cutter(whole).part(values["down"], {"up", "other"}, through="other")
    assert part.input_names == ("up",)


@pytest.mark.parametrize(
    ("name", "root"),
    [("a/MatMul", "a/MatMul"), ("a/MatMul/Reshape_5", "a/MatMul"), ("a/Gate_2/Mul_0", "a/Gate_2"),
     ("MatMul/Add_1", "MatMul"), ("weight/Cast", None)],
)  # fmt: skip
def test_what_a_node_was_lowered_from_follows_from_its_name(name: str, root: str | None) -> None:
    canonical = model("""
        a/MatMul: b = Add (x, one)
        a/Gate: c = Add (b, one)
        a/Gate_2: d = Add (c, one)
        MatMul: y = Add (d, one)""")
    assert Owners(canonical, ()).root(name) == root


def test_cuts_are_floats_that_leave_a_module_or_a_site() -> None:
    plain = model(PLAIN)
    assert {v: b.module for v, b in blocks_of(plain, plain).items()} == {
        "up": "up", "other": "attn", "down": "down", "y": ""
    }  # fmt: skip
    found = blocks_of(plain, plain, ("attn/Gate", "attn/Gate_2"))
    assert list(found) == ["up", "flat", "site", "other", "down", "y"]
    assert found["other"].operators == ("Gate_2",)


def test_a_value_that_lowering_removed_joins_its_neighbours_and_they_are_named() -> None:
    lowered = model("""
        up/Add: up = Add (x, one)
        down/Relu: down = Relu (up)
        Identity: y = Identity (down)""")
    found = blocks_of(lowered, model(PLAIN), ("attn/Gate", "attn/Gate_2"))
    assert list(found) == ["up", "down", "y"]
    assert (found["down"].module, found["down"].between) == ("down", ("attn",))


CONVOLUTION = """
    in/Reshape: x4 = Reshape (x, s)
    conv/Conv: c = Conv (x4, w)
    act/Relu: r = Relu (c)
    next/Relu: p = Relu (r)
    Flatten: y = Flatten (p)
"""
QUANTIZED = CONVOLUTION.replace("Relu (r)", "Relu (d)").replace(
    "    next/Relu",
    """    act/Relu/QuantizeLinear: q = QuantizeLinear (r, scale, zero)
    act/Relu/DequantizeLinear: d = DequantizeLinear (q, scale, zero)
    next/Relu""",
)


def test_an_integer_layer_is_one_block_with_its_relu_and_its_quantization() -> None:
    constants = "float[1, 1, 1, 1] w = {2.0}, float scale = {0.5}, uint8 zero = {0}, int64[4] s = {-1, 1, 2, 2}"
    candidate = model(QUANTIZED, constants)
    found = blocks_of(candidate, model(CONVOLUTION, constants))
    assert list(found) == ["x4", "r", "p", "y"]
    layer = found["r"]
    assert (layer.module, layer.between, layer.arithmetic) == ("conv", ("act",), Precision.INT8)
    feeds = {"x4": X.reshape(-1, 1, 2, 2)}
    got = run(Cutter(candidate).model_of(layer.candidate, feeds), feeds)
    np.testing.assert_array_equal(got, np.round(np.maximum(2 * feeds["x4"], 0) / 0.5) * 0.5)
    assert found["y"].arithmetic is Precision.FP32


def test_a_weight_that_is_stored_in_half_precision_makes_an_fp16_block() -> None:
    body = """
        a/Mul: b = Mul (x, w)
        b/Relu: y = Relu (b)"""
    half = model(f"w/Cast: w = Cast <to: int = 1> (h)\n{body.strip()}", "float16[4] h = {1, 2, 3, 4}")
    found = blocks_of(half, model(body, "float[4] w = {1, 2, 3, 4}"))
    assert {v: b.arithmetic for v, b in found.items()} == {"b": Precision.FP16, "y": Precision.FP32}
