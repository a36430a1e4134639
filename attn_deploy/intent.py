"""What an export sets out to do for attention: its sites, and their share of the model's work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attn_deploy.receipt import Intent, SiteEntry
from attn_deploy.report.sites import kind_counts

if TYPE_CHECKING:
    from attn_deploy.export.canonical import CanonicalModel
    from attn_deploy.export.rewrite import RewrittenModel


def site_entries(rewritten: RewrittenModel, canonical: CanonicalModel) -> tuple[SiteEntry, ...]:
    """Rows of the receipt: sites in the order of the graph, then what was skipped."""
    entries = [
        SiteEntry(
            kind=str(s.kind), module=s.module, source_line=s.source_line, operator=s.operator,
            status="recognized" if s.proven else "unproven",
            reason=None if s.proven else "corrupting this site on purpose does not change the model's output",
            flops=s.flops, bytes=s.bytes, node=s.node,
        )
        for s in canonical.sites
    ]  # fmt: skip
    for s in rewritten.skipped:
        entries.append(SiteEntry(str(s.kind), s.module, s.source_line, None, "skipped", str(s.reason), 0, 0))
    return tuple(entries)


def intent_of(sites: Sequence[SiteEntry], rewritten: RewrittenModel) -> Intent:
    """Counts by kind, and the share of multiply-adds and bytes inside the recognized sites."""
    from attn_deploy.export.work import count_work

    work = count_work(rewritten)
    return Intent(
        tuple(kind_counts(sites)), work.flops, work.bytes, work.site_flops, work.site_bytes,
        flops_share=round(work.site_flops / work.flops, 6) if work.flops else 0.0,
        bytes_share=round(work.site_bytes / work.bytes, 6) if work.bytes else 0.0,
    )  # fmt: skip
