"""The receipt as rich tables. Only the command line imports this module.

Every text that comes from a receipt goes through `_text`: no markup, no control characters. What colour says, a word
says as well, and nothing but ASCII is added, so that a log file reads the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attn_deploy.receipt import CandidateEntry, Intent, Peer, Receipt, SiteEntry, SiteRun
from attn_deploy.report import words
from attn_deploy.report.frontier import schemes, searched_candidates
from attn_deploy.report.levels import tuned_candidates
from attn_deploy.report.sites import SiteRow, kind_counts, site_rows
from attn_deploy.report.tuning import search_tables, tuning_tables

STYLES = {
    "passed": "green", "failed": "red", "not_run": "yellow",
    "recognized": "green", "skipped": "yellow", "unproven": "red",
}  # fmt: skip
REASON_WIDTH = 34
UNBOUNDED = 10_000


def receipt_tables(receipt: Receipt, *, all_sites: bool = False) -> RenderableType:
    """The whole receipt: header, sites, candidates, peers, data. `all_sites` gives each site a row of its own."""
    parts: list[RenderableType] = [_header(receipt)]
    for graph, own in receipt.by_graph().items():
        chosen = words.chosen_candidates(own)
        first = chosen[0][1] if chosen else None
        parts += _section(words.titled(graph, "Attention sites"), _sites(own, first, all_sites))
        parts += _section(words.titled(graph, "Candidates"), [candidates_table(own), *_reasons(own.candidates)])
        for candidate, search in searched_candidates(own):
            parts += _section(words.titled(graph, f"Plans for {candidate}"), search_tables(search))
        for candidate, tuning in tuned_candidates(own):
            parts += _section(words.titled(graph, f"Levels of {candidate}"), tuning_tables(tuning))
        if own.peers:
            parts += _section(words.titled(graph, "Against peers, in turns in the same run"), [peers_table(own.peers)])
    parts += _section("Data", [_text(sentence) for sentence in words.data_sentences(receipt.data)])
    return Group(*parts)


def sites_table(sites: Sequence[SiteEntry], runs: Sequence[SiteRun], *, all_sites: bool = False) -> RenderableType:
    """Each site, with what runs it in one session (`runs` empty: not opened); as wide as the terminal allows."""
    rows = site_rows(sites, runs, all_sites=all_sites)
    if not rows:
        return _text("no attention was found")
    return _FirstThatFits(_wide_sites(rows, bool(runs)), _two_line_sites(rows, bool(runs)), _listed_sites(rows))


def candidates_table(receipt: Receipt) -> RenderableType:
    """One row per candidate, or two tables of them where the terminal is narrow; `*` marks what was chosen."""
    if not receipt.candidates:
        return _text("no candidate was built")
    chosen = set(receipt.chosen.values())
    fidelity = ["status", "SQNR\ndB", "agreement", _accuracy_heading(receipt.candidates), "INT8\nshare"]
    cost = ["storage\nMB", "p50\nms", "p90\nms", "peak\nMB"]
    wide = _candidate_columns([*fidelity, *cost])
    upper, lower = _candidate_columns(fidelity), _candidate_columns(cost)
    for candidate in receipt.candidates:
        name = _candidate_name(candidate, chosen)
        likeness, price = _fidelity(candidate), _cost(candidate)
        wide.add_row(*name, *likeness, *price)
        upper.add_row(*name, *likeness)
        lower.add_row(*name, *price)
    mark = "* chosen. " if chosen else ""
    note = _note(f"{mark}INT8 share: of the multiply-adds of linear layers and convolutions, read back")
    return Group(_FirstThatFits(wide, Group(upper, Text(), lower)), note)


def peers_table(peers: Sequence[Peer]) -> RenderableType:
    table = _table()
    table.add_column("peer")
    table.add_column("p50 ms", justify="right", no_wrap=True)
    table.add_column("verdict, with 95 % interval")
    for peer in peers:
        style = {"faster": "green", "slower": "red"}.get(peer.verdict, "")
        table.add_row(
            _text(peer.name), words.milliseconds(peer.latency.p50_ms), _text(words.verdict(peer), style=style)
        )
    return Group(table, _note(words.RATIO_NOTE))


class _FirstThatFits:
    """The first of several renderings that needs no more than the console's width; the last one in any case."""

    def __init__(self, *renderings: RenderableType) -> None:
        self.renderings = renderings

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for rendering in self.renderings[:-1]:
            needed = console.measure(rendering, options=options.update_width(UNBOUNDED)).maximum
            if needed <= options.max_width:
                yield rendering
                return
        yield self.renderings[-1]


