"""How calibration runs models: an opener that the pipeline hands in, and the data as batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir

from attn_deploy.session import Array

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
OpenModel = Callable[[ir.Model], Run]
"""Opens an ONNX model for running; the pipeline hands it in, since this package opens no runtime."""

Batches = Callable[[], Iterable[Mapping[str, Array]]]
"""Calibration feeds; called once for each pass over them, of which each begins with the same samples."""
