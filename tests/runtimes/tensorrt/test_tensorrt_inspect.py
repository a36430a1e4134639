"""The inspector's text as nodes. The texts are samples written by hand after NVIDIA's documentation, its migration
guide from 10.x to 11.x, and layers that users posted; no run made them, since none can be made without a GPU.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from attn_deploy.errors import AttnDeployError
from attn_deploy.runtimes.tensorrt_inspect import EngineLayer, EngineNode, onnx_names, parse_layers, run_nodes
from attn_deploy.runtimes.tensorrt_work import Product

BLOCK = "encoder.layers.3"
UNIT, RECORD = "\x1f", "\x1e"


def tensor(name: str, shape: list[int], dtype: str, *, eleven: bool = False) -> dict[str, Any]:
    if eleven:  # the migration guide: the combined field is two
        return {"Name": name, "Location": "Device", "Dimensions": shape, "Format": "Row major", "Datatype": dtype}
    return {"Name": name, "Location": "Device", "Dimensions": shape, "Format/Datatype": dtype}


def layer(
    name: str,
    kind: str,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    tactic: str,
    covers: list[str],
    separator: str = UNIT,
) -> dict[str, Any]:
    return {
        "Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": outputs, "TacticName": tactic, "StreamId": 0,
        "Metadata": separator.join(f"[ONNX Layer: {c}]" for c in covers),
    }  # fmt: skip


def block(dtype: str = "Half", tag: str = "f16", *, eleven: bool = False, separator: str = UNIT) -> dict[str, Any]:
    """One attention block, as Myelin splits it: fused projections, one attention kernel, output projection, a norm."""
    site, out = f"{BLOCK}/Attention", f"{BLOCK}.proj/MatMul"

    def of(name: str, shape: list[int]) -> dict[str, Any]:
        return tensor(name, shape, dtype, eleven=eleven)

    gemm = f"sm80_xmma_gemm_{tag}{tag}_{tag}f32_f32_tn_n_tilesize64x64x64_stage4_warpsize2x2x1_tensor16x8x16"
    layers = [
        layer(
            f"{BLOCK.replace('.', '_')}_q/MatMul+{BLOCK.replace('.', '_')}_k/MatMul_myl0_9", "gemm",
            [of("__mye1", [1, 40, 256])], [of("__mye2", [2, 40, 256])], gemm,
            [f"{BLOCK}.q/MatMul", f"{BLOCK}.k/MatMul"], separator,
        ),
        layer("__myl_TranReshMove_myl0_10", "kgen", [of("__mye2", [2, 40, 256])], [of("__mye3", [4, 40, 64])],
              "__myl_TranReshMove_0x5f37", [f"{site}/Transpose", f"{site}/MatMul"], separator),
        layer(
            "_gemm_mha_v2_myl0_11", "kgen",
            [of("__mye3", [4, 40, 64]), of("__mye3", [4, 64, 40]), of("mask", [1, 1, 40, 40]), of("v", [4, 40, 64])],
            [of("__mye4", [4, 40, 64])], "_gemm_mha_v2_0x957a2fe2",
            [f"{site}/MatMul_1", f"{site}/Softmax", f"{site}/MatMul"], separator,
        ),
        layer(f"{out}_myl0_12", "gemm", [of("__mye4", [1, 40, 256])], [of("__mye5", [1, 40, 256])], gemm,
              [out, f"{BLOCK}.proj/Add"], separator),
        layer("__myl_AddCastMeanSubMulMeanAddSqrtDivMulCastMulAdd_myl0_13", "kgen", [of("__mye5", [1, 40, 256])],
              [of("y", [1, 40, 256])], "__myl_AddCastMeanSub_0xf254", [f"{BLOCK}.norm/LayerNormalization"], separator),
    ]  # fmt: skip
    io = {"I/O Tensors": []} if eleven else {"Bindings": ["x", "y"]}
    return {"Layers": layers, **io}


PRODUCTS = [
    Product(f"[ONNX Layer: {BLOCK}.q/MatMul]", 40 * 256 * 256),
    Product(f"[ONNX Layer: {BLOCK}.k/MatMul]", 40 * 256 * 256),
    Product(f"[ONNX Layer: {BLOCK}/Attention/MatMul]", 4 * 40 * 40 * 64),
    Product(f"[ONNX Layer: {BLOCK}/Attention/MatMul_1]", 4 * 40 * 40 * 64),
    Product(f"[ONNX Layer: {BLOCK}.proj/MatMul]", 40 * 256 * 256),
]


def nodes(text: dict[str, Any], products: list[Product] = PRODUCTS, profile: int = 0) -> list[EngineNode]:
    return run_nodes(parse_layers(json.dumps(text), profile=profile), products)


def shares(found: list[EngineNode]) -> dict[str, int]:
    work: dict[str, int] = {}
    for node in found:
        for product in node.products:
            work[node.computes_in] = work.get(node.computes_in, 0) + product.multiply_adds
    return work


ALL = sum(p.multiply_adds for p in PRODUCTS)


@pytest.mark.parametrize("eleven", [False, True], ids=["10.x", "11.x"])
@pytest.mark.parametrize("separator", [UNIT, RECORD, ""])
def test_a_fused_attention_is_one_node_that_covers_its_onnx_nodes(eleven: bool, separator: str) -> None:
    found = nodes(block(eleven=eleven, separator=separator))
    (attention,) = [n for n in found if n.op_type == "gemm_mha_v2"]
    assert attention.provider == "TensorRT"
    assert set(attention.covers) == {f"{BLOCK}/Attention/{n}" for n in ("MatMul", "Softmax", "MatMul_1")}
    assert [p.name for p in attention.products] == [f"{BLOCK}/Attention/MatMul", f"{BLOCK}/Attention/MatMul_1"]
    assert attention.inputs[0].shape == (4, 40, 64)
    assert attention.inputs[0].dtype == "float16"


def test_names_keep_the_dots_that_myelin_takes_out() -> None:
    first = nodes(block())[0]
    assert first.covers == (f"{BLOCK}.q/MatMul", f"{BLOCK}.k/MatMul")
    assert first.op_type == "gemm"
    assert sum(p.multiply_adds for p in first.products) == 2 * 40 * 256 * 256


@pytest.mark.parametrize("eleven", [False, True], ids=["10.x", "11.x"])
@pytest.mark.parametrize(
    ("dtype", "tag", "expected"),
    [("Half", "f16", "float16"), ("BFloat16", "bf16", "bfloat16"), ("Float", "f32", "float32"), ("Int8", "i8", "int8")],
)
def test_all_the_work_is_counted_in_the_type_it_is_done_in(dtype: str, tag: str, expected: str, eleven: bool) -> None:
    assert shares(nodes(block(dtype, tag, eleven=eleven))) == {expected: ALL}


def test_an_engine_asked_for_in_fp16_that_computes_in_fp32_shows_it() -> None:
    assert shares(nodes(block("Float", "f32"))) == {"float32": ALL}


def test_tf32_is_told_from_fp32_by_its_kernel() -> None:
    text = block("Float", "f32")
    for entry in text["Layers"]:
        entry["TacticName"] = entry["TacticName"].replace("gemm_f32f32_f32f32", "gemm_f32f32_tf32f32")
    attention = 2 * 4 * 40 * 40 * 64
    assert shares(nodes(text)) == {"tf32": ALL - attention, "float32": attention}


def test_a_move_that_names_a_product_does_not_count_as_it() -> None:
    """The Move before the attention kernel has the same ONNX node in its metadata."""
    moves = [n for n in nodes(block()) if n.name.startswith("__myl_TranReshMove")]
    assert moves[0].products == ()
    assert moves[0].op_type == "kgen"


def test_a_product_that_no_layer_names_is_counted_as_unknown() -> None:
    found = nodes(block(), [*PRODUCTS, Product("positions/MatMul", 1000)])
    assert shares(found) == {"float16": ALL, "unknown": 1000}
    assert found[-1].op_type == "unknown"


def test_an_attention_that_is_not_fused_is_several_nodes() -> None:
    site = f"{BLOCK}/Attention"
    half = tensor("t", [4, 40, 40], "Half")
    text = {"Layers": [
        layer(f"{site}/MatMul_myl0_1", "gemm", [half], [half], "sm80_xmma_gemm_f16f16_f16f16_f16_nn",
              [f"{site}/MatMul"]),
        layer("__myl_MaxSubExpSumDivMul_myl0_2", "kgen", [half], [half], "__myl_MaxSub_0x1", [f"{site}/Softmax"]),
        layer(f"{site}/MatMul_1_myl0_3", "gemm", [half], [half], "sm80_xmma_gemm_f16f16_f16f16_f16_nn",
              [f"{site}/MatMul_1"]),
    ]}  # fmt: skip
    assert [n.op_type for n in nodes(text, [])] == ["gemm", "kgen", "gemm"]


def test_a_module_called_attention_makes_no_attention_kernel() -> None:
    half = tensor("t", [1, 40, 256], "Half")
    text = {"Layers": [layer("vit.attention.flash/MatMul_myl0_1", "gemm", [half], [half],
                             "sm80_xmma_gemm_f16f16_f16f16_f16_nn", ["vit.attention.flash/MatMul"])]}  # fmt: skip
    assert [n.op_type for n in nodes(text, [])] == ["gemm"]


@pytest.mark.parametrize(
    ("name", "kind", "tactic", "expected"),
    [
        ("_gemm_mha_v2_myl3_6", "kgen", "_gemm_mha_v2_0x957a", "gemm_mha_v2"),
        ("__mye8037_gemm_mha_v2_myl0_7", "kgen", "_gemm_mha_v2_0x12", "gemm_mha_v2"),
        ("_gemv_mha_v1_myl0_4", "kgen", "", "gemv_mha_v1"),
        ("a/Attention_myl0_2", "Attention", "", "Attention"),
        ("x", "kgen", "fmha_v2_flash_attention_fp16_64_sm90", "fmha_v2_flash_attention_fp16_64_sm90"),
        ("c/Conv", "CaskConvolution", "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32", "CaskConvolution"),
    ],
)  # fmt: skip
def test_what_a_layer_is_called(name: str, kind: str, tactic: str, expected: str) -> None:
    (node,) = run_nodes([EngineLayer(name, kind, tactic, (), (), ())], [])
    assert node.op_type == expected


@pytest.mark.parametrize(
    ("tactic", "inputs", "expected"),
    [
        ("sm80_xmma_gemm_f16f32_f16f16_f32_nn_n_tilesize32x32x64", ["Float"], "float16"),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize32x32x64", ["Float"], "tf32"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn", ["BFloat16"], "bfloat16"),
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs", ["Int8"], "int8"),
        ("sm80_xmma_gemm_i8f32_i8i32_f32_tn", ["Int8"], "int8"),
        ("sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn", ["FP8"], "float8"),
        ("sm50_xmma_cublas_gemvx_f16f16_f32", ["Half"], "float16"),
        ("ampere_h16816gemm_256x128_ldg8_nn_v1", ["Half"], "float16"),
        ("ampere_fp16_s16816gemm_fp16_128x64_tn", ["Half"], "float16"),
        ("ampere_sgemm_32x128_nn", ["Float"], "float32"),
        ("turing_h1688cudnn_256x128_ldg8_relu", ["Half"], "float16"),
        ("", ["Half"], "float16"),
        ("", ["Float", "Int8"], "int8"),
        ("", ["Bool", "Half"], "float16"),
        ("__myl_FcAddErf_0x12", ["Row major linear FP16 format"], "float16"),
        ("", ["Channel major FP16 format where channel % 8 == 0"], "float16"),
        ("", ["Thirty-two wide channel vectorized row major Int8 format"], "int8"),
        ("", ["Row major linear FP32"], "float32"),
        ("", ["Row major linear BFloat16 format"], "bfloat16"),
    ],
)
def test_what_a_kernel_multiplies_in(tactic: str, inputs: list[str], expected: str) -> None:
    half = [tensor(str(i), [1], dtype) for i, dtype in enumerate(inputs)]
    (found,) = parse_layers(json.dumps({"Layers": [layer("gemm", "gemm", half, half, tactic, [])]}))
    assert found.computes_in == expected


def test_convolutions_outside_myelin_are_named_by_what_was_joined() -> None:
    text = {"Layers": [
        {"Name": "stem/Conv + stem.act/Relu + PWN(se/HardSigmoid)", "LayerType": "CaskConvolution",
         "Inputs": [tensor("x", [1, 3, 8, 8], "Half")], "Outputs": [tensor("y", [1, 8, 8, 8], "Half")],
         "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc"},
        {"Name": "Reformatting CopyNode for Input Tensor 0 to stem/Conv", "LayerType": "Reformat",
         "Inputs": [tensor("x", [1, 3, 8, 8], "Float")], "Outputs": [tensor("x'", [1, 3, 8, 8], "Half")]},
    ]}  # fmt: skip
    convolution, reformat = nodes(text, [Product("stem/Conv", 5000)])
    assert convolution.covers == ("stem/Conv", "stem.act/Relu", "se/HardSigmoid")
    assert convolution.products == (Product("stem/Conv", 5000),)
    assert reformat.covers == ()


def test_layers_of_another_profile_are_left_out() -> None:
    half = [tensor("x", [1, 8], "Half")]
    text = {"Layers": [
        layer("a/MatMul", "gemm", half, half, "", ["a/MatMul"]),
        layer("a/MatMul [profile 1]", "gemm", half, half, "", ["a/MatMul"]),
    ]}  # fmt: skip
    assert [n.name for n in nodes(text, [], profile=0)] == ["a/MatMul"]
    (second,) = parse_layers(json.dumps(text), profile=1)
    assert second.name == "a/MatMul"


def test_times_are_found_by_layer_name() -> None:
    layers = parse_layers(json.dumps(block()))
    found = run_nodes(layers, [], {"_gemm_mha_v2_myl0_11": 0.25})
    assert [n.time_us for n in found if n.op_type == "gemm_mha_v2"] == [250.0]


def test_names_alone_are_an_error_that_says_why() -> None:
    with pytest.raises(AttnDeployError, match="what its layers are") as error:
        parse_layers(json.dumps({"Layers": ["a/MatMul", "b/MatMul"], "Bindings": []}))
    assert "detailed" in str(error.value.expected)


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", "null"])
def test_what_is_no_inspector_text_is_an_error(text: str) -> None:
    with pytest.raises(AttnDeployError, match="no JSON"):
        parse_layers(text)


def test_names_may_hold_brackets() -> None:
    assert onnx_names("[ONNX Layer: blocks[0]/MatMul]\x1f[ONNX Layer: b/Add]") == ("blocks[0]/MatMul", "b/Add")
