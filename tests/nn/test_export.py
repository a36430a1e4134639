"""Every module of attn_deploy.nn goes through the exporter: its attentions are found, and ONNX gives its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import attn_deploy.nn
from attn_deploy.export.canonical import portable
from attn_deploy.export.capture import CapturedModel, capture
from attn_deploy.export.initializer import initialize
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import RewrittenModel, rewrite
from attn_deploy.export.sources import LoadedSource
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.inputs import make_feeds
from attn_deploy.parity import FP32_MIN_SQNR_DB, sqnr_db
from attn_deploy.session import DimBounds


@dataclass(frozen=True)
class Exported:
    captured: CapturedModel
    rewritten: RewrittenModel
    canonical: onnxruntime.InferenceSession
    portable: onnxruntime.InferenceSession


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(case: Any) -> Exported:
    """With a dynamic batch, and with weights under which every attention matters where there are weights."""
    module = case.module()
    if any(True for _ in module.parameters()):
        initialize(module, case.tensors(batch=2, seed=1))
    source = LoadedSource(case.name, case.name, module.eval(), case.inputs, "as they are")
    captured = capture(source, {"batch": DimBounds()})
    rewritten = rewrite(captured, recognize(captured))
    canonical = to_onnx(rewritten)
    return Exported(captured, rewritten, session(canonical.model), session(portable(canonical)))


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_gives_what_pytorch_gives(exported: Exported, batch: int) -> None:
    feeds = make_feeds(exported.captured.inputs, batch=batch, seed=5)
    expected = exported.captured.reference(feeds)["output"]
    assert np.ptp(expected) > 0.1, "a reference that hardly varies proves nothing"
    for opened in (exported.canonical, exported.portable):
        assert sqnr_db(expected, opened.run(None, feeds)[0]) >= FP32_MIN_SQNR_DB


def test_the_expected_attentions_are_found_and_no_other(case: Any, exported: Exported) -> None:
    rewritten = exported.rewritten
    assert [(s.kind, s.module, s.reason) for s in rewritten.skipped] == []
    assert tuple((s.kind, s.module) for s in rewritten.sites) == case.sites
    assert [s.node for s in rewritten.sites if not s.proven] == []


def test_every_module_is_a_case(cases: Any) -> None:
    assert {type(case.module()).__name__ for case in cases} == set(attn_deploy.nn.__all__)
