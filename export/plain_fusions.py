"""What others' tools make of a plain ONNX model for ONNX Runtime, to be measured against: graphs with its own fused
operators. Both look for transformers and leave convolutional networks as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions import optimize_for_ort


def optimized_by_transformers(plain: Path, optimized: Path) -> bool:
    """`onnxruntime.transformers.optimizer` with the recipe for BERT, which it uses for ViT and Swin as well. Whether it
    fused anything; needs onnxruntime."""
    from onnxruntime.transformers.optimizer import optimize_model

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)  # a line for every fusion
    optimize_model(str(plain), model_type="bert", opt_level=1).save_model_to_file(str(optimized))
    return _has_fused_operators(ir.load(optimized))


def fused_by_onnxscript(plain: Path, fused: Path) -> bool:
    """`onnxscript.rewriter.ort_fusions.optimize_for_ort`. Whether it fused anything."""
    model, _ = optimize_for_ort(ir.load(plain))
    ir.save(model, fused)
    return _has_fused_operators(model)


FUSIONS: dict[str, Callable[[Path, Path], bool]] = {
    "transformers": optimized_by_transformers,
    "onnxscript": fused_by_onnxscript,
}


def _has_fused_operators(model: ir.Model) -> bool:
    """What only ONNX Runtime has. Folded constants and the like it does by itself when it loads a model."""
    return any(node.domain == "com.microsoft" for node in model.graph)
