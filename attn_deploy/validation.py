"""validate(): is a bundle whole, and is what it runs here still the model that it was made from?"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from attn_deploy import bundle as bundles
from attn_deploy import environment, loading, localizing, proving, runtimes
from attn_deploy.accuracy import Run, scores_output
from attn_deploy.built import Built
from attn_deploy.bundle import Bundle, open_bundle
from attn_deploy.choice import Budget, choose
from attn_deploy.data import Part, open_data
from attn_deploy.errors import BundleError, ParityError, UsageError
from attn_deploy.extras import require_export
from attn_deploy.inputs import make_feeds
from attn_deploy.latency import Measurement
from attn_deploy.localizing import Localization
from attn_deploy.manifest import Graph
from attn_deploy.parity import Case, parity_cases
from attn_deploy.progress import Progress, Silent
from attn_deploy.proving import Proof
from attn_deploy.receipt import CandidateEntry, Receipt
from attn_deploy.session import Array
from attn_deploy.target import Precision, Target

if TYPE_CHECKING:
    from attn_deploy.export.capture import CapturedModel

EVAL_SAMPLES = 200
DATA_BATCH = 8
LATENCY_BUDGET_S = 10.0


class Validation(msgspec.Struct, frozen=True):
    """What was checked. `candidates` are rows as in the receipt, measured here."""

    bundle: str
    reference: str
    files: int
    candidates: tuple[CandidateEntry, ...]
    skipped: dict[str, str]
    """Variants that this host cannot run, with the reason."""
    promoted: tuple[str, ...]
    """Variants that were `not_run` and have now passed on this host: the bundle says so from here on."""
    localized: tuple[Localization, ...] = ()
    """With `localize`: for each variant the first block that is out of its tolerance, or none."""

    @property
    def passed(self) -> bool:
        sound = all(c.status == "passed" for c in self.candidates) and all(p.first is None for p in self.localized)
        return bool(self.candidates) and sound


def validate(
    path: str | os.PathLike[str],
    *,
    reference: str | None = None,
    weights: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    data: str | None = None,
    localize: bool = False,
    budget: Budget | None = None,
    eval_samples: int = EVAL_SAMPLES,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Checks every file of the bundle, then each variant against `reference`: a source (`weights` and `arguments` are
    its own), another bundle, or by default the bundle's own portable FP32 model. `localize` compares each block of
    each variant alone as well. Raises BundleError for a damaged bundle; a candidate that fails is a row."""
    progress = progress or Silent()
    progress.stage("files")
    bundle = open_bundle(path)
    bundle.check_all()
    graph = loading.graph_of(bundle.manifest, None)
    receipt = bundle.receipt()
    threads = threads or environment.available_cores()
    against = _reference(bundle, graph, reference, weights, arguments or {}, threads)
    proofs, skipped = _open(bundle, graph, receipt, threads)
    budget = budget or Budget()
    progress.stage("parity")
    cases = parity_cases(graph.examples, graph.dims)
    references = [_run_reference(against.run, case.feeds, graph) for case in cases]
    for proof in proofs:
        tolerance = budget.tolerance(proof.built.precision)
        proving.check_parity(proof, cases, references, tolerance, has_data=data is not None)
        if data is None and reference is None:
            _judge_by_receipt(proof, receipt)
        proving.read_back(proof, cases[0].feeds)
    real: Callable[[], Mapping[str, Array]] | None = None
    if data is not None:
        progress.stage("accuracy")
        dataset = open_data(
            data, inputs=graph.inputs, preprocess=bundle.manifest.preprocess, labels=bundle.manifest.labels
        )
        split = dataset.split(receipt.data.calibration_asked, eval_samples, receipt.data.seed)
        scores = scores_output({o.name: o.shape for o in graph.outputs})
        total = split.judgement.size or 0
        proving.check_accuracy(
            proofs, split.judgement, DATA_BATCH, against.run, scores, budget, lambda done: progress.step(done, total)
        )
        real = functools.partial(_first_feeds, split.judgement)
    localized = _localize(bundle, proofs, against, cases, real, budget, threads, progress) if localize else ()
    progress.stage("latency")
    batch = graph.dims["batch"].min if "batch" in graph.dims else None
    feeds = make_feeds(graph.examples, batch=batch, seed=31)
    measurement = proving.measure_latency(proofs, (), feeds, max_total_s=LATENCY_BUDGET_S, progress=progress.step)
    size = next(iter(feeds.values())).shape[0]
    entries = tuple(proving.entry(p, measurement, size, threads) for p in proofs)
    return Validation(
        bundle=str(path), reference=against.name, files=len(bundle.manifest.files), candidates=entries,
        skipped=skipped, promoted=_promote(bundle, receipt, entries, measurement), localized=localized,
    )  # fmt: skip


