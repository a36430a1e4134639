"""validate(): is a bundle whole, and is what it runs here still the model that it was made from?"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from attn_deploy import environment, loading, localizing, proving, runtimes
from attn_deploy.accuracy import scores_output
from attn_deploy.built import Built
from attn_deploy.bundle import Bundle, open_bundle
from attn_deploy.choice import Budget, choose
from attn_deploy.data import Part, open_data
from attn_deploy.errors import AttnDeployError, BundleError, NotAsAskedError, ParityError
from attn_deploy.inputs import make_feeds
from attn_deploy.latency import Measurement
from attn_deploy.localizing import Localization
from attn_deploy.manifest import Graph, graph_file
from attn_deploy.parity import Case, parity_cases
from attn_deploy.plan_file import read_plan
from attn_deploy.progress import Progress, Silent, of_graph
from attn_deploy.proving import Proof
from attn_deploy.readback import PROVIDERS
from attn_deploy.receipt import CandidateEntry, Receipt, merged
from attn_deploy.reference import Reference, SourceOfReference, references
from attn_deploy.report import html_page
from attn_deploy.resolutions import about
from attn_deploy.session import Array
from attn_deploy.target import Precision, Target

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
    not_as_asked: tuple[str, ...] = ()
    """Variants that failed for what runs them here, not for their numbers: another precision or device, or nothing."""

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
    graph: str | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Checks every file of the bundle, then each variant against `reference`: a source (`weights` and `arguments` are
    its own), another bundle, or by default the bundle's own portable FP32 model. `localize` compares each block of
    each variant alone as well; `graph` is the only one to try of several. Raises BundleError for a damaged bundle; a
    candidate that fails is a row."""
    progress = progress or Silent()
    progress.stage("files")
    bundle = open_bundle(path)
    bundle.check_all()
    graphs = loading.graphs_of(bundle.manifest, graph)
    receipts = bundle.receipts()
    threads = threads or environment.available_cores()
    given = SourceOfReference(reference, weights, arguments or {})
    asked = _Asked(given, data, localize, budget or Budget(), eval_samples, threads)
    open_reference = references(bundle, given, threads)
    found: dict[str, _Validated] = {}
    for name in graphs:
        with about(name):
            validating = _GraphValidation(bundle, name, receipts[name], open_reference(name), asked)
            found[name] = validating.run(of_graph(progress, name))
    return Validation(
        bundle=str(path),
        reference=next(iter(found.values())).reference,
        files=len(bundle.manifest.files),
        candidates=tuple(replace(e, graph=name) for name, of in found.items() for e in of.entries),
        skipped={graph_file(name, v): reason for name, of in found.items() for v, reason in of.skipped.items()},
        promoted=_promote(bundle, receipts, found),
        localized=tuple(replace(place, graph=name) for name, of in found.items() for place in of.localized),
        not_as_asked=tuple(graph_file(name, v) for name, of in found.items() for v in of.not_as_asked),
    )


@dataclass(frozen=True)
class _Asked:
    """What is checked of every graph."""

    reference: SourceOfReference
    data: str | None
    localize: bool
    budget: Budget
    eval_samples: int
    threads: int


@dataclass(frozen=True)
class _Validated:
    """What was seen of one graph."""

    reference: str
    entries: tuple[CandidateEntry, ...]
    skipped: dict[str, str]
    measurement: Measurement | None
    localized: tuple[Localization, ...]
    not_as_asked: tuple[str, ...]


