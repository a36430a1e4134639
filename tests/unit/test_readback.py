"""What really runs: nodes told apart by site, and multiply-adds counted by hand-made nodes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from attn_deploy.readback import compute_type, dtype_shares, multiply_adds, provider_fault, site_runs


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    name: str
    op_type: str
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    provider: str = "CPUExecutionProvider"


def f32(*shape: int) -> Tensor:
    return Tensor("float32", shape)


def u8(*shape: int) -> Tensor:
    return Tensor("uint8", shape)


def i8(*shape: int) -> Tensor:
    return Tensor("int8", shape)


def node(op_type: str, *inputs: Tensor, to: Tensor, name: str = "layer") -> Node:
    return Node(name, op_type, inputs, (to,))


SCALAR = f32()
COUNTED = {
    # 2 x 5 x 7 results of 3 products
    "MatMul": (node("MatMul", f32(2, 5, 3), f32(3, 7), to=f32(2, 5, 7)), 210, "float32"),
    "MatMul of two activations": (node("MatMul", f32(2, 4, 5, 3), f32(2, 4, 3, 6), to=f32(2, 4, 5, 6)), 720, "float32"),
    "MatMul of a vector": (node("MatMul", f32(3), f32(3, 7), to=f32(7)), 21, "float32"),
    "MatMul with a vector": (node("MatMul", f32(5, 3), f32(3), to=f32(5)), 15, "float32"),
    "Gemm": (node("Gemm", f32(5, 3), f32(7, 3), f32(7), to=f32(5, 7)), 105, "float32"),
    "Gemm with transA": (node("Gemm", f32(3, 5), f32(3, 7), to=f32(5, 7)), 105, "float32"),
    "FusedMatMul": (node("FusedMatMul", f32(2, 4, 5, 3), f32(2, 4, 3, 6), to=f32(2, 4, 5, 6)), 720, "float32"),
    "FusedMatMul with transB": (node("FusedMatMul", f32(2, 5, 3), f32(2, 6, 3), to=f32(2, 5, 6)), 180, "float32"),
    # channel attention: [channels, tokens] x [tokens, channels] read from [tokens, channels]
    "FusedMatMul with transA": (node("FusedMatMul", f32(2, 49, 8), f32(2, 49, 6), to=f32(2, 8, 6)), 4704, "float32"),
    "MatMul in double": (node("MatMul", Tensor("float64", (5, 3)), f32(3, 7), to=f32(5, 7)), 105, "float64"),
    # 2 x 8 x 6 x 6 results of 4 channels x 3 x 3
    "Conv": (node("Conv", f32(2, 4, 8, 8), f32(8, 4, 3, 3), f32(8), to=f32(2, 8, 6, 6)), 20736, "float32"),
    # 4 channels in each of 2 groups: the weight says so
    "Conv grouped": (node("Conv", f32(2, 8, 8, 8), f32(8, 4, 3, 3), to=f32(2, 8, 6, 6)), 20736, "float32"),
    "Conv depthwise": (node("FusedConv", f32(2, 8, 8, 8), f32(8, 1, 3, 3), to=f32(2, 8, 6, 6)), 5184, "float32"),
    "Conv in one dimension": (node("Conv", f32(2, 4, 8), f32(6, 4, 3), to=f32(2, 6, 6)), 864, "float32"),
    "QLinearConv": (
        node(
            "QLinearConv", u8(2, 4, 8, 8), SCALAR, u8(), i8(8, 4, 3, 3), f32(8), i8(8), SCALAR, u8(), to=u8(2, 8, 6, 6)
        ),
        20736,
        "int8",
    ),
    "QLinearConv depthwise": (
        node("QLinearConv", u8(1, 8, 8, 8), SCALAR, u8(), i8(8, 1, 3, 3), f32(8), i8(8), to=u8(1, 8, 6, 6)),
        2592,
        "int8",
    ),
    "ConvInteger": (
        node("ConvInteger", u8(2, 4, 8, 8), i8(8, 4, 3, 3), to=Tensor("int32", (2, 8, 6, 6))),
        20736,
        "int8",
    ),
    "MatMulIntegerToFloat": (
        node("MatMulIntegerToFloat", u8(10, 3), i8(3, 7), SCALAR, f32(7), u8(), to=f32(10, 7)),
        210,
        "int8",
    ),
    "MatMulInteger": (node("MatMulInteger", i8(5, 3), i8(3, 7), to=Tensor("int32", (5, 7))), 105, "int8"),
    "DynamicQuantizeMatMul reads floats": (
        node("DynamicQuantizeMatMul", f32(5, 3), i8(3, 7), f32(7), to=f32(5, 7)),
        105,
        "int8",
    ),
    "QLinearMatMul": (
        node("QLinearMatMul", u8(5, 3), SCALAR, u8(), i8(3, 7), SCALAR, i8(), SCALAR, u8(), to=u8(5, 7)),
        105,
        "int8",
    ),
}


@pytest.mark.parametrize("case", COUNTED)
def test_multiply_adds_and_their_type_are_those_counted_by_hand(case: str) -> None:
    counted, work, kind = COUNTED[case]
    assert multiply_adds(counted) == work
    assert compute_type(counted) == kind


@pytest.mark.parametrize(
    "other",
    [
        node("Add", f32(2, 5), f32(2, 5), to=f32(2, 5)),
        node("Softmax", f32(2, 5), to=f32(2, 5)),
        node("QuantizeLinear", f32(2, 5), SCALAR, u8(), to=u8(2, 5)),
        Node("layer", "MatMul"),
    ],
    ids=["Add", "Softmax", "QuantizeLinear", "a product without shapes"],
)
def test_what_multiplies_no_matrix_counts_nothing(other: Node) -> None:
    assert multiply_adds(other) == 0


def product(name: str, kind: str, work: int) -> Node:
    return Node(name, "MatMul", (Tensor(kind, (1, work)), Tensor(kind, (work, 1))), (f32(1, 1),))


def test_shares_are_of_multiply_adds_and_not_of_nodes() -> None:
    nodes = [product("a/MatMul", "uint8", 900), product("b/MatMul", "float32", 50), product("c/MatMul", "float32", 50)]
    everything, weighted = dtype_shares(nodes, [])
    assert everything == weighted == {"int8": 0.9, "float32": 0.1}


def test_a_product_inside_a_site_is_no_linear_layer() -> None:
    nodes = [
        product("blk/Attention/MatMul_1", "float32", 300),
        product("blk/Attention_proj/MatMul", "uint8", 100),
        product("blk/fc/MatMul", "uint8", 600),
    ]
    everything, weighted = dtype_shares(nodes, ["blk/Attention"])
    assert everything == {"int8": 0.7, "float32": 0.3}
    assert weighted == {"int8": 1.0}


def test_a_model_without_a_product_has_no_shares() -> None:
    assert dtype_shares([node("Add", f32(1), f32(1), to=f32(1))], []) == ({}, {})


# -- sites -----------------------------------------------------------------------------------------------------------


def run_of(root: str, *nodes: Node) -> tuple[str, tuple[str, ...]]:
    (run,) = site_runs([("module", root)], nodes)
    assert run.module == "module"
    return run.implementation, run.nodes


def test_one_node_of_the_site_s_name_is_our_kernel() -> None:
    assert run_of("blk/Gate", Node("blk/Gate", "Gate")) == ("native:Gate", ("Gate",))


def test_several_nodes_below_the_site_s_name_are_the_body() -> None:
    body = [Node(f"blk/Attention/{op}_{n}", op) for n, op in enumerate(("MatMul", "Softmax", "MatMul"))]
    assert run_of("blk/Attention", *body) == ("inlined", ("MatMul", "Softmax", "MatMul"))


def test_names_that_onnx_runtime_lengthens_when_it_fuses_belong_to_the_site() -> None:
    fused = [
        Node("blk/Attention/MatMul_0/MatmulTransposeFusion/", "FusedMatMul"),
        Node("blk/Attention/Softmax_3_nchwc", "Softmax"),
    ]
    assert run_of("blk/Attention", *fused)[1] == ("FusedMatMul", "Softmax")
    assert run_of("blk/Gate", Node("blk/Gate_nchwc", "Mul")) == ("ort:Mul", ("Mul",))


def test_the_second_operator_of_a_module_is_another_site() -> None:
    nodes = [Node("blk/Gate/Mul_0", "Mul"), Node("blk/Gate_2/Mul_0", "Mul"), Node("blk/Gate_2/Relu_1", "Relu"),
             Node("blk/Gate_21/Add_0", "Add")]  # fmt: skip
    first, second, third = site_runs([("a", "blk/Gate"), ("b", "blk/Gate_2"), ("c", "blk/Gate_21")], nodes)
    assert (first.nodes, second.nodes, third.nodes) == (("Mul",), ("Mul", "Relu"), ("Add",))
    assert (first.implementation, second.implementation) == ("ort:Mul", "inlined")


def test_a_module_whose_name_starts_the_same_is_another_site() -> None:
    nodes = [Node("blk.1/Gate/Mul_0", "Mul"), Node("blk.10/Gate/Relu_0", "Relu"), Node("blk.1/GateNorm/Add_0", "Add")]
    assert run_of("blk.1/Gate", *nodes)[1] == ("Mul",)


def test_a_site_of_which_no_node_is_left_was_fused() -> None:
    (run,) = site_runs([("m", "blk/Gate")], [Node("other/Gate", "Gate")])
    assert (run.implementation, run.nodes, run.provider) == ("fused into its neighbours", (), "")


def test_our_attention_is_told_from_onnx_runtime_s_by_its_rank() -> None:
    ours = node("Attention", f32(2, 5, 3, 4), to=f32(2, 5, 3, 4), name="blk/Attention")
    theirs = node("Attention", f32(2, 5, 12), to=f32(2, 5, 12), name="blk/Attention")
    assert run_of("blk/Attention", ours)[0] == "native:Attention"
    assert run_of("blk/Attention", theirs)[0] == "ort:Attention"


def test_an_attention_that_onnx_runtime_fused_is_its_own() -> None:
    fused = Node("blk/Attention/MatMul_0", "MultiHeadAttention")
    assert run_of("blk/Attention", fused, Node("blk/Attention/Reshape_9", "Reshape"))[0] == "ort:MultiHeadAttention"


def test_providers_of_a_site_are_listed_once_each() -> None:
    nodes = [
        Node("blk/Gate/Mul_0", "Mul", provider="CUDAExecutionProvider"),
        Node("blk/Gate/Add_1", "Add", provider="CUDAExecutionProvider"),
        Node("blk/Gate/Relu_2", "Relu"),
    ]
    (run,) = site_runs([("m", "blk/Gate")], nodes)
    assert run.provider == "CPUExecutionProvider, CUDAExecutionProvider"


# -- providers -------------------------------------------------------------------------------------------------------

CUDA = "CUDAExecutionProvider"
SIZES = Tensor("int64", (4,))


def test_arithmetic_on_shapes_may_run_on_the_host() -> None:
    nodes = [Node("shape", "Gather", (SIZES,), (SIZES,)), Node("fc", "Gemm", (f32(1, 4),), (f32(1, 2),), CUDA)]
    assert provider_fault(CUDA, nodes) is None


@pytest.mark.parametrize(
    "result", [f32(1, 2), Tensor("float16", (1, 2)), Tensor("bfloat16", (8,)), Tensor("int64", (1, 999))]
)
def test_what_computes_elsewhere_is_named(result: Tensor) -> None:
    nodes = [Node("block.attn/Attention", "Attention", (f32(1, 4),), (result,)), node("Gemm", f32(1, 4), to=f32(1, 2))]
    fault = provider_fault(CUDA, nodes[:1])
    assert fault == f"1 of 1 nodes do not run on {CUDA}: block.attn/Attention (Attention on CPUExecutionProvider)"


def test_many_nodes_elsewhere_are_counted_and_a_few_named() -> None:
    nodes = [Node(f"n{i}", "Add", (), (f32(3),)) for i in range(7)]
    fault = str(provider_fault(CUDA, nodes))
    assert fault.startswith(f"7 of 7 nodes do not run on {CUDA}: n0 (Add on CPUExecutionProvider), n1 ")
    assert fault.endswith(" and 3 more")


# -- attention as one kernel ----------------------------------------------------------------------------------------


def test_the_products_inside_a_fused_attention_are_counted() -> None:
    query, key = Tensor("float16", (2, 5, 12)), Tensor("float16", (2, 7, 12))
    fused = Node("a/Attention", "MultiHeadAttention", (query, key, key), (query,), CUDA)
    assert multiply_adds(fused) == 2 * (2 * 5 * 7 * 12)
    assert compute_type(fused) == "float16"


def test_packed_operands_of_a_fused_attention_are_counted() -> None:
    packed = Tensor("float16", (2, 5, 3, 3, 4))  # [batch, tokens, heads, 3, head_dim]
    fused = Node("a/Attention", "MultiHeadAttention", (packed,), (Tensor("float16", (2, 5, 12)),), CUDA)
    assert multiply_adds(fused) == 2 * (2 * 5 * 5 * 12)


def test_a_kernel_of_tensorrt_is_named_so() -> None:
    nodes = [Node("a/Attention", "fmha", (f32(1, 2),), (f32(1, 2),), "TensorRT")]
    (run,) = site_runs([("a", "a/Attention")], nodes)
    assert run.implementation == "trt:fmha"
    assert run.one_kernel


# -- operators of ours ------------------------------------------------------------------------------------------------

TOKENS, WIDTH, HIDDEN = f32(2, 5, 8), f32(8), f32(12)
BLOCK = (TOKENS, WIDTH, WIDTH, f32(8, 24), f32(24), f32(8, 8), WIDTH)
INT8_BLOCK = (TOKENS, WIDTH, WIDTH, u8(8, 24), f32(24), f32(24), u8(8, 8), WIDTH, WIDTH)
OURS = {
    "Linear": (node("NormLinearGelu", TOKENS, f32(8, 12), HIDDEN, WIDTH, WIDTH, to=f32(2, 5, 12)), 10 * 8 * 12),
    "FeedForward": (node("FeedForwardGelu", TOKENS, WIDTH, WIDTH, f32(8, 12), HIDDEN, f32(12, 8), WIDTH, to=TOKENS),
                    2 * 10 * 8 * 12),
    # two products of 5 x 5 x 8 in each of 2 samples; in windows of 2: 3 of them
    "PackedAttention": (node("PackedAttention", f32(2, 5, 3, 2, 4), to=TOKENS), 2 * 2 * 25 * 8),
    "PackedAttentionIndexed": (
        node("PackedAttentionIndexed", f32(2, 6, 3, 2, 4), Tensor("int64", (3, 2)), to=f32(2, 6, 8)),
        2 * 2 * 3 * 4 * 8,
    ),
    "AttentionBlock": (node("AttentionBlock", *BLOCK, to=TOKENS), 10 * 8 * 32 + 2 * 2 * 25 * 8),
    "Gate": (node("Gate", f32(2, 5, 3, 3), f32(2, 5, 1, 1), to=f32(2, 5, 3, 3)), 0),
    "QuantizedNormLinear": (
        node("QuantizedNormLinear", TOKENS, u8(8, 24), f32(24), f32(24), WIDTH, WIDTH, to=f32(2, 5, 24)), 10 * 8 * 24
    ),
    "QuantizedFeedForwardGelu": (
        node("QuantizedFeedForwardGelu", TOKENS, WIDTH, WIDTH, u8(8, 12), f32(12), f32(12), u8(12, 8), WIDTH, WIDTH,
             to=TOKENS),
        2 * 10 * 8 * 12,
    ),
    "QuantizedAttentionBlock": (node("QuantizedAttentionBlock", *INT8_BLOCK, to=TOKENS), 10 * 8 * 32 + 2 * 2 * 25 * 8),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_multiply_adds_of_our_operators_are_those_counted_by_hand(case: str) -> None:
    counted, work = OURS[case]
    assert multiply_adds(counted) == work


def test_linear_layers_inside_an_attention_block_count_as_linear_layers() -> None:
    """The block is named after its site, whose own products are none."""
    block = node("AttentionBlock", *BLOCK, to=TOKENS, name="blocks.0.attn/PackedAttention/AttentionBlock")
    site = node("PackedAttention", f32(2, 5, 3, 2, 4), to=TOKENS, name="blocks.1.attn/PackedAttention")
    integer = product("head/MatMul", "uint8", 10 * 8 * 32)
    roots = ["blocks.0.attn/PackedAttention", "blocks.1.attn/PackedAttention"]
    everything, weighted = dtype_shares([block, site, integer], roots)
    assert weighted == {"float32": 0.5, "int8": 0.5}
    work = 10 * 8 * 32 + 2 * 800
    assert everything["float32"] == round(work / (work + 10 * 8 * 32), 6)


def test_linear_layers_of_a_quantized_block_are_int8_and_its_attention_is_not() -> None:
    block = node("QuantizedAttentionBlock", *INT8_BLOCK, to=TOKENS, name="blocks.0.attn/PackedAttention/Quantized")
    everything, weighted = dtype_shares([block], ["blocks.0.attn/PackedAttention"])
    assert weighted == {"int8": 1.0}
    assert everything["float32"] == round(2 * 2 * 25 * 8 / (10 * 8 * 32 + 2 * 2 * 25 * 8), 6)
    for name in ("QuantizedNormLinear", "QuantizedFeedForwardGelu"):
        counted, _ = OURS[name]
        assert dtype_shares([counted], []) == ({"int8": 1.0}, {"int8": 1.0})


def test_block_runs_the_site_that_it_is_named_after() -> None:
    block = node("AttentionBlock", *BLOCK, to=TOKENS, name="blocks.0.attn/PackedAttention/AttentionBlock")
    around = node(
        "NormLinear", TOKENS, f32(8, 24), f32(24), WIDTH, WIDTH, to=f32(2, 5, 24), name="blocks.0.attn.qkv/MatMul"
    )
    (run,) = site_runs([("blocks.0.attn", "blocks.0.attn/PackedAttention")], [around, block])
    assert run.implementation == "native:AttentionBlock"
    assert run.nodes == ("AttentionBlock",)
