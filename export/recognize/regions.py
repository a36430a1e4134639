"""Which attention sites can stay in the natural order of tokens: those whose results are put back into it.

Between the way into windows and the way out of them stand operators that treat every token alike, so that they can run
in the natural order, and attentions, which take the order as an index map. A region of such nodes can be moved when
nothing else looks into it. Sites that share a region are moved together or not at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch.fx import Node

from attn_deploy.export.graph import ancestors, aten
from attn_deploy.export.recognize.attention import AttentionMatch
from attn_deploy.export.recognize.layout import MOVES
from attn_deploy.export.recognize.site import Site


def settle(sites: Sequence[Site], opened: Collection[Node] = ()) -> list[Site]:
    """The sites with `exits` where they stay in the natural order, and in their sources' own order where they cannot.
    Those whose results are in `opened` do not stay in it, whatever follows."""
    regions = {s.result: _Region(s.match) for s in sites if isinstance(s.match, AttentionMatch) and s.match.place}
    interiors = {node: r for r in regions.values() for node in r.interior}
    for region in regions.values():
        region.explore(interiors)
        region.open = region.open or region.match.result in opened
    _spread(regions)
    result = []
    for site in sites:
        found = regions.get(site.result)
        result.append(site if found is None else replace(site, match=found.settled()))
    return result


class _Region:
    """What follows from one attention's result up to where the natural order is restored."""

    def __init__(self, match: AttentionMatch) -> None:
        assert match.place is not None
        self.match = match
        self.exits: list[Node] = []
        self.open = False
        self.neighbours: list[_Region] = []
        """Attentions that take what this one gives, in the order in which it gives it."""
        around = {*match.place.sources, match.bias, match.mask}
        self.interior = set(ancestors(match.result, stop=lambda n: n in around)) - around

    def explore(self, interiors: Mapping[Node, _Region]) -> None:
        layout = self.match.layout
        assert layout is not None
        pending, seen = [self.match.result], set()
        while pending:
            for user in pending.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                other = interiors.get(user)
                if other is not None and other is not self:
                    self.neighbours.append(other)
                elif user.target is aten._assert_tensor_metadata.default:
                    continue  # goes with what it was asked of
                elif user.target in MOVES and layout.elements(user).root is not user:
                    (self.exits if layout.leaves(user) else pending).append(user)
                elif layout.tokens(user) is not None:
                    pending.append(user)
                else:
                    self.open = True

    def must_open(self, regions: Mapping[Node, _Region]) -> bool:
        """True where a value that is needed in the natural order, or that is given in it, is not to be had so."""
        place, layout = self.match.place, self.match.layout
        assert place is not None
        assert layout is not None
        needed = {r for node in (*place.sources, *self.exits) for r in layout.results_behind(node)}
        return any(n.open for n in self.neighbours) or any(r not in regions or regions[r].open for r in needed)

    def settled(self) -> AttentionMatch:
        if self.open:
            return replace(self.match, place=self.match.local_place, exits=())
        return replace(self.match, exits=tuple(self.exits))


def _spread(regions: Mapping[Node, _Region]) -> None:
    """A region that is looked into opens those that hang together with it."""
    changed = True
    while changed:
        changed = False
        for region in regions.values():
            if not region.open and region.must_open(regions):
                region.open = changed = True
