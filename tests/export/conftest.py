"""Tiny torch modules, captured as the exporter captures a source."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from attn_deploy.export.canonical import portable
from attn_deploy.export.capture import CapturedModel, capture
from attn_deploy.export.interpret import run
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import RewrittenModel, rewrite
from attn_deploy.export.sources import LoadedSource
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.inputs import ExampleInput, make_feeds
from attn_deploy.parity import sqnr_db
from attn_deploy.session import Array, DimBounds

Capture = Callable[..., CapturedModel]


@pytest.fixture
def captured() -> Capture:
    """captured(module, "x=1x6x16", ...): in evaluation mode, with a dynamic batch unless `dims` says otherwise."""
    from attn_deploy.inputs import parse_input

    def make(module: nn.Module, *inputs: str | ExampleInput, dims: dict[str, DimBounds] | None = None) -> CapturedModel:
        described = tuple(parse_input(i) if isinstance(i, str) else i for i in inputs)
        source = LoadedSource("tiny", "tiny", module.eval(), described, "as they are")
        return capture(source, {"batch": DimBounds()} if dims is None else dims)

    return make


Feeds = dict[str, Array]
MIN_SQNR_DB = 100.0


@pytest.fixture
def rewritten(captured: Capture) -> Callable[..., RewrittenModel]:
    """rewritten(module, "x=1x6x16", ...): with the operators in it, and the same numbers as the module at several batch
    sizes, in PyTorch and (with `onnx`) as portable ONNX in ONNX Runtime. `prepare` may change the feeds."""

    def make(
        module: nn.Module,
        *inputs: str | ExampleInput,
        onnx: bool = False,
        prepare: Callable[[Feeds], None] = lambda feeds: None,
    ) -> RewrittenModel:
        model = captured(module, *inputs)
        result = rewrite(model, recognize(model))
        session = _session(result) if onnx else None
        for batch in (1, 2, 3, 5):
            feeds = make_feeds(model.inputs, batch=batch, seed=5)
            prepare(feeds)
            tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
            _require_same(model, feeds, [o.numpy() for o in run(result.program, tensors).outputs])
            if session is not None:
                _require_same(model, feeds, session.run(None, feeds))
        return result

    return make


def _session(model: RewrittenModel) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(portable(to_onnx(model)))
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def _require_same(model: CapturedModel, feeds: Feeds, got: Sequence[Array]) -> None:
    expected = model.reference(feeds)
    for name, value in zip(model.outputs, got, strict=True):
        assert sqnr_db(expected[name], value) >= MIN_SQNR_DB, name
