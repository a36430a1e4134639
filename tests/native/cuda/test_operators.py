"""The CUDA operators as ONNX Runtime sees them: types, shapes, errors; what the library exports."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from attn_deploy.ops import FORMS
from attn_deploy.runtimes.native import cuda

MakeModel = Callable[..., bytes]
OpenModel = Callable[..., Any]

QKV = np.ones((1, 6, 3, 2, 8), np.float32)
INDEX = np.arange(6).reshape(2, 3)
BIAS = np.zeros((1, 2, 3, 3), np.float32)
WINDOWS = {"qkv": QKV, "index": INDEX, "windows_bias": BIAS, "bias_index": np.zeros(2, np.int64)}
SCALE = {"scale": 0.5, "tokens": 6}
ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}


def test_every_operator_is_a_form_with_the_inputs_and_outputs_it_has(
    emulated: Path, make_model: MakeModel, open_model: OpenModel
) -> None:
    names = cuda.library_operators(emulated)
    expected = {name for name, f in FORMS.items() if f.operator in {"PackedAttention", "Gate", "ChannelPool"}}
    assert set(names) == expected
    for name in names:
        values = {"scale": 1.0, "softcap": 5.0, "tokens": 6}
        model = make_model(name, "float16", {a: values[a] for a in FORMS[name].attributes})
        assert len(open_model(model, emulated).get_outputs()) == len(FORMS[name].outputs)


def test_what_the_library_says_of_itself(emulated: Path) -> None:
    assert cuda.library_architectures(emulated) == ("emulated",)
    assert cuda.library_version(emulated) == "0"


def test_the_limit_of_head_dim_is_the_kernels() -> None:
    header = (Path(cuda.__file__).parent / "packed_attention.h").read_text()
    assert f"kMaxHeadDim = {cuda.MAX_HEAD_DIM};" in header


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("form", "shape", "expected"),
    [
        ("PackedAttentionIndexedBias", ["batch", 6, 3, 2, 8], [["batch", 6, 16]]),
        ("PackedAttentionIndexedBias", ["batch", 6, 3, "heads", 8], [[]]),
        ("GateRelu", ["batch", 4, "height", 8], [["batch", 4, "height", 8]]),
        ("ChannelPoolMeanMax", ["batch", 4, 7, 7], [["batch", 4, 1, 1], ["batch", 4, 1, 1]]),
    ],
)
def test_the_graph_knows_type_and_shape(
    make_model: MakeModel, open_model: OpenModel, emulated: Path, form: str, shape: Any, expected: Any, dtype: str
) -> None:
    attributes = {name: SCALE[name] for name in FORMS[form].attributes}
    model = onnx.load_from_string(make_model(form, dtype, attributes, shapes={"qkv": shape, "x": shape}))
    casts = [node for node in model.graph.node if node.output[0] in FORMS[form].outputs]
    for output, cast in zip(model.graph.output, casts, strict=True):  # what the node itself makes
        output.name = cast.input[0]
        output.type.tensor_type.elem_type = ELEMENT_TYPES[dtype]
        model.graph.node.remove(cast)
    outputs = open_model(model.SerializeToString(), emulated).get_outputs()
    assert [output.shape for output in outputs] == expected
    assert {output.type for output in outputs} == {f"tensor({dtype.replace('float32', 'float')})"}


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        pytest.param(
            {"qkv": np.ones((1, 6, 2, 2, 8))}, ["[1,6,2,2,8]", "[batch, tokens, 3, heads, head_dim]"], id="qkv"
        ),
        pytest.param({"qkv": np.ones((1, 6, 3, 1, 129))}, ["[1,6,3,1,129]", "head_dim of 1 to 128"], id="head_dim"),
        pytest.param({"qkv": np.ones((1, 7, 3, 2, 8))}, ["7 tokens", "expected 6"], id="tokens"),
        pytest.param({"index": np.arange(4).reshape(2, 2)}, ["index", "[2,2]", "of 6 tokens"], id="index"),
        pytest.param({"windows_bias": np.zeros((1, 2, 3, 4))}, ["windows_bias", "[1,2,3,4]", "[1,2,3,3]"], id="bias"),
        pytest.param({"windows_bias": np.zeros((0, 2, 3, 3))}, ["windows_bias", "[0,2,3,3]"], id="no-bias"),
        pytest.param({"bias_index": np.zeros(3, np.int64)}, ["bias_index", "[3]", "[2]"], id="bias_index"),
    ],
)
def test_wrong_shapes_are_errors_with_the_node_and_the_shapes(
    make_model: MakeModel, open_model: OpenModel, emulated: Path, changed: dict[str, np.ndarray], parts: list[str]
) -> None:
    form = "PackedAttentionIndexedBias"
    session = open_model(make_model(form, "float16", SCALE, node_name="layers.0/attention"), emulated)
    wrong = {**WINDOWS, **{n: v if v.dtype == np.int64 else v.astype(np.float32) for n, v in changed.items()}}
    with pytest.raises(Exception, match=f"{form} node 'layers.0/attention'") as caught:
        session.run(None, wrong)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert session.run(None, WINDOWS)[0].shape == (1, 6, 16)  # the session is none the worse for it


@pytest.mark.parametrize(
    ("form", "index", "complaint"),
    [
        ("PackedAttentionIndexed", [[0, 1, 2], [3, 4, 6]], "index holds 6; expected 0 to 5"),
        ("PackedAttentionIndexed", [[0, 1, 2], [3, 4, -1]], "index holds -1; expected 0 to 5"),
        ("PackedAttentionIndexed", [[0, 1, 2], [3, 4, 4]], "token 4 twice"),
        ("PackedAttentionIndexedPadded", [[0, 1, 2], [3, 4, -2]], "index holds -2; expected -1 to 5"),
    ],
)
def test_a_constant_index_map_is_checked_when_the_session_opens(
    make_model: MakeModel, open_model: OpenModel, emulated: Path, form: str, index: list[list[int]], complaint: str
) -> None:
    with pytest.raises(Exception, match=complaint):
        open_model(make_model(form, "float16", SCALE, constants={"index": np.array(index)}), emulated)


@pytest.mark.parametrize("missing_token", [False, True])
def test_a_constant_index_map_gives_what_a_computed_one_does(
    make_model: MakeModel, open_model: OpenModel, emulated: Path, missing_token: bool
) -> None:
    """Where a constant leaves no token out, the output is not cleared first."""
    rng = np.random.default_rng(0)
    index = np.array([[5, 3, -1], [0, 2, 1], [-1, -1, -1 if missing_token else 4]])
    feeds = {"qkv": rng.standard_normal(QKV.shape, np.float32), "fill": rng.standard_normal((3, 2, 8), np.float32)}
    form = "PackedAttentionIndexedPadded"
    computed = open_model(make_model(form, "float32", SCALE), emulated).run(None, {**feeds, "index": index})[0]
    constant = open_model(make_model(form, "float32", SCALE, constants={"index": index}), emulated).run(None, feeds)[0]
    np.testing.assert_array_equal(constant, computed)
    assert (constant[0, 4] == 0).all() == missing_token


def test_one_type_for_all_operands(make_model: MakeModel, open_model: OpenModel, emulated: Path) -> None:
    """ONNX Runtime merges the operator's types into one schema; a node that mixes them has no kernel."""
    model = onnx.load_from_string(make_model("Gate", "float16"))
    model.graph.node[1].attribute[0].i = onnx.TensorProto.FLOAT  # the cast of gate
    with pytest.raises(Exception, match=r"(?i)gate|not.implemented|kernel"):
        open_model(model.SerializeToString(), emulated)


