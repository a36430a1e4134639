"""retune(): the fastest lowering of a bundle's model on this host, measured anew and kept in the bundle: of FP32, and
of each variant that follows a precision plan by its plan."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from attn_deploy import environment, proving, runtimes
from attn_deploy.built import Built
from attn_deploy.bundle import CANONICAL, Bundle, file_entry, open_bundle
from attn_deploy.choice import Budget, choose
from attn_deploy.errors import AttnDeployError, ParityError, StorageError, UnavailableError, UsageError
from attn_deploy.extras import require_lowering
from attn_deploy.inputs import make_feeds
from attn_deploy.latency import Measurement
from attn_deploy.loading import graphs_of
from attn_deploy.manifest import Variant, graph_file
from attn_deploy.parity import parity_cases
from attn_deploy.progress import Progress, Silent, of_graph
from attn_deploy.proving import Proof
from attn_deploy.receipt import CandidateEntry, Receipt, Search, Tuning, merged
from attn_deploy.reference import own_reference
from attn_deploy.relowering import lowerings, planned_variants
from attn_deploy.report import html_page
from attn_deploy.resolutions import about
from attn_deploy.runtimes import native
from attn_deploy.target import Precision, Target, parse_target
from attn_deploy.tuning import Tuned, is_tuned, tune, tuned_levels

if TYPE_CHECKING:
    from attn_deploy.export.canonical import CanonicalModel

CPU = Target.ONNXRUNTIME_CPU
VERDICT_SHARE = 0.4
"""Of the seconds: for the run that chooses between the candidates and what the bundle holds."""


class GraphRetuning(msgspec.Struct, frozen=True):
    """One graph: `before` and `chosen` are variants, `candidates` rows as in the receipt with this host's times.
    `tuning` is None where no part of the model has another level than stock."""

    before: str | None
    chosen: str
    tuning: Tuning | None
    candidates: tuple[CandidateEntry, ...]


class Retuning(msgspec.Struct, frozen=True):
    bundle: str
    cpu: str
    threads: int
    graphs: dict[str, GraphRetuning]


def retune(
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    threads: int | None = None,
    seconds: float = 40.0,
    graph: str | None = None,
    progress: Progress | None = None,
) -> Retuning:
    """Lowers the bundle's canonical model at the levels that are fastest here, in FP32 and by each plan that it holds,
    proves that against the bundle's portable model, measures it against what else the bundle holds, and rewrites the
    bundle with what is fastest. Every plan stays in it, with the fastest lowering of it.

    `seconds`: for all measuring of a graph. Needs onnx and onnx_ir, not torch. Raises UsageError (another target, no
    variant for the CPU), UnavailableError (no native library, a missing package), StorageError (read-only).
    """
    progress = progress or Silent()
    bundle = open_bundle(path)
    _check(bundle, target)
    bundle.check_all()
    threads = threads or environment.available_cores()
    receipts = bundle.receipts()
    found: dict[str, _Retuned] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in graphs_of(bundle.manifest, graph):
            with about(name):
                retuning = _GraphRetuning(bundle, name, receipts[name], threads, seconds, Path(folder, name))
                found[name] = retuning.run(of_graph(progress, name))
        progress.stage("bundle")
        _rewrite(bundle, receipts, found)
    cpu = str(environment.host()["cpu"])
    return Retuning(str(path), cpu, threads, {name: of.outcome for name, of in found.items()})


def _check(bundle: Bundle, target: str | None) -> None:
    if target is not None and parse_target(target) is not CPU:
        raise UsageError(
            "this target has nothing to tune", got=target, expected=CPU,
            next_step="TensorRT times its kernels itself when it builds the engine",
        )  # fmt: skip
    held = {variant.target for graph in bundle.manifest.graphs.values() for variant in graph.variants.values()}
    if CPU not in held:
        raise UsageError(
            "the bundle has no variant to tune", where=str(bundle.root), got=", ".join(sorted(held)), expected=CPU
        )
    reason = runtimes.availability(CPU)
    if reason is not None:
        raise UnavailableError(f"{CPU} cannot run here", got=reason, next_step="attn-deploy doctor")
    status = native.status()
    if not status.available:
        why, _, command = (status.reason or "").partition("; next: ")
        raise UnavailableError(
            "there is no native library to tune with", got=why, next_step=command or "attn-deploy doctor"
        )
    require_lowering()
    if not os.access(bundle.root, os.W_OK):
        raise StorageError(
            "the bundle cannot be written",
            where=str(bundle.root),
            next_step="tune a copy of it in a folder of your own",
        )


@dataclass(frozen=True)
class _Retuned:
    """What is to be written of one graph: `fresh` in place of the variants `gone`."""

    outcome: GraphRetuning
    fresh: tuple[Built, ...]
    gone: frozenset[str]
    anew: frozenset[str]
    """The precisions that were lowered anew, kept or not."""


class _GraphRetuning:
    def __init__(self, bundle: Bundle, name: str, receipt: Receipt, threads: int, seconds: float, folder: Path) -> None:
        self.bundle = bundle
        self.name = name
        self.graph = bundle.manifest.graphs[name]
        self.receipt = receipt
        self.threads = threads
        self.seconds = seconds
        self.folder = folder
        self.planned = planned_variants(bundle, name)

    def run(self, progress: Progress) -> _Retuned:
        """Levels, candidates, their proof, and the choice among them and the variants that stay."""
        from attn_deploy.export.levelled import LevelledModel

        graph = self.graph
        canonical = canonical_of(self.bundle, self.name, self.receipt)
        batch = graph.dims["batch"].min if "batch" in graph.dims else None
        feeds = make_feeds(graph.examples, batch=batch, seed=31)
        plan = self.planned[0].plan if self.planned else None
        model = LevelledModel(canonical, frozenset(native.kernel_names()), plan)
        seconds = self.seconds * (1 - VERDICT_SHARE)
        tuned = tune(model, feeds, threads=self.threads, seconds=seconds, progress=progress)
        progress.stage("candidates")
        proofs = [self._opened(built) for built in self._candidates(canonical, tuned, progress)]
        progress.stage("parity")
        self._prove(proofs)
        others = [self._opened(built) for built in self._staying()]
        progress.stage("latency")
        measurement = proving.measure_latency(
            [*proofs, *others], (), feeds, max_total_s=self.seconds * VERDICT_SHARE, progress=progress.step
        )
        size = next(iter(feeds.values())).shape[0]
        rows = tuple(proving.entry(proof, measurement, size, self.threads) for proof in proofs)
        return self._chosen(rows, proofs, self._timed(others, measurement, size), measurement, tuned)

    def _candidates(self, canonical: CanonicalModel, tuned: Tuned | None, progress: Progress) -> list[Built]:
        from attn_deploy.export.candidates import Means, Plan, lowered_candidates
        from attn_deploy.export.lower import RECIPES
        from attn_deploy.export.lower.lowered import Conditions

        self.folder.mkdir()
        levels = None if tuned is None else tuned_levels(tuned)
        conditions = Conditions(frozenset(native.kernel_names()), tuned=levels or {})
        offered = RECIPES[CPU].alternatives(canonical, Precision.FP32, conditions)
        plans = [Plan(CPU, Precision.FP32, alternative) for alternative in offered]
        made = [built for built, _ in lowered_candidates(canonical, plans, self.folder, Means(), progress)]
        for variant in list(self.planned):
            plans = lowerings(variant, canonical, conditions, levels)
            try:
                again = [built for built, _ in lowered_candidates(canonical, plans, self.folder, Means(), progress)]
            except AttnDeployError:  # a plan that needs data: what the bundle holds of it stays
                self.planned.remove(variant)
                continue
            made += [dataclasses.replace(built, search=self._search_of(built.precision)) for built in again]
        if tuned is None:
            return made
        return [dataclasses.replace(b, tuning=tuned.entry(b.precision)) if is_tuned(b, tuned) else b for b in made]

    def _search_of(self, precision: Precision) -> Search | None:
        """How the plan was found, at export: it stays, with the name of its host."""
        row = self._row(precision)
        return None if row is None else row.search

    def _row(self, precision: Precision) -> CandidateEntry | None:
        """The receipt's row of the variant that is lowered again in this precision."""
        name = next((v.name for v in self.planned if v.precision is precision), None)
        return next((row for row in self.receipt.candidates if row.id == name), None)

    def _staying(self) -> list[Built]:
        """Variants for the CPU that have passed and are not lowered anew: neither in FP32 nor with a plan."""
        rows = {row.id: row for row in self.receipt.candidates if row.status == "passed"}
        anew = {variant.name for variant in self.planned}
        return [
            Built(
                id=name,
                target=CPU,
                precision=Precision(variant.precision),
                files=tuple(self.bundle.path(file) for file in variant.files),
                library=variant.library is not None,
                options=variant.options,
                sites=(),
            )
            for name, variant in self.graph.variants.items()
            if variant.target == CPU and variant.precision != Precision.FP32 and name in rows and name not in anew
        ]

    def _opened(self, built: Built) -> Proof:
        return proving.opened(built, self.threads, self.graph.inputs, self.graph.outputs)

    def _prove(self, proofs: Sequence[Proof]) -> None:
        """Against the bundle's portable model. Raises ParityError where nothing is left."""
        graph = self.graph
        reference = own_reference(self.bundle, self.name, self.threads)
        cases = parity_cases(graph.examples, graph.dims)
        expected = [reference.outputs(case.feeds, graph) for case in cases]
        for proof in proofs:
            precision = proof.built.precision
            proving.check_parity(proof, cases, expected, Budget().tolerance(precision), has_data=False)
            proving.judge_by_row(proof, self._row(precision))
            proving.read_back(proof, cases[0].feeds)
        if all(proof.fault is not None for proof in proofs):
            raise ParityError(
                "no lowering of the canonical model is the same model here", where=str(self.bundle.root),
                got=proofs[0].fault, expected=reference.name, next_step="attn-deploy validate tells more",
            )  # fmt: skip

    def _timed(self, proofs: Sequence[Proof], measurement: Measurement | None, batch: int) -> list[CandidateEntry]:
        """The receipt's rows of the variants that stay, with their times here."""
        rows = {row.id: row for row in self.receipt.candidates}
        return [
            msgspec.structs.replace(
                rows[proof.built.id], latency=proving.entry(proof, measurement, batch, self.threads).latency
            )
            for proof in proofs
            if proof.fault is None
        ]

    def _chosen(
        self, rows: tuple[CandidateEntry, ...], proofs: Sequence[Proof], timed: Sequence[CandidateEntry],
        measurement: Measurement | None, tuned: Tuned | None,
    ) -> _Retuned:  # fmt: skip
        """What is fastest here; and of each plan the fastest lowering in the place of the one that was there."""
        faster = measurement.clearly_faster if measurement is not None else lambda a, b: False
        chosen = choose([*rows, *timed], faster)[CPU]
        before = self.bundle.manifest.chosen_of(self.name).get(CPU)
        outcome = GraphRetuning(before, chosen, None if tuned is None else tuned.entry(), (*rows, *timed))
        kept = {chosen} | {best for v in self.planned if (best := _fastest(rows, v.precision)) is not None}
        fresh = tuple(proof.built for proof in proofs if proof.built.id in kept)
        kept_precisions = {built.precision for built in fresh}
        variants = self.graph.variants.items()
        gone = frozenset(n for n, v in variants if v.target == CPU and Precision(v.precision) in kept_precisions)
        return _Retuned(outcome, fresh, gone, frozenset(str(proof.built.precision) for proof in proofs))


