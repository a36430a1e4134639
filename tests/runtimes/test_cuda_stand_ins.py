"""What the stand-ins tell of the real onnxruntime-gpu: its kernels, and where it places the nodes of a model."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import onnx.parser
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for cuda_stand_ins

import cuda_stand_ins

pytestmark = pytest.mark.skipif(cuda_stand_ins.missing() is not None, reason=str(cuda_stand_ins.missing()))

GPU, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def model(text: str) -> bytes:
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    return bytes(parsed.SerializeToString())


DETERMINANT = model("""determinant (float[batch, 3, 3] x) => (float[batch] y)
    { before = Relu (x)  inside = Det (before)  y = Sigmoid (inside) }""")


@pytest.fixture(scope="module")
def kernels() -> list[cuda_stand_ins.Kernel]:
    return cuda_stand_ins.kernels()


@pytest.mark.parametrize(
    ("domain", "operator", "variable", "types"),
    [
        ("", "Attention", "T1", {"float", "float16", "bfloat16"}),
        ("com.microsoft", "MultiHeadAttention", "T", {"float", "float16", "bfloat16"}),
        ("com.microsoft", "SkipLayerNormalization", "T", {"float", "float16"}),
        ("com.microsoft", "BiasGelu", "T", {"float", "float16"}),
        ("", "MatMul", "T", {"float", "float16", "bfloat16"}),
    ],
)
def test_the_wheel_has_the_kernels_that_lowering_counts_on(
    kernels: list[cuda_stand_ins.Kernel], domain: str, operator: str, variable: str, types: set[str]
) -> None:
    found = [k for k in kernels if (k.provider, k.domain, k.op_type) == (GPU, domain, operator)]
    assert {f"tensor({name})" for name in types} <= {name for k in found for name in k.types[variable]}


def test_an_operator_without_a_gpu_kernel_goes_to_the_cpu() -> None:
    placed = {p.op_type: p.provider for p in cuda_stand_ins.placements(DETERMINANT)}
    assert placed == {"Relu": GPU, "Det": CPU, "Sigmoid": GPU}


def test_the_session_in_the_end_copies_around_such_a_node() -> None:
    there = onnx.load_from_string(cuda_stand_ins.optimized(DETERMINANT))
    assert [node.op_type for node in there.graph.node] == ["Relu", "MemcpyToHost", "Det", "MemcpyFromHost", "Sigmoid"]


def test_options_of_the_provider_count() -> None:
    convolution = model("""convolution (float[batch, 4, 8, 8] x) => (float[batch, 4, 8, 8] y)
        <float[4, 4, 1, 1] weight = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> { y = Conv (x, weight) }""")
    assert [p.domain for p in cuda_stand_ins.placements(convolution)] == [""]
    last = cuda_stand_ins.placements(convolution, {"prefer_nhwc": "1"})
    assert ("Conv", "com.ms.internal.nhwc") in [(p.op_type, p.domain) for p in last]


def test_a_rejected_model_is_told_in_the_runtimes_words() -> None:
    with pytest.raises(AssertionError, match="INVALID_PROTOBUF"):
        cuda_stand_ins.placements(b"not a model")
