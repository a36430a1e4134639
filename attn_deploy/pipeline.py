"""source -> captured model -> sites -> canonical ONNX -> candidates -> parity, accuracy, latency -> choice, bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from attn_deploy import bundle as bundles
from attn_deploy import environment, runtimes
from attn_deploy.errors import UnavailableError, UsageError
from attn_deploy.extras import require_export
from attn_deploy.graph_export import GraphExport
from attn_deploy.intent import site_entries
from attn_deploy.manifest import SCHEMA_VERSION, Graph, Manifest
from attn_deploy.options import ExportOptions
from attn_deploy.preprocess import Preprocess, at_size, read_preprocess, validate_preprocess
from attn_deploy.progress import Progress, Silent, of_graph
from attn_deploy.receipt import Receipt, merged
from attn_deploy.resolutions import about, require_different, resolutions
from attn_deploy.target import Target
from attn_deploy.verdict import require_as_asked, require_fused

if TYPE_CHECKING:
    from attn_deploy.export.canonical import CanonicalModel
    from attn_deploy.export.rewrite import RewrittenModel
    from attn_deploy.export.sources import LoadedSource


@dataclass(frozen=True)
class ExportResult:
    path: Path
    receipt: Receipt


def export_model(out: str | Path, options: ExportOptions, progress: Progress | None = None) -> ExportResult:
    """Exports `options.source` to the bundle `out`, whole or not at all.

    Raises UsageError and its kin (2), ParityError (3), NotAsAskedError (4), TooSlowError (5), UnavailableError (6);
    the errors 3 to 5 carry the receipt of what was built as their attribute `receipt`. With several resolutions an
    error names the graph that it is about.
    """
    out, progress = Path(out), progress or Silent()
    bundles.check_free(out, force=options.force)
    options = _with_targets(options)
    unavailable = _check_targets(options)
    runtimes.check_runtime_options(options.targets, options.runtime_options)
    require_export()
    _check_precisions(options)
    progress.stage("source")
    works = [
        GraphExport(name, source, options, of_graph(progress, name)) for name, source in _load_sources(options).items()
    ]
    for work in works:
        with about(work.name):
            work.open_data()
    found = []
    for work in works:
        with about(work.name):
            found.append(work.find_and_write())
    graphs: dict[str, Graph] = {}
    receipts: dict[str, Receipt] = {}
    with bundles.writing(out, force=options.force) as folder:
        for work, (rewritten, canonical) in zip(works, found, strict=True):
            with about(work.name):
                graphs[work.name], receipts[work.name] = _prove(work, folder, rewritten, canonical, unavailable)
        progress.stage("bundle")
        receipt = merged(receipts)
        _write(folder, works, graphs, receipt)
    return ExportResult(out, receipt)


def _with_targets(options: ExportOptions) -> ExportOptions:
    if options.targets:
        return options
    return replace(options, targets=runtimes.available() or (Target.ONNXRUNTIME_CPU,), targets_asked=False)


def _check_precisions(options: ExportOptions) -> None:
    """Before any work: a precision that no asked target has, or that a named target lacks, is an error."""
    from attn_deploy.export.lower import pairs

    pairs(options)
    if options.plan is not None and not any(precision.quantized for precision in options.precisions):
        raise UsageError(
            "a plan is for a quantized precision", got=", ".join(options.precisions), expected="int8, auto or fp8",
            next_step="--precision auto with --plan takes the plan as it stands",
        )  # fmt: skip


def _check_targets(options: ExportOptions) -> dict[Target, str]:
    """Targets that cannot run here, with the reason; an error unless that was allowed."""
    unavailable = {t: reason for t in options.targets if (reason := runtimes.availability(t)) is not None}
    if unavailable and not options.allow_unproven:
        target, reason = next(iter(unavailable.items()))
        raise UnavailableError(
            f"the target {target} cannot run here", got=reason, expected="a host that can prove the result",
            next_step="attn-deploy doctor; or --allow-unproven to write it without proof",
        )  # fmt: skip
    for target in options.targets:
        runtimes.kernel_names(target)  # an error where kernels are forced to what this CPU lacks: before any work
    return unavailable


def _load_sources(options: ExportOptions) -> dict[str, LoadedSource]:
    """The source for each graph of the bundle, by the graph's name. Images are prepared as `--preprocess` says, or as
    the source does; for the first resolution as it stands there, for others scaled."""
    from attn_deploy.export.sources import SourceRequest, load_resolutions

    asked = resolutions(options.inputs)
    request = SourceRequest("", options.weights, options.source_args)
    sources = load_resolutions(options.source, request, asked)
    require_different({name: source.inputs for name, source in sources.items()}, options.dims)
    given = None if options.preprocess is None else read_preprocess(options.preprocess)
    for number, (name, source) in enumerate(sources.items()):
        with about(name):
            sources[name] = _with_preprocess(source, given, scaled=number > 0)
    return sources


def _with_preprocess(source: LoadedSource, given: Preprocess | None, *, scaled: bool) -> LoadedSource:
    config = source.preprocess if given is None else given
    if config is None:
        return source
    shapes = {i.name: i.shape for i in source.inputs}
    if config.input not in shapes:
        raise UsageError("the preprocessing names no input of the model", got=config.input, expected=", ".join(shapes))
    shape = shapes[config.input]
    if len(shape) != 4:
        if given is None:
            return replace(source, preprocess=None)
        raise UsageError("the preprocessing feeds an input that is no image", got=list(shape), where=config.input)
    if given is not None and scaled:
        config = at_size(given, *shape[2:])
    validate_preprocess(config, *shape[1:])
    return replace(source, preprocess=config)


def _prove(
    work: GraphExport, folder: Path, rewritten: RewrittenModel, canonical: CanonicalModel,
    unavailable: Mapping[Target, str],
) -> tuple[Graph, Receipt]:  # fmt: skip
    """One graph from its canonical model to its choice: candidates, their proof, and the verdict on them."""
    captured = rewritten.captured
    proofs, not_run = work.build(folder, rewritten, canonical, unavailable)
    work.prove(proofs, captured)
    require_fused(work.options, site_entries(rewritten, canonical), proofs)
    measurement = work.measure(proofs, captured)
    receipt = merged({work.name: work.receipt(rewritten, canonical, proofs, not_run, measurement)})
    require_as_asked(work.options, receipt, proofs, lambda proof: work.locate(proof, folder, captured))
    return work.keep(folder, canonical, proofs, receipt), receipt


def _write(folder: Path, works: list[GraphExport], graphs: Mapping[str, Graph], receipt: Receipt) -> None:
    """Receipt, report and manifest."""
    from attn_deploy.report import write_html

    (folder / bundles.RECEIPT).write_bytes(bundles.encode(receipt))
    write_html(receipt, folder / bundles.REPORT)
    source = works[0].source
    bundles.write_manifest(
        folder,
        Manifest(
            schema_version=SCHEMA_VERSION,
            name=source.name,
            source=source.description,
            graphs=dict(graphs),
            preprocess=source.preprocess,
            labels=source.labels,
            chosen=receipt.chosen,
            requirements={"attn-deploy": f">={environment.versions().get('attn-deploy', '0')}"},
            files={},
        ),
    )


__all__ = ["ExportOptions", "ExportResult", "export_model"]