def _header(receipt: Receipt) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    lines = {
        "source": receipt.source,
        "weights": receipt.weights,
        "chosen": words.chosen_line(receipt),
        "host": words.host_line(receipt),
        "threads": words.threads(receipt),
        "created": words.created(receipt),
    }
    for label, value in lines.items():
        table.add_row(label, _text(value or words.ABSENT))
    return Group(table, *(_text(f"warning: {warning}", style="yellow") for warning in receipt.warnings))


def _sites(receipt: Receipt, chosen: CandidateEntry | None, all_sites: bool) -> list[RenderableType]:
    runs = chosen.sites if chosen is not None else ()
    table = sites_table(receipt.sites, runs, all_sites=all_sites)
    if not receipt.sites:
        return [table]
    parts: list[RenderableType] = [*intent_lines(receipt.sites, receipt.intent), Text(), table]
    parts += [_text(f"{c.id}: {words.implementations(c.sites)}") for c in receipt.candidates if c.sites]
    if chosen is not None and runs:
        parts.append(_note(f"runs as, on: read back from the session of {chosen.id}. MFLOPs: per sample and site"))
    return parts


def intent_lines(sites: Sequence[SiteEntry], intent: Intent | None) -> list[RenderableType]:
    """Counts by kind, and the share of the work inside the sites where it was recorded."""
    if intent is None:
        return [_counts(sites)]
    return [_counts(sites), _text(words.intent(intent)), _note(words.INTENT_NOTE)]


def _counts(sites: Sequence[SiteEntry]) -> RenderableType:
    table = _table()
    for heading in ("kind", "operator"):
        table.add_column(heading)
    for heading in ("recognized", "unproven", "skipped"):
        table.add_column(heading, justify="right", no_wrap=True)
    for count in kind_counts(sites):
        numbers = {"recognized": count.recognized, "unproven": count.unproven, "skipped": count.skipped}
        table.add_row(
            _text(count.kind),
            _text(count.operator or words.ABSENT),
            *(Text(str(n), style=STYLES[state] if n else "dim") for state, n in numbers.items()),
        )
    return table


def _wide_sites(rows: Sequence[SiteRow], opened: bool) -> Table:
    """One line per site; a reason for skipping may wrap."""
    table = _table()
    table.add_column("module")
    table.add_column("kind")
    table.add_column("operator, or why not", max_width=REASON_WIDTH)
    table.add_column("status")
    table.add_column("source line")
    table.add_column("MFLOPs", justify="right")
    for heading in ("runs as", "on") if opened else ():
        table.add_column(heading)
    for row in rows:
        cells = [_text(row.label), _text(row.kind), _what(row), _status(row.status), _text(row.source_line)]
        cells.append(_text(words.megaflops(row.flops)))
        if opened:
            cells += [_text(row.implementation or words.ABSENT), _text(row.provider or words.ABSENT)]
        table.add_row(*cells)
    return table


def _two_line_sites(rows: Sequence[SiteRow], opened: bool) -> Table:
    """The same in two lines per site: where it is, what it became, and what runs it."""
    table = _table()
    table.add_column("module\nsource line")
    table.add_column("kind\noperator, or why not", max_width=REASON_WIDTH - 10)
    table.add_column("status\nMFLOPs")
    if opened:
        table.add_column("runs as\non")
    for row in rows:
        cells = [
            _lines(_text(row.label), _text(_short_path(row.source_line), style="dim")),
            _lines(_text(row.kind), _what(row)),
            _lines(_status(row.status), _text(words.megaflops(row.flops), style="dim")),
        ]
        if opened:
            provider = _text(row.provider or "", style="dim")
            cells.append(_lines(_text(row.implementation or words.ABSENT), provider))
        table.add_row(*cells)
    return table


