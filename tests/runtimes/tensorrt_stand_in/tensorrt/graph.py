"""An ONNX model that ONNX Runtime's CPU provider computes, and what is at each of its values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
TRT_ATTRIBUTES = "TRT_"


class Graph:
    """Node by node, without ONNX Runtime's own fusions: types are rounded to where the model says so."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.inputs = {i.name: i.type.tensor_type for i in model.graph.input}
        self.outputs = {o.name: o.type.tensor_type for o in model.graph.output}
        self._shapes: dict[tuple[Shape, ...], dict[str, tuple[np.dtype[Any], Shape]]] = {}

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        """Raises what ONNX Runtime raises for a model that it does not take."""
        return _session(self.model)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = list(self.outputs)
        return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))

    def values(self, shapes: Mapping[str, Shape]) -> dict[str, tuple[np.dtype[Any], Shape]]:
        """Type and shape of every value of the graph at these shapes of the inputs, seen in a run."""
        key = tuple(tuple(shapes[name]) for name in self.inputs)
        if key not in self._shapes:
            feeds = {name: np.zeros(shapes[name], dtype_of(t.elem_type)) for name, t in self.inputs.items()}
            found = feeds | {i.name: onnx.numpy_helper.to_array(i) for i in self.model.graph.initializer}
            names = list(dict.fromkeys(name for node in self.model.graph.node for name in node.output if name))
            found |= zip(names, self._observing.run(names, feeds), strict=True)
            # ONNX Runtime gives FP8 out as bytes
            fp8 = {o.name for o in self._observing.get_outputs() if o.type == "tensor(float8e4m3fn)"}
            dtypes = {name: np.dtype(ml_dtypes.float8_e4m3fn) if name in fp8 else a.dtype for name, a in found.items()}
            self._shapes[key] = {name: (dtypes[name], array.shape) for name, array in found.items()}
        return self._shapes[key]

    @cached_property
    def _observing(self) -> onnxruntime.InferenceSession:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for name in {name for node in model.graph.node for name in node.output if name} - self.outputs.keys():
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        return _session(model)

    def widened(self) -> Graph:
        """The same model in FP32 where it was in FP16."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        tensors = [*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute if a.HasField("t"))]
        for tensor in tensors:
            if tensor.data_type == HALF:
                wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
        for attribute in (a for node in model.graph.node for a in node.attribute):
            if attribute.name in ("to", "dtype", "softmax_precision") and attribute.i == HALF:
                attribute.i = FLOAT
        del model.graph.value_info[:]
        return Graph(model)


def dtype_of(onnx_type: int) -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(onnx_type)


def dims(tensor: onnx.TypeProto.Tensor) -> list[int | str]:
    """Sizes, or the names of dimensions."""
    return [d.dim_param if d.HasField("dim_param") else d.dim_value for d in tensor.shape.dim]


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        kept = [a for a in node.attribute if not a.name.startswith(TRT_ATTRIBUTES)]
        del node.attribute[:]
        node.attribute.extend(kept)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    return onnxruntime.InferenceSession(plain.SerializeToString(), settings, providers=["CPUExecutionProvider"])
