"""The loss of a half graph block by block, on the reference's values; blocks that lose too much go back to FP32.

All blocks are measured in one session: a graph of the FP32 reference, in which each block of the emulated half graph
stands beside its reference, fed with the reference's values, and gives two sums, of the squared signal and of the
squared noise. A batch returns two numbers per block, and the memory does not grow with samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.blocks import Block, Blocks, pair_blocks
from attn_deploy.export.cut import Cutter, Part
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.emulate import emulate
from attn_deploy.export.precision.half import HalfPlan, to_half
from attn_deploy.export.precision.half_rules import HalfKernels
from attn_deploy.export.precision.half_types import HALF_TYPES
from attn_deploy.parity import EXACT_DB
from attn_deploy.session import Array
from attn_deploy.target import Precision

BLOCK_MIN_SQNR_DB = {Precision.FP16: 45.0, Precision.BF16: 35.0}
"""Of each block on the reference's values, and of the whole model."""

LOSS_BATCHES = 2
"""Each round measures all blocks on them, and rounds may be many; how much a block's loss differs between samples was
not measured."""

AT_ONCE = 0.125
"""Share of the blocks that go back in one round when each holds alone and the whole does not: the worst first."""


@dataclass(frozen=True)
class Reference:
    """What the half graph was lowered from: `portable` is `canonical` with its bodies inlined, FP32; `sites` are the
    names of the sites' operators."""

    canonical: ir.Model
    portable: ir.Model
    sites: Collection[str]


@dataclass(frozen=True)
class BlockLoss:
    """One block, which makes `value` from `inputs`, on the reference's values. `nodes` are those of the graph that
    `to_half` was given. `kept`: it went back to FP32, and `sqnr_db` is what it had before; `reason` says why."""

    module: str
    value: str
    inputs: tuple[str, ...]
    nodes: tuple[str, ...]
    sqnr_db: float
    kept: bool = False
    reason: str = ""


@dataclass(frozen=True)
class HalfLoss:
    """`outputs`: SQNR by output of the model, from its inputs on. `holds`: no block and no output is below the
    floor."""

    plan: HalfPlan
    rows: tuple[BlockLoss, ...]
    outputs: dict[str, float]
    floor_db: float

    @property
    def holds(self) -> bool:
        blocks = all(row.kept or row.sqnr_db >= self.floor_db for row in self.rows)
        return blocks and all(db >= self.floor_db for db in self.outputs.values())


def half_within(
    model: ir.Model,
    precision: Precision,
    magnitudes: Mapping[str, float],
    reference: Reference,
    batches: Callable[[], Iterable[Mapping[str, Array]]],
    open_model: OpenModel,
    *,
    keep: Collection[str] = (),
    kernels: HalfKernels | None = None,
    floor_db: float | None = None,
) -> tuple[ir.Model, HalfLoss]:
    """The half graph of `model` (left as it is) in which no block loses more than its floor, as far as there is one.

    Blocks below the floor go back to FP32. One that loses too much even then, since it is given what is rounded, takes
    those with it that make its inputs. When every block holds alone and the model does not, the worst go back, until it
    holds or nothing is left. Ranges, masks and rules are those of `to_half`.
    """
    floor = BLOCK_MIN_SQNR_DB[precision] if floor_db is None else floor_db
    names = {str(node.name) for node in model.graph}
    kept: dict[str, BlockLoss] = {}
    while True:
        half = model.clone()
        lossy = {name: row.reason for row in kept.values() for name in row.nodes}
        plan = to_half(half, precision, magnitudes, keep=keep, lossy=lossy, kernels=kernels)
        rows, outputs = measure(half, precision, reference, batches(), open_model, names)
        starved = [row for row in rows if row.value in kept and row.sqnr_db < floor]
        half_rows = [row for row in rows if row.value not in kept and _has_half(row, plan)]
        worst = _to_put_back(half_rows, starved, outputs, floor)
        if not worst:
            shown = tuple(kept.get(row.value, row) for row in rows)
            return half, HalfLoss(plan, shown, outputs, floor)
        kept.update((row.value, row) for row in worst)


def _has_half(row: BlockLoss, plan: HalfPlan) -> bool:
    kept = {k.node for k in plan.kept}
    return any(name not in kept for name in row.nodes)


