"""Tiny torch modules, captured as the exporter captures a source."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from attn_deploy.export.capture import CapturedModel, capture
from attn_deploy.export.sources import LoadedSource
from attn_deploy.inputs import ExampleInput
from attn_deploy.session import DimBounds

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