def test_a_session_takes_one_of_the_two_libraries(make_model: MakeModel, emulated: Path, library: Path) -> None:
    """ONNX Runtime refuses a domain that comes twice: whoever opens sessions must choose."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(emulated))
    options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match="Domain already set in registry"):
        onnxruntime.InferenceSession(make_model("Gate", "float32"), options, providers=["CPUExecutionProvider"])


def test_kernels_that_do_not_start_are_errors_with_the_node(
    make_model: MakeModel, open_model: OpenModel, emulated: Path
) -> None:
    session = open_model(make_model("PackedAttentionMask", "float16", {"scale": 1.0}), emulated)
    functions = ctypes.CDLL(str(emulated))
    feeds = {"qkv": QKV, "mask": np.ones((1, 1, 6, 6), bool)}
    functions.emulation_fail_launches(1)
    try:
        with pytest.raises(Exception, match=r"node 'block/attention': the kernel did not start: invalid argument"):
            session.run(None, feeds)
    finally:
        functions.emulation_fail_launches(0)
    assert np.isfinite(session.run(None, feeds)[0]).all()


def test_the_exports_listed_in_both_builds_are_those_of_the_source() -> None:
    folder = Path(cuda.__file__).parent
    exported = set(re.findall(r"ATTN_DEPLOY_EXPORT .*?(\w+)\(", (folder / "register.cc").read_text()))
    assert exported == {
        "RegisterCustomOps", "attn_deploy_cuda_architectures", "attn_deploy_cuda_operators", "attn_deploy_cuda_version",
    }  # fmt: skip
    for build in ("build.py", "CMakeLists.txt"):
        assert "{ global: RegisterCustomOps; attn_deploy_cuda_*; local: *; };" in (folder / build).read_text()


def test_status_without_a_library_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_folders", lambda: iter([tmp_path]))
    status = cuda.status()
    assert (status.available, status.path, status.operators) == (False, None, ())
    assert status.reason == "not built; next: python -m attn_deploy.runtimes.native.cuda.build"
    assert cuda.kernel_names() == ()


def test_a_library_is_found_and_one_that_does_not_load_is_said(
    tmp_path: Path, emulated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_folders", lambda: iter([tmp_path]))
    (tmp_path / cuda.FILE_NAME).write_text("not a library")
    assert "does not load" in str(cuda.status().reason)
    (tmp_path / cuda.FILE_NAME).unlink()
    (tmp_path / cuda.FILE_NAME).symlink_to(emulated)
    status = cuda.status()
    assert status.available
    assert "PackedAttentionIndexedBias" in status.operators


def test_the_cache_is_named_after_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cuda.cache_folder()
    assert folder.parent == tmp_path / "attn-deploy" / "cuda"
    compiled, headers = cuda.sources()
    monkeypatch.setattr(cuda, "sources", lambda: (compiled[1:], headers))
    assert cuda.cache_folder() != folder


def test_both_builds_compile_the_same_sources() -> None:
    """What is compiled is what CMake and build.py compile: all .cu and .cc of the folder, three of the one above."""
    compiled, _ = cuda.sources()
    text = (Path(cuda.__file__).parent / "CMakeLists.txt").read_text()
    for file in compiled:
        assert file.parent.name == "cuda" or f"../{file.name}" in text


def test_the_build_command_says_what_nvcc_said_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attn_deploy.errors import UnavailableError
    from attn_deploy.runtimes.native.cuda import build

    monkeypatch.setattr(build, "_candidates", lambda: iter([tmp_path / "nvcc"]))
    with pytest.raises(UnavailableError, match="no CUDA compiler") as caught:
        build.build(tmp_path)
    assert "pip install nvidia-cuda-nvcc" in str(caught.value)
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'kernel.cu(1): error: no'\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    with pytest.raises(UnavailableError, match="could not compile") as caught:
        build.build(tmp_path / "out", ["90"])
    assert "error: no" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_both_builds_have_the_same_architectures() -> None:
    from attn_deploy.runtimes.native.cuda import build

    text = (Path(cuda.__file__).parent / "CMakeLists.txt").read_text()
    assert f"set(CMAKE_CUDA_ARCHITECTURES {' '.join(build.ARCHITECTURES)})" in text
    flags = build.compile_command(build.Compiler(Path("nvcc")), Path("/tmp") / "x.so", ("75-real", "90"))
    assert "arch=compute_75,code=[sm_75]" in flags
    assert "arch=compute_90,code=[sm_90,compute_90]" in flags
