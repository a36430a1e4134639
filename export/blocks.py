"""A candidate in blocks: cut where module borders are and where its values are also the reference's, by their names.

Names carry everything. A node of the canonical model is `module.path/Operator`, what it is lowered to starts with that
name, and the value it makes keeps its own. Between two models made from different captures value names are only
numbers, so there a value's partner is the one that the node of the same name makes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from attn_deploy.export.cut import HALF, Cutter, Part
from attn_deploy.session import Array
from attn_deploy.target import Precision


@dataclass(frozen=True)
class Block:
    """What makes one value that leaves a module, in the candidate and in the reference.

    `value` is its name in the candidate, `partner` in the reference; `between` names the other modules that stand
    between the cuts, where lowering left no common value. `arithmetic` is the coarsest that the block computes in.
    """

    value: str
    partner: str
    order: int
    module: str
    operators: tuple[str, ...]
    between: tuple[str, ...]
    arithmetic: Precision
    candidate: Part
    reference: Part


@dataclass(frozen=True)
class Blocks:
    """`in_order` follows the reference's graph: a block comes after those that make its partner's inputs.

    `partners` maps names of values of the reference to those of the candidate, graph inputs included.
    """

    in_order: tuple[Block, ...]
    partners: Mapping[str, str]
    candidate: Cutter
    reference: Cutter

    def candidate_feeds(self, block: Block, values: Mapping[str, Array]) -> dict[str, Array]:
        """`values` are the reference's, under the candidate's names."""
        return {name: values[name] for name in block.candidate.input_names}

    def reference_feeds(self, block: Block, values: Mapping[str, Array]) -> dict[str, Array]:
        return {name: values[self.partners[name]] for name in block.reference.input_names}

    def needs(self, block: Block) -> tuple[set[str], set[str]]:
        """Values, under the candidate's names, that the candidate's part and the reference's are fed with."""
        return set(block.candidate.input_names), {self.partners[n] for n in block.reference.input_names}


class Owners:
    """Which node of the canonical model something was lowered from, by its name."""

    def __init__(self, canonical: ir.Model, sites: Collection[str]) -> None:
        self._roots = {str(node.name) for node in canonical.graph}
        self._sites = frozenset(sites)

    def root(self, name: str) -> str | None:
        while name and name not in self._roots:
            name = name.rpartition("/")[0]
        return name or None

    def module(self, node: ir.Node) -> str:
        return (self.root(str(node.name)) or "").rpartition("/")[0]

    def unit(self, node: ir.Node) -> str:
        """The site where the node belongs to one, else its module."""
        root = self.root(str(node.name)) or ""
        return root if root in self._sites else f"{root.rpartition('/')[0]}/"


def pair_blocks(
    candidate: ir.Model, portable: ir.Model, canonical: ir.Model, reference: ir.Model, sites: Collection[str]
) -> Blocks:
    """Blocks of `candidate`, which was lowered from `canonical`, whose bodies are inlined in `portable`; `reference` is
    that same portable model or another one. `sites` are the names of the sites' operators."""
    owners = Owners(canonical, sites)
    cuts = _cuts(candidate, portable, reference, owners)
    partners = {partner: value for value, partner in cuts.items()}
    partners |= {str(i.name): str(i.name) for i in reference.graph.inputs}
    cutters = Cutter(candidate), Cutter(portable), Cutter(reference)
    names = {str(node.name) for node in reference.graph}
    made, made_portable, made_reference = _made(candidate), _made(portable), _made(reference)
    blocks = []
    for order, (value, partner) in enumerate(cuts.items()):
        part = cutters[0].part(_written(made[value], owners), cuts, through=value)
        plain = cutters[1].part(made_portable[value], cuts)
        module, between = _modules(plain, owners, names)
        blocks.append(
            Block(
                value, partner, order, module, _operators(plain, owners), between, part.arithmetic,
                candidate=part, reference=cutters[2].part(made_reference[partner], partners),
            )
        )  # fmt: skip
    positions = {str(o.name): number for number, node in enumerate(reference.graph) for o in node.outputs}
    blocks.sort(key=lambda block: positions[block.partner])
    return Blocks(tuple(blocks), partners, cutters[0], cutters[2])


def _roots(part: Part, owners: Owners) -> list[str]:
    roots = (owners.root(str(node.name)) for node in part.nodes)
    return list(dict.fromkeys(root for root in roots if root is not None))