class _GraphValidation:
    """One graph of the bundle with its own receipt and reference."""

    def __init__(self, bundle: Bundle, name: str, receipt: Receipt, against: Reference, asked: _Asked) -> None:
        self.bundle = bundle
        self.name = name
        self.graph = bundle.manifest.graphs[name]
        self.receipt = receipt
        self.against = against
        self.asked = asked

    def run(self, progress: Progress) -> _Validated:
        """Parity, accuracy where there is data, blocks where asked, and latency of every variant that runs here."""
        graph, asked, against = self.graph, self.asked, self.against
        proofs, skipped = _open(self.bundle, graph, self.receipt, asked.threads, progress)
        progress.stage("parity")
        cases = parity_cases(graph.examples, graph.dims)
        expected = [against.outputs(case.feeds, graph) for case in cases]
        for proof in proofs:
            tolerance = asked.budget.tolerance(proof.built.precision)
            proving.check_parity(proof, cases, expected, tolerance, has_data=asked.data is not None)
            if asked.data is None and asked.reference.text is None:
                proving.judge_by_row(proof, next((c for c in self.receipt.candidates if c.id == proof.built.id), None))
            proving.read_back(proof, cases[0].feeds)
        real = None if asked.data is None else self._judge(asked.data, proofs, progress)
        localized = self._localize(proofs, cases, real, progress) if asked.localize else ()
        progress.stage("latency")
        batch = graph.dims["batch"].min if "batch" in graph.dims else None
        feeds = make_feeds(graph.examples, batch=batch, seed=31)
        measurement = proving.measure_latency(proofs, (), feeds, max_total_s=LATENCY_BUDGET_S, progress=progress.step)
        size = next(iter(feeds.values())).shape[0]
        entries = tuple(proving.entry(p, measurement, size, asked.threads) for p in proofs)
        not_as_asked = tuple(p.built.id for p in proofs if p.fault is not None and p.fault == p.asked_fault)
        return _Validated(against.name, entries, skipped, measurement, localized, not_as_asked)

    def _judge(self, data: str, proofs: Sequence[Proof], progress: Progress) -> Callable[[], Mapping[str, Array]]:
        """Accuracy on the judged part of the data; gives a function that reads its first batch."""
        progress.stage("accuracy")
        graph, asked, manifest = self.graph, self.asked, self.bundle.manifest
        dataset = open_data(
            data, inputs=graph.inputs, preprocess=manifest.preprocess_of(self.name), labels=manifest.labels
        )
        split = dataset.split(self.receipt.data.calibration_asked, asked.eval_samples, self.receipt.data.seed)
        scores = scores_output({o.name: o.shape for o in graph.outputs})
        total = split.judgement.size or 0
        proving.check_accuracy(
            proofs, split.judgement, DATA_BATCH, self.against.run, scores, asked.budget,
            lambda done: progress.step(done, total),
        )  # fmt: skip
        return functools.partial(_first_feeds, split.judgement)

    def _localize(
        self, proofs: Sequence[Proof], cases: Sequence[Case], real: Callable[[], Mapping[str, Array]] | None,
        progress: Progress,
    ) -> tuple[Localization, ...]:  # fmt: skip
        progress.stage("blocks")
        against, asked = self.against, self.asked
        graphs = against.graphs()
        found = []
        alive = [proof for proof in proofs if proof.session is not None]
        for done, proof in enumerate(alive):
            progress.step(done, len(alive))
            case = localizing.telling_case(proof.cases, cases, real)
            probe = localizing.Probe(case.name, case.feeds, against.run(case.feeds) if against.eager else {})
            floor = asked.budget.tolerance(Precision.INT8).min_sqnr_db
            found.append(localizing.localize(proof.built, graphs, probe, threads=asked.threads, int8_min_sqnr_db=floor))
        return tuple(found)


def require_passed(validation: Validation) -> None:
    """Raises for the first variant that failed: ParityError, with where it went wrong if that was looked for, or
    NotAsAskedError where its numbers are right and what runs it here is not what the bundle says; BundleError when
    there was none to try. The error carries the validation as its attribute `validation`."""
    places = {(p.graph, p.variant): p for p in validation.localized}
    for candidate in validation.candidates:
        place = places.get((candidate.graph, candidate.id))
        broken = place is not None and place.first is not None
        if candidate.status == "passed" and not broken:
            continue
        if graph_file(candidate.graph, candidate.id) in validation.not_as_asked:
            error = _not_as_asked(validation, candidate)
        else:
            error = _not_the_same(validation, candidate, place)
        error.validation = validation  # type: ignore[attr-defined]
        raise error
    if not validation.candidates:
        raise BundleError("no variant of the bundle can run here", where=validation.bundle, got=validation.skipped)


