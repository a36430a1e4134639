"""The receipt as one HTML page that loads nothing: styles and the chart are in it. Needs jinja2."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from attn_deploy.receipt import MAIN, CandidateEntry, KindCount, Receipt, SiteParity, SiteRun
from attn_deploy.report import frontier, levels, words
from attn_deploy.report.chart import Chart, latency_chart
from attn_deploy.report.frontier import FrontierChart, searched_candidates
from attn_deploy.report.sites import SiteRow, kind_counts, name_ranges, paired, site_rows

TEMPLATE = "report.html.j2"
FILES_NAMED = 20


@dataclass(frozen=True)
class Tile:
    """One figure of the headline."""

    value: str
    label: str


@dataclass(frozen=True)
class SiteCell:
    """One site in one candidate: what runs it, and its parity alone."""

    run: SiteRun | None
    parity: SiteParity | None


@dataclass(frozen=True)
class GraphPage:
    """What the page shows of one graph. `anchor` ends the ids of its headings."""

    name: str
    anchor: str
    receipt: Receipt
    chosen: list[tuple[str, CandidateEntry, list[Tile]]]
    chosen_ids: set[str]
    counts: list[KindCount]
    site_rows: list[SiteRow]
    site_matrix: list[tuple[str, list[SiteCell]]]
    exempt: Mapping[str, Mapping[str, list[tuple[str, int]]]]
    chart: Chart | None
    frontiers: Mapping[str, FrontierChart | None]
    """By candidate, of those whose plan was searched."""


def render_html(receipt: Receipt) -> str:
    """The whole page. Every value of the receipt is escaped; control characters become `?`."""
    source = importlib.resources.files("attn_deploy.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return _environment().from_string(source).render(
        receipt=receipt,
        graphs=[_page(name, own) for name, own in receipt.by_graph().items()],
        data_sentences=words.data_sentences(receipt.data, FILES_NAMED),
        words=words,
        levels=levels,
        frontier=frontier,
    )  # fmt: skip


def _page(name: str, receipt: Receipt) -> GraphPage:
    chosen = words.chosen_candidates(receipt)
    return GraphPage(
        name=name,
        anchor="" if name == MAIN else f"-{name}",
        receipt=receipt,
        chosen=[
            (target, candidate, _tiles(receipt, candidate, index == 0))
            for index, (target, candidate) in enumerate(chosen)
        ],
        chosen_ids=set(receipt.chosen.values()),
        counts=kind_counts(receipt.sites),
        site_rows=site_rows(receipt.sites, chosen[0][1].sites if chosen else ()),
        site_matrix=_site_matrix(receipt),
        exempt={c.id: _exempt_by_reason(c.exempt) for c in receipt.candidates},
        chart=latency_chart(receipt),
        frontiers={candidate: frontier.frontier_chart(search) for candidate, search in searched_candidates(receipt)},
    )


def _environment() -> jinja2.Environment:
    """Autoescaping for every template: the suffix .j2 would not switch it on by itself."""
    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )


def _finalize(value: Any) -> Any:
    if value is None:
        return words.ABSENT
    return words.printable(value) if type(value) is str else value


def _tiles(receipt: Receipt, candidate: CandidateEntry, compared: bool) -> list[Tile]:
    """The figures that matter first, of those that were taken. A peer is compared with the one that shared its run."""
    tiles = []
    if candidate.latency is not None:
        tiles.append(Tile(f"{words.milliseconds(candidate.latency.p50_ms)} ms", "median time per call"))
    for peer in (p for p in receipt.peers if (compared if p.against is None else p.against == candidate.id)):
        tiles.append(Tile(words.tempo(peer), f"than {peer.name}" if words.differs(peer) else f"against {peer.name}"))
    if candidate.parity is not None:
        value = words.decibel(candidate.parity.sqnr_db)
        tiles.append(Tile(value if value == "exact" else f"{value} dB", "worst signal to noise"))
        if candidate.parity.top1_agreement is not None:
            tiles.append(Tile(words.agreement(candidate), "top-1 as in PyTorch"))
    if candidate.accuracy is not None:
        found = candidate.accuracy
        tiles.append(Tile(f"{found.value:.2f} %", f"{found.metric}; PyTorch {found.reference:.2f} %"))
    if candidate.storage_mb:
        tiles.append(Tile(f"{words.megabytes(candidate.storage_mb)} MB", "on disk"))
    return tiles


def _site_matrix(receipt: Receipt) -> list[tuple[str, list[SiteCell]]]:
    """Each site with an operator, and its cell in each candidate; empty when no candidate says anything of a site."""
    if not any(c.sites or (c.parity is not None and c.parity.sites) for c in receipt.candidates):
        return []
    columns = []
    for candidate in receipt.candidates:
        runs = paired(receipt.sites, candidate.sites)
        parities = paired(receipt.sites, candidate.parity.sites if candidate.parity is not None else ())
        columns.append([SiteCell(run, parity) for run, parity in zip(runs, parities, strict=True)])
    return [
        (site.module or "(top level)", [column[index] for column in columns])
        for index, site in enumerate(receipt.sites)
        if site.operator is not None
    ]


def _exempt_by_reason(exempt: Sequence[str]) -> Mapping[str, list[tuple[str, int]]]:
    """`layer: reason` -> reason: ranges of layers."""
    layers: dict[str, list[str]] = {}
    for entry in exempt:
        layer, _, reason = entry.partition(": ")
        layers.setdefault(reason, []).append(layer)
    return {reason: name_ranges(names) for reason, names in layers.items()}