LOSS_DB = 3.0
"""How far an INT8 variant may fall behind what its receipt says of the same made inputs: kernels round differently."""


def _judge_by_receipt(proof: Proof, receipt: Receipt) -> None:
    """INT8 that was judged on data is held to what it gave on made inputs when it was proven: its ranges fit the data,
    not noise, so that a fixed floor would say nothing here."""
    row = next((c for c in receipt.candidates if c.id == proof.built.id), None)
    if proof.built.precision is not Precision.INT8 or row is None or row.parity is None or row.status != "passed":
        return
    recorded = {(c.name, c.output): c.sqnr_db for c in row.parity.cases}
    proof.fault = None
    for number, case in enumerate(proof.cases):
        floor = recorded.get((case.name, case.output), 0.0) - LOSS_DB
        passed = case.sqnr_db >= floor
        proof.cases[number] = msgspec.structs.replace(case, judged=True, passed=passed)
        if not passed:
            proof.fault = (
                f"output {case.output!r} on {case.name}: {case.sqnr_db:.1f} dB, receipt {floor + LOSS_DB:.1f} dB"
            )


def require_passed(validation: Validation) -> None:
    """Raises ParityError naming the first variant that failed, and where it went wrong if that was looked for;
    BundleError when there was none to try. The error carries the validation as its attribute `validation`."""
    places = {p.variant: p for p in validation.localized}
    for candidate in validation.candidates:
        place = places.get(candidate.id)
        broken = place is not None and place.first is not None
        if candidate.status == "passed" and not broken:
            continue
        what = "is not the same model as" if candidate.status != "passed" else "has a block that differs from"
        again = "export it again from its source"
        error = ParityError(
            f"the variant {candidate.id} {what} {validation.reference}",
            where=validation.bundle if place is None else f"{validation.bundle}, {place.verdict()}",
            got=candidate.reason or f"{place.out_of_tolerance if place else 0} blocks out of tolerance",
            next_step=again if place is not None else f"name the module with --localize, or {again}",
        )
        error.validation = validation  # type: ignore[attr-defined]
        raise error
    if not validation.candidates:
        raise BundleError("no variant of the bundle can run here", where=validation.bundle, got=validation.skipped)


@dataclass(frozen=True)
class _Reference:
    """What the variants are compared with, whole; `graphs` gives it as ONNX for comparing block by block. `eager`
    says that `run` is PyTorch."""

    run: Run
    name: str
    graphs: Callable[[], localizing.Graphs]
    eager: bool = False


def _reference(
    bundle: Bundle, graph: Graph, text: str | None, weights: str | None, arguments: Mapping[str, Any], threads: int
) -> _Reference:
    if text is None:
        model = bundle.check(bundles.PORTABLE)
        session = runtimes.open_session(
            Target.ONNXRUNTIME_CPU, model, inputs=graph.inputs, outputs=graph.outputs, threads=threads
        )
        return _Reference(session.run, "its own portable FP32 model", lambda: localizing.own_graphs(bundle.root))
    if (Path(text) / bundles.MANIFEST).is_file():
        other = open_bundle(text)
        return _Reference(
            loading.load(text, threads=threads).run,
            text,
            lambda: _graphs_of_bundle(bundle, other.check(bundles.PORTABLE)),
        )
    require_export()
    from attn_deploy.export.capture import capture
    from attn_deploy.export.sources import SourceRequest, load_source

    source = load_source(text, SourceRequest("", weights, arguments, graph.examples))
    captured = capture(source, graph.dims)
    name = f"{source.description} ({source.weights})"
    return _Reference(captured.reference, name, lambda: _graphs_of_source(bundle, captured, name), eager=True)