def _to_put_back(
    rows: Sequence[BlockLoss], starved: Sequence[BlockLoss], outputs: Mapping[str, float], floor_db: float
) -> list[BlockLoss]:
    """Of `rows`, which are half; `starved` went back before and are still below the floor."""
    asked = f"{floor_db:g} dB or more is asked"
    below = [row for row in rows if row.sqnr_db < floor_db]
    if below:
        return [_put_back(row, f"{row.sqnr_db:.1f} dB alone, {asked}") for row in below]
    feeding = {name: row for row in starved for name in row.inputs}
    sources = [row for row in rows if row.value in feeding]
    if sources:
        readers = [feeding[row.value] for row in sources]
        return [
            _put_back(
                row, f"{reader.module or reader.value} has {reader.sqnr_db:.1f} dB on its rounded result, {asked}"
            )
            for row, reader in zip(sources, readers, strict=True)
        ]
    whole = min(outputs.values(), default=EXACT_DB)
    if whole >= floor_db:
        return []
    lossy = sorted((row for row in rows if row.sqnr_db < EXACT_DB), key=lambda row: row.sqnr_db)
    count = max(1, int(len(lossy) * AT_ONCE))
    reason = f"alone; the whole model has {whole:.1f} dB, {asked}"
    return [_put_back(row, f"{row.sqnr_db:.1f} dB {reason}") for row in lossy[:count]]


def _put_back(row: BlockLoss, reason: str) -> BlockLoss:
    return replace(row, kept=True, reason=reason)


def measure(
    half: ir.Model,
    precision: Precision,
    reference: Reference,
    batches: Iterable[Mapping[str, Array]],
    open_model: OpenModel,
    names: Collection[str] | None = None,
) -> tuple[list[BlockLoss], dict[str, float]]:
    """SQNR of every block of `half` on the reference's values, in the order of the graph, and of the model's outputs.

    The first LOSS_BATCHES of `batches` are read. `names`: the nodes that rows may name; all of the half graph's when
    left out.
    """
    emulated = emulate(half)
    blocks = pair_blocks(emulated, reference.portable, reference.canonical, reference.portable, reference.sites)
    halves = {str(o.name): o.dtype for node in half.graph for o in node.outputs}
    side_by_side = _SideBySide(reference.portable, HALF_TYPES[precision], halves)
    for block in blocks.in_order:
        side_by_side.add_block(block, blocks)
    whole = [str(o.name) for o in emulated.graph.outputs]
    side_by_side.add_whole(emulated)
    run = open_model(side_by_side.model())
    count = len(blocks.in_order) + len(whole)
    signal, noise = np.zeros(count), np.zeros(count)
    samples = 0
    for feeds in itertools.islice(batches, LOSS_BATCHES):
        sums = run(feeds)
        samples += 1
        signal += [float(sums[f"loss/{k}/signal"]) for k in range(count)]
        noise += [float(sums[f"loss/{k}/noise"]) for k in range(count)]
    if not samples:
        raise AttnDeployError("the loss of blocks was asked for without any sample", got=0, expected="at least 1")
    decibels = [_decibel(s, n) for s, n in zip(signal, noise, strict=True)]
    rows = [
        BlockLoss(block.module, block.value, block.candidate.input_names, _names(block, names), db)
        for block, db in zip(blocks.in_order, decibels, strict=False)
    ]
    return rows, dict(zip(whole, decibels[len(rows) :], strict=True))


def _names(block: Block, names: Collection[str] | None) -> tuple[str, ...]:
    made = (str(node.name) for node in block.candidate.nodes)
    return tuple(name for name in made if names is None or name in names)


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return EXACT_DB
    if not np.isfinite(noise) or not np.isfinite(signal) or signal == 0:
        return -EXACT_DB
    return float(np.clip(10 * np.log10(signal / noise), -EXACT_DB, EXACT_DB))


