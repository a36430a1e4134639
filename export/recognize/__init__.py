"""Recognition: CapturedModel -> Findings. One file per kind of attention."""

from __future__ import annotations

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.recognize import attention, gate
from attn_deploy.export.recognize.site import Findings, Site

RECOGNISERS = (attention.find, gate.find)


def recognize(captured: CapturedModel) -> Findings:
    """Every attention of the graph, as a site or as a skip with its reason, in graph order."""
    findings = Findings()
    order = {node: i for i, node in enumerate(captured.program.graph.nodes)}
    for find in RECOGNISERS:
        for found in find(captured):
            if isinstance(found, Site):
                findings.sites.append(found)
            else:
                findings.skipped.append(found)
    findings.sites.sort(key=lambda site: order[site.result])
    return findings