def _fastest(rows: Sequence[CandidateEntry], precision: Precision) -> str | None:
    """Of the rows in this precision that passed; None where none did: what the bundle holds stays."""
    passed = [r for r in rows if r.precision == precision and r.status == "passed" and r.latency is not None]
    return min(passed, key=lambda r: r.latency.p50_ms).id if passed else None  # type: ignore[union-attr]


def canonical_of(bundle: Bundle, graph: str, receipt: Receipt) -> CanonicalModel:
    """The graph's canonical model as the export had it, but for what only PyTorch knows of its sites."""
    import onnx_ir as ir

    from attn_deploy.export.canonical import CanonicalModel, CanonicalSite

    specs = bundle.manifest.graphs[graph]
    sites = tuple(
        CanonicalSite(
            site.kind, site.module, site.source_line, site.operator, site.node, fx_node="",
            proven=site.status == "recognized", flops=site.flops, bytes=site.bytes,
        )
        for site in receipt.sites
        if site.node is not None and site.operator is not None
    )  # fmt: skip
    model = ir.load(bundle.check(graph_file(graph, CANONICAL)))
    return CanonicalModel(model, sites, specs.inputs, specs.outputs, specs.dims)


def _rewrite(bundle: Bundle, receipts: Mapping[str, Receipt], found: Mapping[str, _Retuned]) -> None:
    """Receipt, page, manifest and new files of every graph that was tuned."""
    updated = dict(receipts)
    variants: dict[str, dict[str, Variant]] = {}
    with bundle.adopting() as adopt:
        for name, retuned in found.items():
            updated[name] = _with_rows(receipts[name], retuned)
            variants[name] = _variants(bundle, name, retuned, adopt)
        names = [graph_file(name, of.outcome.chosen) for name, of in found.items()]
        receipt = _tuned_here(merged(updated), names)
        bundle.rewrite(receipt, receipt.chosen, html_page(receipt), variants)