def _not_as_asked(validation: Validation, candidate: CandidateEntry) -> AttnDeployError:
    precision, target = candidate.precision.upper(), candidate.target
    return NotAsAskedError(
        f"the variant {graph_file(candidate.graph, candidate.id)} does not run here as it should",
        where=validation.bundle,
        got=candidate.reason,
        expected=f"{precision} on {PROVIDERS[Target(target)]}",
        next_step=f"export it again for this host, with another --precision than {candidate.precision} or without "
        f"--target {target}",
    )


def _not_the_same(validation: Validation, candidate: CandidateEntry, place: Localization | None) -> AttnDeployError:
    what = "is not the same model as" if candidate.status != "passed" else "has a block that differs from"
    again = "export it again from its source"
    return ParityError(
        f"the variant {graph_file(candidate.graph, candidate.id)} {what} {validation.reference}",
        where=validation.bundle if place is None else f"{validation.bundle}, {place.verdict()}",
        got=candidate.reason or f"{place.out_of_tolerance if place else 0} blocks out of tolerance",
        next_step=again if place is not None else f"name the module with --localize, or {again}",
    )


def _first_feeds(part: Part) -> Mapping[str, Array]:
    return next(iter(part.batches(DATA_BATCH))).feeds


def _open(
    bundle: Bundle, graph: Graph, receipt: Receipt, threads: int, progress: Progress
) -> tuple[list[Proof], dict[str, str]]:
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
            blocks=row.blocks if row is not None else (),
            plan=None if variant.plan is None else read_plan(bundle.path(variant.plan)),
            search=row.search if row is not None else None,
        )
        with runtimes.progress_of(target, progress):
            proofs.append(proving.opened(built, threads, graph.inputs, graph.outputs))
    return proofs, skipped


def receipt_sites(receipt: Receipt) -> Sequence[tuple[str, str]]:
    """(module, operator's node name) of the recognized sites."""
    return [(s.module, s.node) for s in receipt.sites if s.node is not None]


def _promote(bundle: Bundle, receipts: Mapping[str, Receipt], found: Mapping[str, _Validated]) -> tuple[str, ...]:
    """Rows that were `not_run` and passed here are put into receipt and manifest."""
    promoted: list[str] = []
    updated = dict(receipts)
    for name, of in found.items():
        updated[name], passed = _promoted(receipts[name], of)
        promoted += [graph_file(name, variant) for variant in passed]
    if promoted:
        targets = {Target(e.target) for of in found.values() for e in of.entries}
        receipt = _proven_here(merged(updated), promoted, targets)
        bundle.rewrite(receipt, receipt.chosen, html_page(receipt))
    return tuple(promoted)


def _proven_here(receipt: Receipt, promoted: Sequence[str], targets: set[Target]) -> Receipt:
    """The receipt with this host's GPU, and a note on which rows are of this host: the export's may be another."""
    device = runtimes.device_facts(targets)
    host = environment.host()
    where = ", ".join(str(fact) for fact in (host["cpu"], device.get("gpu_name")) if fact is not None)
    note = f"{', '.join(promoted)}: proven after the export by validate, with times of its host: {where}"
    return replace(
        receipt,
        host=receipt.host | device,
        versions=environment.versions() | receipt.versions,
        warnings=(*receipt.warnings, note),
    )


def _promoted(receipt: Receipt, found: _Validated) -> tuple[Receipt, list[str]]:
    """The graph's receipt with what has passed now. Only its targets choose anew: what was chosen on another host was
    measured there."""
    waiting = {c.id for c in receipt.candidates if c.status == "not_run"}
    passed = {e.id: e for e in found.entries if e.id in waiting and e.status == "passed"}
    if not passed:
        return receipt, []
    rows = tuple(passed.get(c.id, c) for c in receipt.candidates)
    targets = {row.target for row in passed.values()}
    faster = found.measurement.clearly_faster if found.measurement is not None else lambda a, b: False
    chosen = receipt.chosen | choose([row for row in rows if row.target in targets], faster)
    return replace(receipt, candidates=rows, chosen=chosen), list(passed)
