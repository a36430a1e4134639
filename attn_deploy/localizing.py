"""Which module of a candidate went wrong first: each of its blocks alone, fed with the reference's values.

Nothing is added to the candidate: its blocks are small models, cut between values that it has in common with the
reference (`attn_deploy.export.blocks`), and run in the candidate's own runtime. A block that is given what the
reference has and returns something else is at fault itself, whatever came before it.
"""

from __future__ import annotations

import heapq
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from attn_deploy import runtimes
from attn_deploy.built import Built
from attn_deploy.bundle import CANONICAL, PORTABLE
from attn_deploy.extras import require_export
from attn_deploy.inputs import feeds_batch
from attn_deploy.parity import EXACT_DB, FP16_MIN_SQNR_DB, FP32_MIN_SQNR_DB, Case, Moments, sqnr_db
from attn_deploy.receipt import MAIN, CaseParity, Fidelity
from attn_deploy.session import Array
from attn_deploy.target import Precision, Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from attn_deploy.export.blocks import Block, Blocks

LOCAL_MIN_SQNR_DB = {Precision.FP32: 80.0, Precision.FP16: 60.0, Precision.BF16: 35.0, Precision.INT8: 20.0}
"""Of one block on the reference's values, by what it computes in. Healthy blocks of the demo, of vit_tiny with its
trained weights and of efficientnet_b0 under the initializer, on data and on made inputs: FP32 the same bits (200 dB;
another kernel's rounding leaves 110 or more), FP16 weights 73 dB or more, INT8 29 dB or more on data and 24 on made
inputs, which ranges calibrated on data clip. Of efficientnet_b0's activations, clipped to a quarter of their range,
the median is 14 dB; clipped to half they keep 21 or more, as much as a healthy block may have. A weight's scale that
is wrong by a factor of 2 leaves 11 at most (vit_tiny)."""

SHOWN = 6
"""Blocks whose numbers are told: the first one out of tolerance and the worst others."""


class BlockParity(msgspec.Struct, frozen=True):
    """One block of a candidate on the reference's values. `module` is the one it belongs to; `between` names further
    ones, where lowering left no common value between them. `arithmetic` is what it computes in: its tolerance follows
    from that. `runs`: kinds of nodes in an opened session of the block, read back, the most costly first."""

    module: str
    operators: tuple[str, ...]
    between: tuple[str, ...]
    arithmetic: str
    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float
    min_sqnr_db: float
    passed: bool
    runs: tuple[str, ...] = ()

    @property
    def margin_db(self) -> float:
        return self.sqnr_db - self.min_sqnr_db

    def describe(self) -> str:
        also = f", with {', '.join(self.between)}" if self.between else ""
        numbers = f"{self.sqnr_db:.1f} dB, max error {self.max_abs:.3g}, expected {self.min_sqnr_db:g} dB or more"
        return f"module {self.module or '(top level)'} ({', '.join(self.operators)}{also}): {numbers}"


class Localization(msgspec.Struct, frozen=True):
    """`first` is the first block, in the order of the graph, that is out of its tolerance; None: every block holds."""

    variant: str
    reference: str
    inputs: str
    blocks: int
    out_of_tolerance: int
    first: BlockParity | None
    worst: tuple[BlockParity, ...]
    """Those with the least margin, `first` left out."""
    reference_sqnr_db: float | None = None
    """The reference's ONNX, which the blocks are compared with, against its source in PyTorch (None: not at hand)."""
    graph: str = MAIN

    def verdict(self) -> str:
        """Where the fault is, in a sentence."""
        if self.first is not None:
            return self.first.describe()
        if self.reference_sqnr_db is not None and self.reference_sqnr_db < FP32_MIN_SQNR_DB:
            return (
                f"every block computes what the reference's ONNX does, which is {self.reference_sqnr_db:.1f} dB from "
                "the source in PyTorch: the fault is in capture, rewriting or conversion, not in lowering"
            )
        held = f"each of the {self.blocks} blocks alone is within its tolerance"
        if not self.worst or self.worst[0].sqnr_db >= EXACT_DB:
            return held
        return f"{held}; the one with the least margin is {self.worst[0].describe()}"


@dataclass(frozen=True)
class Graphs:
    """The models that a candidate is cut by: `canonical` and `portable` are those it was lowered from."""

    canonical: ir.Model
    portable: ir.Model
    reference: ir.Model
    reference_name: str


@dataclass(frozen=True)
class Probe:
    """What the blocks are tried with. `expected`: what the source gives for it in PyTorch, where that is at hand."""

    name: str
    feeds: Mapping[str, Array]
    expected: Mapping[str, Array] = field(default_factory=dict)


def own_graphs(folder: Path) -> Graphs:
    """A bundle's own portable FP32 model as the reference."""
    require_export()
    import onnx_ir as ir

    portable = ir.load(folder / PORTABLE)
    return Graphs(ir.load(folder / CANONICAL), portable, portable, "the bundle's portable FP32 model")


def telling_case(
    rows: Sequence[CaseParity], cases: Sequence[Case], data: Callable[[], Mapping[str, Array]] | None
) -> Case:
    """What to look for a fault with: made inputs that failed, else real ones when there are any, else normal ones."""
    failed = {row.name for row in rows if row.judged and not row.passed}
    made = [case for case in cases if case.name in failed]
    if not made and data is not None:
        return Case("data", data(), typical=True)
    return made[0] if made else cases[0]


