"""Small models lowered to what the library has, and run by it: the numbers of PyTorch, and nothing left to bodies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest

from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.lower.cpu_units import LEVELS
from attn_deploy.export.precision import fp16
from attn_deploy.export.precision.plan import plan_int8
from attn_deploy.export.site_parity import record_sites, site_cases
from attn_deploy.inputs import make_feeds
from attn_deploy.ops import DOMAIN
from attn_deploy.parity import sqnr_db
from attn_deploy.precision_plan import Scheme
from attn_deploy.readback import dtype_shares, site_runs
from attn_deploy.runtimes import native
from attn_deploy.runtimes.onnxruntime_profile import profiled_nodes
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))  # for cpu_models

from cpu_models import MODELS, TRANSFORMERS, exported

MIN_DB = 105.0


@pytest.fixture(scope="module")
def kernels(library: Path) -> frozenset[str]:
    return frozenset(native.library_operators(library))


def open_session(
    content: bytes, library: Path, threads: int = 2, profile_to: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "stock"])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_give_what_pytorch_gives(name: str, level: str, library: Path, kernels: frozenset[str]) -> None:
    model = exported(name)
    lowered = model.lower(level, kernels)
    session = open_session(ir.to_proto(lowered).SerializeToString(), library)
    for batch in (1, 3):
        feeds = make_feeds(model.captured.inputs, batch=batch, seed=3)
        got = session.run(None, feeds)
        for expected, value in zip(model.captured.reference(feeds).values(), got, strict=True):
            assert sqnr_db(expected, value) > MIN_DB
    for case in site_cases(model.canonical, lowered, record_sites(model.rewritten)):
        alone = open_session(case.model, library).run(None, dict(case.feeds))[0]
        assert sqnr_db(case.expected, alone.reshape(case.expected.shape)) > MIN_DB


@pytest.mark.parametrize("name", [model.__name__ for model in TRANSFORMERS])
def test_every_operator_of_ours_runs_as_a_kernel(
    name: str, library: Path, kernels: frozenset[str], tmp_path: Path
) -> None:
    model = exported(name)
    lowered = model.lower(None, kernels)
    session = open_session(ir.to_proto(lowered).SerializeToString(), library, profile_to=tmp_path / "profile")
    feeds = make_feeds(model.captured.inputs, batch=2, seed=3)
    session.run(None, feeds)
    nodes = profiled_nodes(json.loads(Path(session.end_profiling()).read_text()))
    ours = {str(n.name): n.op_type for n in lowered.graph if n.domain == DOMAIN}
    assert {n.name: n.op_type for n in nodes if n.name in ours} == ours
    assert not {"MatMul", "Gemm", "Softmax"} & {n.op_type for n in nodes}
    runs = site_runs([(site.module, site.node) for site in model.canonical.sites], nodes)
    assert all(run.implementation.startswith("native:") for run in runs)
    everything, weighted = dtype_shares(nodes, [site.node for site in model.canonical.sites])
    assert everything == weighted == {"float32": 1.0}


@pytest.mark.parametrize("name", [model.__name__ for model in TRANSFORMERS])
def test_weights_that_are_stored_in_fp16_meet_the_same_kernels(
    name: str, library: Path, kernels: frozenset[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime casts them when the session opens, and kernels are made with the constants that it got."""
    monkeypatch.setattr(fp16, "MIN_ELEMENTS", 64)  # these models are small
    model = exported(name)
    feeds = make_feeds(model.captured.inputs, batch=2, seed=3)
    ran: dict[Precision, list[tuple[str, str]]] = {}
    for precision in (Precision.FP32, Precision.FP16):
        lowered = onnxruntime_cpu.lower(model.canonical, precision, native=kernels).model
        stored = {v.const_value.dtype for v in lowered.graph.initializers.values() if v.const_value is not None}
        assert (ir.DataType.FLOAT16 in stored) == (precision is Precision.FP16)
        session = open_session(ir.to_proto(lowered).SerializeToString(), library, profile_to=tmp_path / precision)
        for expected, value in zip(model.captured.reference(feeds).values(), session.run(None, feeds), strict=True):
            assert sqnr_db(expected, value) > 50
        nodes = profiled_nodes(json.loads(Path(session.end_profiling()).read_text()))
        ran[precision] = [(node.name, node.op_type) for node in nodes]
    assert ran[Precision.FP16] == ran[Precision.FP32]


@pytest.mark.parametrize("way", ["linear", "block"])
@pytest.mark.parametrize("name", [model.__name__ for model in TRANSFORMERS])
def test_kernels_in_int8_give_what_their_bodies_give(
    name: str, way: str, library: Path, kernels: frozenset[str], tmp_path: Path
) -> None:
    """Nearly: where float32 rounds another way, a level is another one."""
    model = exported(name)
    plan = plan_int8(model.canonical.model)
    plan = plan.restricted(plan.of(Scheme.PER_TOKEN))
    fuse: dict[str, str] | None = {} if way == "linear" else None
    lowered = onnxruntime_cpu.lower(model.canonical, Precision.INT8, native=kernels, fuse=fuse, plan=plan).model
    bodies = onnxruntime_cpu.lower(model.canonical, Precision.INT8, plan=plan).model
    feeds = make_feeds(model.captured.inputs, batch=3, seed=3)
    session = open_session(ir.to_proto(lowered).SerializeToString(), library, profile_to=tmp_path / "profile")
    got = session.run(None, feeds)
    expected = open_session(ir.to_proto(bodies).SerializeToString(), library).run(None, feeds)
    for reference, alike, value in zip(model.captured.reference(feeds).values(), expected, got, strict=True):
        assert sqnr_db(reference, value) > 40
        assert sqnr_db(alike, value) > 45
    nodes = profiled_nodes(json.loads(Path(session.end_profiling()).read_text()))
    ours = {str(n.name): n.op_type for n in lowered.graph if n.domain == DOMAIN}
    assert {n.name: n.op_type for n in nodes if n.name in ours} == ours
    assert not {"MatMulInteger", "QuantizeLinear"} & {n.op_type for n in nodes}
    _, weighted = dtype_shares(nodes, [site.node for site in model.canonical.sites])
    work = {p.layer for p in plan.layers} - set(plan.quantized)
    assert weighted["int8"] == 1.0 if not work else 0.75 < weighted["int8"] < 1.0
