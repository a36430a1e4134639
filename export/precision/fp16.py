"""FP16 as storage: weights are kept in half precision and turned to FP32 when the session opens.

No x86 kernel of ONNX Runtime multiplies in FP16, so that is all that `fp16` can mean there: half the file, no speed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.insert import Inserter

MIN_ELEMENTS = 1024
"""Small tensors (norms, biases, scales) stay FP32: they are few bytes, and precision is cheap there."""

LARGEST = float(np.finfo(np.float16).max)


def store_fp16(model: ir.Model) -> tuple[str, ...]:
    """Stores large weights in FP16, in place; returns the names of those that FP16 cannot hold and that stay FP32."""
    kept = []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.dtype != ir.DataType.FLOAT or tensor.size < MIN_ELEMENTS:
            continue
        array = tensor.numpy()
        if float(np.abs(array).max()) > LARGEST:
            kept.append(name)
            continue
        half = ir.Value(name=f"{name}/fp16", const_value=ir.tensor(array.astype(np.float16), name=f"{name}/fp16"))
        model.graph.register_initializer(half)
        insert = Inserter(model, next(iter(model.graph)), name)
        restored = insert.op("Cast", [half], dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        value.replace_all_uses_with(restored)
        del model.graph.initializers[name]
        restored.name = name
        producer = restored.producer()
        assert producer is not None
        producer.name = f"{name}/Cast"
    return tuple(kept)