def localize(
    built: Built, graphs: Graphs, probe: Probe, *, threads: int, int8_min_sqnr_db: float | None = None
) -> Localization:
    """Runs every block of the candidate on the reference's values. `int8_min_sqnr_db`: a lower floor than ours, where
    the user allows the whole model less."""
    require_export()
    import onnx_ir as ir

    from attn_deploy.export.blocks import pair_blocks

    floors = dict(LOCAL_MIN_SQNR_DB)
    if built.target.on_gpu:
        floors[Precision.FP16] = FP16_MIN_SQNR_DB  # computed in, and not only stored
    if int8_min_sqnr_db is not None:
        floors[Precision.INT8] = min(floors[Precision.INT8], int8_min_sqnr_db)
    candidate = ir.load(built.files[0])
    sites = [node for _, node in built.sites]
    blocks = pair_blocks(candidate, graphs.portable, graphs.canonical, graphs.reference, sites)
    ranking, fidelity = _Ranking(), []
    for block, reference, values in _reference_values(blocks, probe.feeds, threads):
        ranking.add(_compare(block, blocks, reference, values, built, floors[block.arithmetic], threads))
        if block.partner in probe.expected:
            fidelity.append(sqnr_db(probe.expected[block.partner], reference))
    first, worst = ranking.first, sorted(ranking.worst, key=lambda kept: kept.row.margin_db)
    return Localization(
        variant=built.id,
        reference=graphs.reference_name,
        inputs=f"{probe.name}, {feeds_batch(probe.feeds)} samples",
        blocks=len(blocks.in_order),
        out_of_tolerance=ranking.failed,
        first=None if first is None else _read_back(first, built),
        worst=tuple(_read_back(kept, built) for kept in worst),
        reference_sqnr_db=min(fidelity, default=None),
    )


@dataclass
class _Kept:
    """A block's row with what is needed to read it back."""

    order: int
    row: BlockParity
    model: bytes
    feeds: dict[str, Array]

    def __lt__(self, other: _Kept) -> bool:
        """A heap gives the least first: that is the one with the largest margin, to be forgotten."""
        return self.row.margin_db > other.row.margin_db


@dataclass
class _Ranking:
    """The first block that is out of tolerance and the worst others, in whichever order the blocks come."""

    failed: int = 0
    first: _Kept | None = None
    worst: list[_Kept] = field(default_factory=list)

    def add(self, kept: _Kept) -> None:
        self.failed += not kept.row.passed
        other: _Kept | None = kept
        if not kept.row.passed and (self.first is None or kept.order < self.first.order):
            other, self.first = self.first, kept
        if other is not None:
            heapq.heappush(self.worst, other)
        if len(self.worst) > SHOWN - 1:
            heapq.heappop(self.worst)


def _reference_values(
    blocks: Blocks, feeds: Mapping[str, Array], threads: int
) -> Iterator[tuple[Block, Array, Mapping[str, Array]]]:
    """Runs the reference block by block; gives each block with its reference and all that its candidate is fed with.

    A value is forgotten after its last reader: no more of them are held than in a run of the whole model.
    """
    values = dict(feeds)
    readers = Counter(name for block in blocks.in_order for names in blocks.needs(block) for name in names)
    readers.update(block.value for block in blocks.in_order)

    def read(names: set[str]) -> None:
        for name in names:
            readers[name] -= 1
            if readers[name] <= 0:
                values.pop(name, None)

    waiting: list[Block] = []
    for block in blocks.in_order:
        given = blocks.reference_feeds(block, values)
        model = blocks.reference.model_of(block.reference, given)
        values[block.value] = _run(None, model, given, threads)
        read(blocks.needs(block)[1])
        waiting.append(block)
        for ready in [b for b in waiting if blocks.needs(b)[0] <= values.keys()]:
            yield ready, values[ready.value], values
            waiting.remove(ready)
            read(blocks.needs(ready)[0] | {ready.value})


def _compare(
    block: Block, blocks: Blocks, reference: Array, values: Mapping[str, Array], built: Built, floor_db: float,
    threads: int,
) -> _Kept:  # fmt: skip
    feeds = blocks.candidate_feeds(block, values)
    model = blocks.candidate.model_of(block.candidate, feeds)
    found = _fidelity(reference, _run(built, model, feeds, threads))
    row = BlockParity(
        block.module, block.operators, block.between, str(block.arithmetic), found.max_abs, found.max_rel,
        found.cosine, found.sqnr_db, floor_db, passed=found.sqnr_db >= floor_db,
    )  # fmt: skip
    return _Kept(block.order, row, model, feeds)


def _run(built: Built | None, model: bytes, feeds: Mapping[str, Array], threads: int) -> Array:
    """The block on the candidate's runtime; without a candidate, in FP32 on the CPU."""
    if built is None:
        session = runtimes.open_session(Target.ONNXRUNTIME_CPU, model, threads=threads)
    else:
        session = runtimes.open_session(
            built.target,
            model,
            threads=threads,
            library=built.library,
            options=runtimes.options_of_parts(built.target, built.options),
        )
    return next(iter(session.run(feeds).values()))


def _fidelity(reference: Array, got: Array) -> Fidelity:
    if reference.shape != got.shape:
        return Fidelity(max_abs=float(np.finfo(np.float32).max), max_rel=1e9, cosine=-1.0, sqnr_db=-EXACT_DB)
    moments = Moments()
    moments.add(reference, got)
    return moments.fidelity()


def _read_back(kept: _Kept, built: Built) -> BlockParity:
    """The row with what the runtime made of the block."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.onnx"
        path.write_bytes(kept.model)
        nodes = runtimes.read_back(built.target, path, kept.feeds, library=built.library, options=built.options)
    slowest_first = sorted(nodes, key=lambda node: -node.time_us)
    return msgspec.structs.replace(kept.row, runs=tuple(dict.fromkeys(n.op_type for n in slowest_first)))