def _operators(part: Part, owners: Owners) -> tuple[str, ...]:
    """Of the canonical model: a site is one operator."""
    return tuple(root.rpartition("/")[2] for root in _roots(part, owners))


def _modules(part: Part, owners: Owners, names: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """The module of a block and further ones in it: the one whose nodes the reference does not have (`names`), else
    that of the one layer with a weight, else of what the block ends with."""
    modules = list(dict.fromkeys(root.rpartition("/")[0] for root in _roots(part, owners)))
    other = {owners.module(node) for node in part.nodes if node.name not in names}
    weighted = {owners.module(node) for node in part.nodes if any(_is_weight(i) for i in node.inputs)}
    last = part.result.producer()
    assert last is not None
    own = next((found for found in (other, weighted) if len(found) == 1), {owners.module(last)}).pop()
    return own, tuple(m for m in modules if m != own)


def _is_weight(value: ir.Value | None) -> bool:
    """A matrix or a convolution's kernel."""
    return value is not None and value.const_value is not None and len(value.const_value.shape) > 1


def _cuts(candidate: ir.Model, portable: ir.Model, reference: ir.Model, owners: Owners) -> dict[str, str]:
    """Value of the candidate -> value of the reference, in graph order: floats that leave a site or module."""
    in_candidate = _at_run_time(candidate)
    in_reference = _at_run_time(reference)
    nodes = {str(node.name): node for node in reference.graph}
    outputs = {str(o.name) for o in reference.graph.outputs}
    cuts = {}
    for value in _leaving(portable, owners):
        producer = value.producer()
        assert producer is not None
        name, partner = str(value.name), None
        twin = nodes.get(str(producer.name))
        if twin is not None and twin.op_type == producer.op_type:
            like = twin.outputs[value.index() or 0]
            partner = str(like.name) if _may_be_equal(value.shape, like.shape) else None
        elif value.is_graph_output() and name in outputs:
            partner = name
        if partner is None or partner not in in_reference or name not in in_candidate:
            continue
        if not _written_with_its_relu(in_candidate[name], owners):
            cuts[name] = partner
    return cuts


def _may_be_equal(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    if one is None or other is None:
        return True
    known = ((a, b) for a, b in zip(one, other, strict=False) if isinstance(a, int) and isinstance(b, int))
    return len(one) == len(other) and all(a == b for a, b in known)


def _leaving(portable: ir.Model, owners: Owners) -> Iterator[ir.Value]:
    for node in portable.graph:
        unit = owners.unit(node)
        for value in node.outputs:
            if value.dtype not in (None, ir.DataType.FLOAT, *HALF):
                continue
            readers = (owners.unit(user) for user, _ in value.uses())
            if value.is_graph_output() or any(reader != unit for reader in readers):
                yield value


def _made(model: ir.Model) -> dict[str, ir.Value]:
    return {str(o.name): o for node in model.graph for o in node.outputs}


def _at_run_time(model: ir.Model) -> dict[str, ir.Value]:
    """The values that depend on the model's inputs, by name."""
    inputs = set(model.graph.inputs)
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        if any(i is not None and (i in inputs or str(i.name) in found) for i in node.inputs):
            found.update((str(o.name), o) for o in node.outputs)
    return found


def _written(value: ir.Value, owners: Owners) -> ir.Value:
    """What stands for `value` from there on: behind the pair of QuantizeLinear and DequantizeLinear of its own node,
    which is part of how an integer kernel writes it."""
    producer = value.producer()
    root = owners.root(str(producer.name)) if producer is not None else None
    current = value
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        readers = {user for user, _ in current.uses()}
        reader = readers.pop() if len(readers) == 1 else None
        if reader is None or reader.op_type != operator or owners.root(str(reader.name)) != root:
            return value
        current = reader.outputs[0]
    return current


def _written_with_its_relu(value: ir.Value, owners: Owners) -> bool:
    """A convolution that is quantized behind its ReLU: one integer kernel runs both."""
    producer = value.producer()
    readers = {user for user, _ in value.uses()}
    if producer is None or producer.op_type != "Conv" or {r.op_type for r in readers} != {"Relu"}:
        return False
    after = readers.pop().outputs[0]
    return not readers and _written(after, owners) is not after
