"""The nodes that a site is lowered to, named after it, with shapes that are constants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.insert import Inserter
from attn_deploy.session import Array

FLOAT, BOOL, INT32 = ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.INT32


class Nodes(Inserter):
    """Nodes in front of one node of the graph. Shapes never come from Shape nodes where they need not: those run on the
    host."""

    def __init__(self, model: ir.Model, node: ir.Node, *, named: ir.Node | None = None) -> None:
        """`named`: the node whose name they take, where it is another than the one that they stand before."""
        super().__init__(model, node)
        if named is not None:
            self._prefix = str(named.name)
        self.model = model
        self.node = node
        self._constants = 0

    def const(self, array: Array) -> ir.Value:
        """An initializer with a label of its own."""
        self._constants += 1
        value = self.constant(f"constant_{self._constants}", array)
        value.dtype = ir.DataType.from_numpy(array.dtype)
        value.shape = ir.Shape(array.shape)
        return value

    def ints(self, *numbers: int) -> ir.Value:
        return self.const(np.array(numbers, np.int64))

    def reshape(self, value: ir.Value, *dims: int) -> ir.Value:
        """0 keeps a dimension of `value`, -1 is what is left."""
        return self.op("Reshape", [value, self.ints(*dims)], dtype=value.dtype)

    def take(self, value: ir.Value, numbers: Array, axis: int) -> ir.Value:
        """Gather of constant positions."""
        return self.op("Gather", [value, self.const(numbers.astype(np.int64))], dtype=value.dtype, axis=axis)

    def transpose(self, value: ir.Value, *perm: int) -> ir.Value:
        return self.op("Transpose", [value], dtype=value.dtype, perm=perm)

    def cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        return self.op("Cast", [value], dtype=kind, to=int(kind))

    def where(self, condition: ir.Value, kept: ir.Value, other: ir.Value) -> ir.Value:
        return self.op("Where", [condition, kept, other], dtype=kept.dtype or other.dtype)

    def thirds(self, packed: ir.Value, axis: int) -> tuple[ir.Value, ...]:
        """Three equal parts of `packed` along `axis`."""
        return self._parts(packed, 3, axis=axis, num_outputs=3)

    def split(self, value: ir.Value, widths: Sequence[int]) -> tuple[ir.Value, ...]:
        """Parts of `value` along its last axis."""
        return self._parts(value, len(widths), self.ints(*widths), axis=-1)

    def _parts(self, value: ir.Value, count: int, *sizes: ir.Value, **attributes: int) -> tuple[ir.Value, ...]:
        self._count += 1
        name = f"{self._prefix}/Split_{self._count}"
        outputs = [ir.Value(name=f"{name}_part_{part}", type=ir.TensorType(FLOAT)) for part in range(count)]
        node = ir.node("Split", [value, *sizes], attributes, outputs=outputs, name=name)
        self.model.graph.insert_before(self.node, node)
        return tuple(outputs)


def constant_of(value: ir.Value | None) -> Array | None:
    """The array of an initializer, None for anything that is computed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def static(value: ir.Value, axis: int) -> int | None:
    """A dimension that is a number, None where it is a symbol or unknown."""
    if value.shape is None:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def dims(value: ir.Value) -> Sequence[int | str | None]:
    """Numbers, and symbols by their names."""
    shape = value.shape or ()
    return [d if isinstance(d, int) else d.value for d in shape]


def same_dim(first: ir.Value, second: ir.Value, axis: int) -> bool:
    """Both are the same number, or the same symbol."""
    one, other = dims(first)[axis], dims(second)[axis]
    return one is not None and one == other