def _graphs_of_bundle(bundle: Bundle, portable: Path) -> localizing.Graphs:
    import onnx_ir as ir

    own = localizing.own_graphs(bundle.root)
    return dataclasses.replace(own, reference=ir.load(portable), reference_name=str(portable))


def _graphs_of_source(bundle: Bundle, captured: CapturedModel, name: str) -> localizing.Graphs:
    from attn_deploy.export.recognize import recognize
    from attn_deploy.export.rewrite import rewrite
    from attn_deploy.export.to_onnx import portable, to_onnx

    canonical = to_onnx(rewrite(captured, recognize(captured)))
    own = localizing.own_graphs(bundle.root)
    return dataclasses.replace(own, reference=portable(canonical), reference_name=f"{name}, captured anew")


def _localize(
    bundle: Bundle, proofs: Sequence[Proof], against: _Reference, cases: Sequence[Case],
    real: Callable[[], Mapping[str, Array]] | None, budget: Budget, threads: int, progress: Progress,
) -> tuple[Localization, ...]:  # fmt: skip
    progress.stage("blocks")
    graphs = against.graphs()
    found = []
    for done, proof in enumerate(proofs):
        progress.step(done, len(proofs))
        case = localizing.telling_case(proof.cases, cases, real)
        probe = localizing.Probe(case.name, case.feeds, against.run(case.feeds) if against.eager else {})
        floor = budget.tolerance(Precision.INT8).min_sqnr_db
        found.append(localizing.localize(proof.built, graphs, probe, threads=threads, int8_min_sqnr_db=floor))
    return tuple(found)


def _first_feeds(part: Part) -> Mapping[str, Array]:
    return next(iter(part.batches(DATA_BATCH))).feeds


def _run_reference(run: Run, feeds: Mapping[str, Array], graph: Graph) -> Mapping[str, Array]:
    outputs = run(feeds)
    expected = [o.name for o in graph.outputs]
    if sorted(outputs) != sorted(expected):
        raise UsageError("the reference has other outputs", got=", ".join(outputs), expected=", ".join(expected))
    return outputs


def _open(bundle: Bundle, graph: Graph, receipt: Receipt, threads: int) -> tuple[list[Proof], dict[str, str]]:
    rows = {c.id: c for c in receipt.candidates}
    proofs, skipped = [], {}
    for name, variant in graph.variants.items():
        target = Target(variant.target)
        reason = runtimes.availability(target)
        if reason is not None:
            skipped[name] = reason
            continue
        row = rows.get(name)
        built = Built(
            id=name,
            target=target,
            precision=Precision(variant.precision),
            files=tuple(bundle.path(f) for f in variant.files),
            library=variant.library is not None,
            options=variant.options,
            sites=tuple(receipt_sites(receipt)),
            exempt=row.exempt if row is not None else (),
            storage=row.storage if row is not None else {},
        )
        proofs.append(Proof(built, proving.open_candidate(built, threads, graph.inputs, graph.outputs)))
    return proofs, skipped


def receipt_sites(receipt: Receipt) -> Sequence[tuple[str, str]]:
    """(module, operator's node name) of the recognized sites."""
    return [(s.module, s.node) for s in receipt.sites if s.node is not None]


def _promote(
    bundle: Bundle, receipt: Receipt, entries: Sequence[CandidateEntry], measurement: Measurement | None
) -> tuple[str, ...]:
    """Rows that were `not_run` and passed here are put into receipt and manifest. Only their targets choose anew:
    what was chosen on another host was measured there."""
    waiting = {c.id for c in receipt.candidates if c.status == "not_run"}
    passed = {e.id: e for e in entries if e.id in waiting and e.status == "passed"}
    if not passed:
        return ()
    rows = tuple(passed.get(c.id, c) for c in receipt.candidates)
    targets = {row.target for row in passed.values()}
    faster = measurement.clearly_faster if measurement is not None else lambda a, b: False
    chosen = receipt.chosen | choose([e for e in entries if e.target in targets], faster)
    bundle.rewrite(msgspec.structs.replace(receipt, candidates=rows, chosen=chosen), chosen)
    return tuple(passed)
