"""Recognition: CapturedModel -> Findings. One file per kind of attention."""

from __future__ import annotations

from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.recognize import attention, branch, channel_attention, context, gate, hard
from attn_deploy.export.recognize.site import Findings, Reason, Skipped

RECOGNISERS = (channel_attention.find, attention.find, context.find, branch.find, hard.find, gate.find)
"""In the order of their claims: a softmax that one recognised is no site of those behind it."""

NO_ATTENTION_BETWEEN_TOKENS = frozenset({Reason.NOT_BETWEEN_PRODUCTS, Reason.NOT_LAST_AXIS})
"""Reasons that only say what a softmax is not: a recogniser behind it may know what it is."""


def recognize(captured: CapturedModel) -> Findings:
    """Every attention of the graph, as a site or as a skip with its reason, in graph order."""
    findings = Findings()
    order = {node: i for i, node in enumerate(captured.program.graph.nodes)}
    for find in RECOGNISERS:
        claimed = {site.anchor for site in findings.sites}
        for found in find(captured):
            if isinstance(found, Skipped):
                findings.skipped.append(found)
            elif found.anchor not in claimed:
                findings.sites.append(found)
    claimed = {site.anchor for site in findings.sites}
    skipped: dict[Node, Skipped] = {}
    for skip in findings.skipped:  # of several recognisers that looked at one node, the first that knew a reason
        known = skipped.get(skip.anchor)
        if skip.anchor not in claimed and (known is None or known.reason in NO_ATTENTION_BETWEEN_TOKENS):
            skipped[skip.anchor] = skip
    findings.skipped = sorted(skipped.values(), key=lambda skip: order[skip.anchor])
    findings.sites.sort(key=lambda site: order[site.result])
    return findings
