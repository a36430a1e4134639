"""inspect(): the attention of a source or bundle, and what runs each of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from attn_deploy import bundle as bundles
from attn_deploy import loading, runtimes
from attn_deploy.bundle import Bundle, open_bundle
from attn_deploy.errors import UsageError
from attn_deploy.extras import require_export
from attn_deploy.heatmap import Heatmap, Subject, draw_heatmaps
from attn_deploy.inputs import ExampleInput, make_feeds
from attn_deploy.intent import intent_of, site_entries
from attn_deploy.manifest import graph_file
from attn_deploy.plan_file import read_plan
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.preprocess import load_image
from attn_deploy.readback import dtype_shares, site_runs
from attn_deploy.receipt import MAIN, Intent, Receipt, SiteEntry, SiteRun, Tuning
from attn_deploy.resolutions import about, require_one_resolution
from attn_deploy.session import DimBounds, TensorSpec
from attn_deploy.target import Target


class VariantInspection(msgspec.Struct, frozen=True):
    """What one variant runs here, read back from an opened session; `unavailable` says why it could not be opened."""

    id: str
    target: str
    precision: str
    size_mb: float
    chosen: bool
    unavailable: str | None
    providers: dict[str, int]
    """Execution provider -> nodes that run on it."""
    operators: dict[str, int]
    dtype_share: dict[str, float]
    weighted_dtype_share: dict[str, float]
    sites: tuple[SiteRun, ...]
    implementations: dict[str, int] = {}
    """What runs a site -> how many sites, read back."""
    one_kernel: int = 0
    """Sites that run as one kernel."""
    tuning: Tuning | None = None
    """How its levels were chosen, where they were."""
    plan: PrecisionPlan | None = None
    """What it was lowered by, where it has a plan."""


class Inspection(msgspec.Struct, frozen=True):
    source: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sites: tuple[SiteEntry, ...]
    variants: tuple[VariantInspection, ...]
    intent: Intent | None = None
    """None for a bundle of an attn-deploy that did not record it."""
    heatmaps: tuple[Heatmap, ...] = ()
    graph: str = MAIN
    others: tuple[Inspection, ...] = ()
    """The other graphs of a bundle with several resolutions."""


@dataclass(frozen=True)
class Drawing:
    """Pictures of the attention on `image`, to be written into the folder `out`."""

    image: str
    out: Path


def inspect(
    item: str | os.PathLike[str], *, weights: str | None = None, arguments: dict[str, object] | None = None,
    inputs: Sequence[ExampleInput] = (), drawing: Drawing | None = None, graph: str | None = None,
) -> Inspection:  # fmt: skip
    """Looks into a bundle (and opens its variants), or captures a source and recognizes its attention; with `drawing`
    writes pictures of the weights as well, of several resolutions of the first. `graph` is the only one to look at."""
    if drawing is not None:
        load_image(drawing.image)  # a wrong path must not be told after the model was captured
    if (Path(item) / bundles.MANIFEST).is_file() or str(item).endswith(".attn"):
        bundle = open_bundle(item)
        receipts = bundle.receipts()
        found = []
        for number, name in enumerate(loading.graphs_of(bundle.manifest, graph)):
            with about(name):
                found.append(_inspect_graph(bundle, name, receipts[name], drawing if number == 0 else None))
        return msgspec.structs.replace(found[0], others=tuple(found[1:]))
    if graph is not None:
        raise UsageError("--graph names a graph of a bundle", got=f"{graph} of {item}", expected="a bundle")
    require_one_resolution(inputs)
    return _inspect_source(str(item), weights, arguments or {}, inputs, drawing)


def _inspect_graph(bundle: Bundle, graph_name: str, receipt: Receipt, drawing: Drawing | None) -> Inspection:
    graph = bundle.manifest.graphs[graph_name]
    roots = [(s.module, s.node) for s in receipt.sites if s.node is not None]
    batch = graph.dims["batch"].min if "batch" in graph.dims else None
    feeds = make_feeds(graph.examples, batch=batch, seed=31)
    chosen = set(bundle.manifest.chosen_of(graph_name).values())
    variants = []
    for name, variant in graph.variants.items():
        target = Target(variant.target)
        reason = runtimes.availability(target)
        files = [bundle.check(f) for f in variant.files]
        nodes = []
        if reason is None:
            nodes = runtimes.read_back(
                target, files[0], feeds, library=variant.library is not None, options=variant.options
            )
        everything, weighted = dtype_shares(nodes, [root for _, root in roots])
        runs = site_runs(roots, nodes) if reason is None else ()
        variants.append(
            VariantInspection(
                id=name,
                target=variant.target,
                precision=variant.precision,
                size_mb=round(sum(f.stat().st_size for f in files) / 1e6, 3),
                chosen=name in chosen,
                unavailable=reason,
                providers=_count(n.provider for n in nodes),
                operators=_count(n.op_type for n in nodes),
                dtype_share=everything,
                weighted_dtype_share=weighted,
                sites=runs,
                implementations=_count(run.implementation for run in runs),
                one_kernel=sum(run.one_kernel for run in runs),
                tuning=next((c.tuning for c in receipt.candidates if c.id == name), None),
                plan=None if variant.plan is None else read_plan(bundle.check(variant.plan)),
            )
        )
    heatmaps: tuple[Heatmap, ...] = ()
    if drawing is not None:
        heatmaps = draw_heatmaps(_subject(bundle, graph_name, receipt.sites), drawing.image, drawing.out)
    return Inspection(
        bundle.manifest.source, graph.inputs, graph.outputs, receipt.sites, tuple(variants), receipt.intent, heatmaps,
        graph_name,
    )  # fmt: skip


def _subject(bundle: Bundle, graph_name: str, sites: Sequence[SiteEntry]) -> Subject:
    require_export()
    import onnx_ir as ir

    graph = bundle.manifest.graphs[graph_name]
    files = (graph_file(graph_name, name) for name in (bundles.CANONICAL, bundles.PORTABLE))
    canonical, portable = (ir.load(bundle.check(name)) for name in files)
    batch = graph.dims["batch"].min if "batch" in graph.dims else graph.examples[0].shape[0]
    preprocess = bundle.manifest.preprocess_of(graph_name)
    return Subject(canonical, portable, sites, preprocess, graph.examples, batch)


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _inspect_source(
    text: str, weights: str | None, arguments: dict[str, object], inputs: Sequence[ExampleInput],
    drawing: Drawing | None,
) -> Inspection:  # fmt: skip
    require_export()
    from attn_deploy.export.canonical import portable
    from attn_deploy.export.capture import capture
    from attn_deploy.export.recognize import recognize
    from attn_deploy.export.rewrite import rewrite
    from attn_deploy.export.sources import SourceRequest, load_source
    from attn_deploy.export.to_onnx import to_onnx

    source = load_source(text, SourceRequest("", weights, arguments, inputs))
    captured = capture(source, {"batch": DimBounds()})
    rewritten = rewrite(captured, recognize(captured))
    canonical = to_onnx(rewritten)
    sites = site_entries(rewritten, canonical)
    heatmaps: tuple[Heatmap, ...] = ()
    if drawing is not None:
        batch = 1 if "batch" in captured.dims else captured.inputs[0].shape[0]
        model = portable(canonical)
        subject = Subject(canonical.model, model, sites, source.preprocess, captured.inputs, batch)
        heatmaps = draw_heatmaps(subject, drawing.image, drawing.out)
    return Inspection(
        f"{source.description} ({source.weights})", canonical.inputs, canonical.outputs, sites, (),
        intent_of(sites, rewritten), heatmaps,
    )  # fmt: skip