def _listed_sites(rows: Sequence[SiteRow]) -> RenderableType:
    """A paragraph per site, for names that no table has room for."""
    parts: list[RenderableType] = []
    for row in rows:
        parts.append(_text(row.label, style="bold"))
        facts = [_text(row.kind), _what(row), _status(row.status)]
        if row.flops:
            facts.append(_text(f"{words.megaflops(row.flops)} MFLOPs"))
        facts.append(_text(row.source_line, style="dim"))
        if row.implementation is not None:
            facts.append(_text(f"runs as {row.implementation}" + (f" on {row.provider}" if row.provider else "")))
        parts.append(Padding(Text(", ").join(fact for fact in facts if fact.plain), (0, 0, 0, 4)))
    return Group(*parts)


def _what(row: SiteRow) -> Text:
    """The operator with what is to be said about it, or why there is none."""
    if row.operator is None:
        return _text(row.reason or "no reason given")
    return _text(row.operator if row.reason is None else f"{row.operator}: {row.reason}")


def _short_path(source_line: str) -> str:
    """The last two parts: `timm/layers/attention.py:124` -> `layers/attention.py:124`."""
    return "/".join(source_line.split("/")[-2:])


def _candidate_columns(headings: Iterable[str]) -> Table:
    table = _table()
    table.add_column("")
    table.add_column("candidate", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "status" else "right", no_wrap=True)
    return table


def _candidate_name(candidate: CandidateEntry, chosen: set[str]) -> tuple[Text, Text]:
    is_chosen = candidate.id in chosen
    return Text("*" if is_chosen else ""), _text(candidate.id, style="bold" if is_chosen else "")


def _fidelity(candidate: CandidateEntry) -> list[Text]:
    status = _text(words.status(candidate), style=STYLES.get(candidate.status, ""))
    figures = (
        words.sqnr(candidate),
        words.agreement(candidate),
        words.accuracy(candidate.accuracy),
        words.int8_share(candidate),
    )
    return [status, *map(Text, figures)]


def _cost(candidate: CandidateEntry) -> list[Text]:
    latency = candidate.latency
    figures = (
        words.megabytes(candidate.storage_mb),
        words.milliseconds(latency.p50_ms if latency is not None else None),
        words.milliseconds(latency.p90_ms if latency is not None else None),
        words.peak_memory(candidate),
    )
    return list(map(Text, figures))


def _accuracy_heading(candidates: Sequence[CandidateEntry]) -> str:
    metrics = sorted({words.printable(c.accuracy.metric) for c in candidates if c.accuracy is not None})
    return f"{'/'.join(metrics) or 'accuracy'} %\n(PyTorch)"


def _reasons(candidates: Sequence[CandidateEntry]) -> list[RenderableType]:
    """Why candidates failed or were not run, a line for each reason; then what half precision costs, where measured."""
    alike: dict[tuple[str, str], list[CandidateEntry]] = {}
    for candidate in candidates:
        if candidate.status != "passed":
            reason = candidate.reason or "no reason given"
            alike.setdefault((candidate.status, reason), []).append(candidate)
    lines: list[RenderableType] = [
        Text.assemble(
            _text(f"{', '.join(c.id for c in same)} {words.status(same[0])}: ", style=STYLES.get(status, "")),
            _text(reason),
        )
        for (status, reason), same in alike.items()
    ]
    found: dict[str, list[str]] = {}
    for candidate in candidates:
        planned = schemes(candidate.schemes) if candidate.schemes else None
        for said in (words.half_blocks(candidate), planned and f"layers by scheme: {planned}"):
            if said is not None:
                found.setdefault(said, []).append(candidate.id)
    return lines + [_note(f"{', '.join(ids)}: {said}") for said, ids in found.items()]


def _section(title: str, parts: Sequence[RenderableType]) -> list[RenderableType]:
    return [Text(), Text(title, style="bold underline"), *parts]


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))


def _text(text: str, *, style: str = "") -> Text:
    return Text(words.printable(text), style=style, overflow="fold")


def _lines(first: Text, second: Text) -> Text:
    return Text("\n").join([first, second])


def _status(status: str) -> Text:
    return _text(status, style=STYLES.get(status, ""))


def _note(text: str) -> Text:
    return _text(text, style="dim")