def _variants(
    bundle: Bundle, graph: str, retuned: _Retuned, adopt: Callable[[str, Sequence[Path]], tuple[str, ...]]
) -> dict[str, Variant]:
    """Those of the graph from here on: the fresh ones first."""
    held = bundle.manifest.graphs[graph].variants
    made = {}
    for fresh in retuned.fresh:
        before = held.get(fresh.id)
        if before is None or [bundle.manifest.files[f] for f in before.held] != [file_entry(f) for f in fresh.held]:
            library = runtimes.library_name(CPU) if fresh.library else None
            before = fresh.variant(library, dict(zip(fresh.held, adopt(graph, fresh.held), strict=True)))
        made[fresh.id] = before
    return made | {name: variant for name, variant in held.items() if name not in retuned.gone | made.keys()}


def _with_rows(receipt: Receipt, retuned: _Retuned) -> Receipt:
    """Fresh rows in place of those of the same precisions on the CPU. Peers were measured beside another variant: they
    go where that one did."""
    outcome = retuned.outcome
    fresh = {row.id for row in outcome.candidates}
    others = [
        row
        for row in receipt.candidates
        if row.id not in fresh and not (row.target == CPU and row.precision in retuned.anew)
    ]
    gone = {row.id for row in receipt.candidates} - {row.id for row in others}
    return replace(
        receipt,
        candidates=(*outcome.candidates, *others),
        peers=tuple(peer for peer in receipt.peers if peer.against not in gone),
        chosen=receipt.chosen | {str(CPU): outcome.chosen},
    )


def _tuned_here(receipt: Receipt, names: Sequence[str]) -> Receipt:
    """With a note on which rows are of this host: the export's may be another."""
    cpu = environment.host()["cpu"]
    note = f"{', '.join(names)}: chosen by tune; the times of candidates for {CPU} are of its host: {cpu}"
    earlier = (w for w in receipt.warnings if ": chosen by tune; " not in w)
    return replace(receipt, versions=environment.versions() | receipt.versions, warnings=(*earlier, note))
