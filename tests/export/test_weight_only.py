"""INT8 weights in blocks: the operator's numbers, its forms, and how exact it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy.choice import share_fault
from attn_deploy.export.canonical import save_model
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.lower.lowered import Conditions
from attn_deploy.export.precision.insert import drop_unused_initializers
from attn_deploy.export.precision.plan import plan_int8, weighted_nodes
from attn_deploy.export.precision.weight_only import BLOCK, quantize_blocks, quantize_in_blocks, weight_only_plan
from attn_deploy.inputs import make_feeds
from attn_deploy.parity import sqnr_db
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.readback import dtype_shares
from attn_deploy.runtimes import open_session, read_back
from attn_deploy.target import Precision, Target

sys.path.insert(0, str(Path(__file__).parent))  # for the models
sys.path.insert(0, str(Path(__file__).parents[1] / "native"))

from cpu_models import exported
from half_models import network, normal, run
from test_releases import RELEASES, install

Array = np.ndarray[Any, Any]

LEAST_DB = 38.0
"""Normal activations and weights, both in 8 bits by blocks: 44 dB and more were measured."""


def quantized(text: str, **weights: Array) -> ir.Model:
    model = network(text, **weights)
    for node in weighted_nodes(model):
        quantize_blocks(model, node)
    drop_unused_initializers(model)
    return model


X2, X3, X4 = normal(7, 80, seed=1), normal(3, 5, 80, seed=2), normal(2, 3, 5, 80, seed=3)
W, WT, B = normal(80, 24, seed=4), normal(24, 80, seed=5), normal(24, seed=6)
LAYERS = {
    "MatMul of rank 2": ("[fc__MatMul] y = MatMul (x, w)", X2, {"w": W}, lambda x: x @ W),
    "MatMul of rank 3": ("[fc__MatMul] y = MatMul (x, w)", X3, {"w": W}, lambda x: x @ W),
    "MatMul of rank 4": ("[fc__MatMul] y = MatMul (x, w)", X4, {"w": W}, lambda x: x @ W),
    "one row": ("[fc__MatMul] y = MatMul (x, w)", X2[:1], {"w": W}, lambda x: x @ W),
    "one column": ("[fc__MatMul] y = MatMul (x, w)", X3, {"w": W[:, :1]}, lambda x: x @ W[:, :1]),
    "a bias behind": (
        "[fc__MatMul] h = MatMul (x, w) [fc__Add] y = Add (b, h)", X3, {"w": W, "b": B}, lambda x: x @ W + B,
    ),
    "a bias of one number": (
        "[fc__MatMul] h = MatMul (x, w) [fc__Add] y = Add (h, b)", X3, {"w": W, "b": B[:1]}, lambda x: x @ W + B[:1],
    ),
    "a sum with another value": (
        "[fc__MatMul] h = MatMul (x, w) [fc__Relu] r = Relu (h) [fc__Add] y = Add (h, r)", X3, {"w": W},
        lambda x: x @ W + np.maximum(x @ W, 0),
    ),
    "Gemm": ("[fc__Gemm] y = Gemm (x, w)", X2, {"w": W}, lambda x: x @ W),
    "Gemm with bias": ("[fc__Gemm] y = Gemm (x, w, b)", X2, {"w": W, "b": B}, lambda x: x @ W + B),
    "Gemm with a bias of one row": (
        "[fc__Gemm] y = Gemm (x, w, b)", X2, {"w": W, "b": B[None]}, lambda x: x @ W + B,
    ),
    "Gemm with transB": (
        "[fc__Gemm] y = Gemm <transB: int = 1> (x, w, b)", X2, {"w": WT, "b": B}, lambda x: x @ WT.T + B,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_is_close_to_its_float_form(case: str) -> None:
    body, x, weights, exact = LAYERS[case]
    dims = ", ".join(["n", *map(str, x.shape[1:])])
    model = quantized(f"net (float[{dims}] x) => (float y) {{ {body} }}", **weights)
    model.graph.outputs[0].shape = None
    counts = Counter(node.op_type for node in model.graph)
    assert counts["MatMulNBits"] == 1
    assert not counts["MatMul"] + counts["Gemm"]
    assert all(str(node.name).startswith("fc/") for node in model.graph)
    got = run(model, x=x)
    assert got.shape == exact(x).shape
    assert sqnr_db(exact(x.astype(np.float64)), got) > LEAST_DB


def test_a_bias_is_added_by_the_operator() -> None:
    model = quantized("net (float[n, 80] x) => (float[n, 24] y) { [fc__MatMul] h = MatMul (x, w) "
                      "[fc__Add] y = Add (h, b) }", w=W, b=B)  # fmt: skip
    (node,) = model.graph
    assert [None if i is None else i.name for i in node.inputs][3:] == [None, None, "b"]


def test_blocks_are_quantized_each_with_its_own_scale() -> None:
    weight = normal(70, 5, seed=1)
    weight[:BLOCK] *= 1000
    weight[BLOCK : 2 * BLOCK, 2] = 0
    levels, scale = quantize_in_blocks(weight)
    assert (levels.shape, levels.dtype, scale.shape) == ((5, 3, BLOCK), np.uint8, (5, 3))
    assert levels.min() >= 1
    assert (levels[:, 2, 70 - 2 * BLOCK :] == 128).all(), "what fills up the last block is zero"
    restored = ((levels.astype(np.float64) - 128) * scale[..., None]).reshape(5, -1)[:, :70].T
    assert np.abs(restored - weight).max(axis=1)[BLOCK:].max() <= np.abs(weight[BLOCK:]).max() / 127 / 2 * 1.001
    assert not restored[BLOCK : 2 * BLOCK, 2].any()
    assert scale[2, 1] == 1


def test_the_file_holds_the_weights_in_8_bits() -> None:
    model = quantized("net (float[n, 80] x) => (float[n, 24] y) { [fc__MatMul] y = MatMul (x, w) }", w=W)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    held = {t.dtype: t.nbytes for t in tensors if t is not None}
    assert held == {ir.DataType.UINT8: 24 * 96, ir.DataType.FLOAT: 24 * 3 * 4}


def test_layers_with_activations_per_token_come_to_be_in_blocks() -> None:
    plan = PrecisionPlan(
        (LayerPlan("a", Scheme.PER_TOKEN), LayerPlan("b", Scheme.STATIC), LayerPlan("c", Scheme.FLOAT))
    )
    schemes = [p.scheme for p in weight_only_plan(plan).layers]
    assert schemes == [Scheme.WEIGHT_ONLY, Scheme.STATIC, Scheme.FLOAT]


# -- as a candidate ----------------------------------------------------------------------------------------------------


def test_it_is_an_alternative_of_int8_where_the_runtime_has_the_kernel() -> None:
    canonical = exported("VisionTransformer").canonical
    plan = plan_int8(canonical.model)
    for conditions, offered in ((Conditions(plan=plan, blocks=True), True), (Conditions(plan=plan), False)):
        for precision in (Precision.INT8, Precision.FP32):
            found = [a.suffix for a in onnxruntime_cpu.alternatives(canonical, precision, conditions)]
            assert ("-weights" in found) == (offered and precision is Precision.INT8)


def test_a_whole_model_multiplies_integers_for_the_promised_share(tmp_path: Path) -> None:
    model = exported("PostNormEncoder")
    conditions = Conditions(plan=plan_int8(model.canonical.model), blocks=True)
    offered = onnxruntime_cpu.alternatives(model.canonical, Precision.INT8, conditions)
    arguments = next(a.arguments for a in offered if a.suffix == "-weights")
    lowered = onnxruntime_cpu.lower(model.canonical, Precision.INT8, **arguments)
    assert set(lowered.plan.counts) == {"int8-weights"}
    (path, *_) = save_model(lowered.model, tmp_path / "model.onnx")
    feeds = make_feeds(model.captured.inputs, batch=3, seed=3)
    (expected,) = model.captured.reference(feeds).values()
    (got,) = open_session(Target.ONNXRUNTIME_CPU, path).run(feeds).values()
    assert sqnr_db(expected, got) > 30
    nodes = read_back(Target.ONNXRUNTIME_CPU, path, feeds)
    _, weighted = dtype_shares(nodes, [site.node for site in model.canonical.sites])
    assert share_fault(Target.ONNXRUNTIME_CPU, Precision.INT8, weighted) is None


SCRIPT = """
import sys
from pathlib import Path
from attn_deploy.errors import UnavailableError
from attn_deploy.runtimes import onnxruntime
try:
    onnxruntime.open_session(Path(sys.argv[1]))
except UnavailableError as error:
    print(onnxruntime.multiplies_blocks(), error.what, error.got, error.expected)
else:
    print(onnxruntime.multiplies_blocks())
"""


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_releases_run_it_from_1_22_on_and_older_ones_say_so(release: str, tmp_path: Path) -> None:
    model = quantized("net (float[n, 80] x) => (float[n, 24] y) { [fc__MatMul] y = MatMul (x, w) }", w=W)
    (path, *_) = save_model(model, tmp_path / "model.onnx")
    paths = [str(install(release)), *(str(Path(p).resolve()) for p in sys.path if p)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    old = f"False this ONNX Runtime multiplies no INT8 weights in blocks {release} 1.22 or later"
    assert done.stdout.strip() == ("True" if int(release.split(".")[1]) >= 22 else old)