class _SideBySide:
    """The reference with blocks of another graph beside its own."""

    def __init__(self, reference: ir.Model, half: ir.DataType, halves: Mapping[str, ir.DataType | None]) -> None:
        self._model = reference.clone()
        self._half, self._halves = half, halves
        graph = self._model.graph
        self._inputs = {str(i.name): i for i in graph.inputs}
        self._values = self._inputs | {str(o.name): o for node in graph for o in node.outputs}
        self._outputs = {str(o.name): o for o in graph.outputs}
        self._constants: dict[ir.Value, ir.Value] = {}
        self._rounded: dict[str, ir.Value] = {}
        self._sums: list[ir.Value] = []

    def model(self) -> ir.Model:
        self._model.graph.outputs.clear()
        self._model.graph.outputs.extend(self._sums)
        return self._model

    def add_block(self, block: Block, blocks: Blocks) -> None:
        partners = {value: partner for partner, value in blocks.partners.items()}
        given = {v: self._given(str(v.name), self._values[partners[str(v.name)]]) for v in block.candidate.inputs}
        result = self._copy(block.candidate, blocks.candidate.model, given)
        self._compare(self._values[block.partner], result)

    def add_whole(self, emulated: ir.Model) -> None:
        """The whole graph from its inputs on, against the outputs of the same names."""
        cutter = Cutter(emulated)
        copies: dict[ir.Value, ir.Value] = {i: self._inputs[str(i.name)] for i in emulated.graph.inputs}
        for output in emulated.graph.outputs:
            part = cutter.part(output, ())
            result = self._copy(part, emulated, copies)
            self._compare(self._outputs[str(output.name)], result)

    def _given(self, name: str, value: ir.Value) -> ir.Value:
        """What the half graph would be given: rounded where it is half there."""
        if self._halves.get(name) != self._half:
            return value
        if name not in self._rounded:
            narrow = self._node("Cast", [value], to=int(self._half))
            self._rounded[name] = self._node("Cast", [narrow], to=int(ir.DataType.FLOAT))
        return self._rounded[name]

    def _node(self, operator: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        number = len(self._model.graph)
        node = ir.node(operator, list(inputs), attributes, name=f"loss/{operator}_{number}")
        node.outputs[0].name = f"loss/{operator}_{number}_output"
        self._model.graph.append(node)
        return node.outputs[0]

    def _copy(self, part: Part, model: ir.Model, copies: dict[ir.Value, ir.Value]) -> ir.Value:
        """The part's nodes behind the reference's, under names of their own; `copies` grows by what they make."""
        graph = self._model.graph
        graph.opset_imports.update({d: v for d, v in model.opset_imports.items() if d not in graph.opset_imports})
        graph.opset_imports[""] = max(graph.opset_imports[""], model.opset_imports[""])
        for constant in part.constants:
            copies[constant] = self._constant(constant)
        for node in part.nodes:
            if all(o in copies for o in node.outputs):
                continue
            number = len(graph)
            outputs = [  # an output without a name is one that the node leaves out
                ir.Value(name=o.name and f"loss/{number}/{o.name}", shape=o.shape, type=o.type) for o in node.outputs
            ]
            copies.update(zip(node.outputs, outputs, strict=True))
            inputs = [None if i is None else copies[i] for i in node.inputs]
            graph.append(
                ir.Node(
                    node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=outputs,
                    name=f"loss/{number}/{node.name}",
                )
            )  # fmt: skip
        return copies[part.result]

    def _constant(self, constant: ir.Value) -> ir.Value:
        if constant not in self._constants:
            name = f"loss/{constant.name}"
            value = ir.Value(name=name, const_value=constant.const_value, type=constant.type, shape=constant.shape)
            self._model.graph.register_initializer(value)
            self._constants[constant] = value
        return self._constants[constant]

    def _compare(self, reference: ir.Value, value: ir.Value) -> None:
        """Sums of squares in float64."""
        number = len(self._sums) // 2
        exact = self._node("Cast", [reference], to=int(ir.DataType.DOUBLE))
        difference = self._node("Sub", [exact, self._node("Cast", [value], to=int(ir.DataType.DOUBLE))])
        for kind, operand in (("signal", exact), ("noise", difference)):
            total = self._node("ReduceSum", [self._node("Mul", [operand, operand])], keepdims=0)
            total.name, total.shape = f"loss/{number}/{kind}", ir.Shape([])
            total.type = ir.TensorType(ir.DataType.DOUBLE)
            self._sums.append(total)
