"""source -> captured model -> sites -> canonical ONNX -> candidates -> parity, accuracy, latency -> choice, bundle."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_deploy import bundle as bundles
from attn_deploy import environment, localizing, proving, runtimes
from attn_deploy.accuracy import Run, scores_output
from attn_deploy.built import Built
from attn_deploy.choice import Budget, choose
from attn_deploy.data import Dataset, Split, open_data, require_labels
from attn_deploy.errors import UnavailableError, UsageError
from attn_deploy.extras import require_export
from attn_deploy.inputs import ExampleInput, make_feeds, named_specs, narrowed
from attn_deploy.intent import intent_of, site_entries
from attn_deploy.latency import Measurement, System
from attn_deploy.manifest import SCHEMA_VERSION, Graph, Manifest, Variant
from attn_deploy.parity import parity_cases
from attn_deploy.preprocess import read_preprocess, validate_preprocess
from attn_deploy.progress import Progress, Silent
from attn_deploy.proving import Proof
from attn_deploy.receipt import SCHEMA_VERSION as RECEIPT_VERSION
from attn_deploy.receipt import CandidateEntry, DataEntry, Peer, Receipt
from attn_deploy.runtimes import native
from attn_deploy.session import BATCH, Array, DimBounds
from attn_deploy.target import Precision, Target
from attn_deploy.verdict import All, require_as_asked, require_fused

if TYPE_CHECKING:
    from attn_deploy.export.capture import CapturedModel
    from attn_deploy.export.rewrite import RewrittenModel
    from attn_deploy.export.sources import LoadedSource
    from attn_deploy.export.to_onnx import CanonicalModel

CALIBRATION_SAMPLES = 64
EVAL_SAMPLES = 200
DATA_BATCH = 8
LATENCY_BUDGET_S = 30.0
GRAPH = "main"
EAGER, PLAIN = "eager PyTorch", "plain ONNX Runtime"


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked for; the command line makes one. `precisions_asked` says that they were named, so that one
    which fails is an error and not a row of the receipt."""

    source: str = "demo"
    weights: str | None = None
    source_args: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[ExampleInput] = ()
    dims: Mapping[str, DimBounds] = field(default_factory=lambda: {"batch": DimBounds()})
    targets: Sequence[Target] = (Target.ONNXRUNTIME_CPU,)
    precisions: Sequence[Precision] = (Precision.FP32, Precision.INT8)
    precisions_asked: bool = False
    exclude: Sequence[str] = ()
    data: str | None = None
    preprocess: str | None = None
    calibration_samples: int = CALIBRATION_SAMPLES
    eval_samples: int = EVAL_SAMPLES
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    keep_best: bool = False
    require_fused: int | All | None = None
    max_latency_ms: float | None = None
    allow_unproven: bool = False
    opset: int = 20
    threads: int | None = None
    force: bool = False
    command: str = ""


@dataclass(frozen=True)
class ExportResult:
    path: Path
    receipt: Receipt


def export_model(out: str | Path, options: ExportOptions, progress: Progress | None = None) -> ExportResult:
    """Exports `options.source` to the bundle `out`, whole or not at all.

    Raises UsageError and its kin (2), ParityError (3), NotAsAskedError (4), TooSlowError (5), UnavailableError (6);
    the errors 3 to 5 carry the receipt of what was built as their attribute `receipt`.
    """
    out, progress = Path(out), progress or Silent()
    bundles.check_free(out, force=options.force)
    unavailable = _check_targets(options)
    require_export()
    from attn_deploy.export.sources import SourceRequest, load_source

    progress.stage("source")
    request = SourceRequest("", options.weights, options.source_args, options.inputs)
    source = _with_preprocess(load_source(options.source, request), options.preprocess)
    work = _Work(options, source, progress)
    split = work.open_data()
    rewritten, canonical = work.find_and_write()
    with bundles.writing(out, force=options.force) as folder:
        proofs, not_run = work.build(folder, rewritten, canonical, split, unavailable)
        work.prove(proofs, rewritten.captured, split)
        require_fused(options, site_entries(rewritten, canonical), proofs)
        measurement = work.measure(proofs, rewritten.captured)
        receipt = work.receipt(rewritten, canonical, proofs, not_run, measurement)
        require_as_asked(options, receipt, proofs, lambda proof: work.locate(proof, folder, rewritten.captured, split))
        progress.stage("bundle")
        work.write(folder, canonical, proofs, receipt)
    return ExportResult(out, receipt)


def _check_targets(options: ExportOptions) -> dict[Target, str]:
    """Targets that cannot run here, with the reason; an error unless that was allowed."""
    unavailable = {t: reason for t in options.targets if (reason := runtimes.availability(t)) is not None}
    if unavailable and not options.allow_unproven:
        target, reason = next(iter(unavailable.items()))
        raise UnavailableError(
            f"the target {target} cannot run here", got=reason, expected="a host that can prove the result",
            next_step="attn-deploy doctor; or --allow-unproven to write it without proof",
        )  # fmt: skip
    return unavailable


def _with_preprocess(source: LoadedSource, path: str | None) -> LoadedSource:
    config = source.preprocess if path is None else read_preprocess(path)
    if config is None:
        return source
    shapes = {i.name: i.shape for i in source.inputs}
    if config.input not in shapes:
        raise UsageError("the preprocessing names no input of the model", got=config.input, expected=", ".join(shapes))
    shape = shapes[config.input]
    if len(shape) != 4:
        if path is None:
            return replace(source, preprocess=None)
        raise UsageError("the preprocessing feeds an input that is no image", got=list(shape), where=config.input)
    validate_preprocess(config, *shape[1:])
    return replace(source, preprocess=config)


class _Work:
    """One export: what every stage needs, so that stages are methods of few arguments."""

    def __init__(self, options: ExportOptions, source: LoadedSource, progress: Progress) -> None:
        self.options = options
        self.source = source
        self.progress = progress
        self.threads = options.threads or environment.available_cores()
        self.host = environment.host()
        self.dataset: Dataset | None = None
        self.judged = self.calibrated = 0
        self.warnings: list[str] = []
        self.peers: list[System] = []
        self.not_run: list[Built] = []

    def open_data(self) -> Split | None:
        """Opens `--data` early: a wrong path must not be told after minutes of work."""
        options = self.options
        if options.data is None:
            if options.budget.max_drop is not None:
                raise UsageError("--max-drop needs labelled data", next_step="add --data FOLDER")
            return None
        specs = named_specs(self.source.inputs, options.dims)
        self.dataset = open_data(
            options.data, inputs=specs, preprocess=self.source.preprocess, labels=self.source.labels
        )
        if options.budget.max_drop is not None:
            require_labels(self.dataset, "--max-drop asks for accuracy")
        split = self.dataset.split(options.calibration_samples, options.eval_samples, options.seed)
        if split.note:
            self.warnings.append(split.note)
        return split

    def find_and_write(self) -> tuple[RewrittenModel, CanonicalModel]:
        """Capture, recognition, rewriting and canonical ONNX."""
        from attn_deploy.export.capture import capture
        from attn_deploy.export.recognize import recognize
        from attn_deploy.export.rewrite import rewrite
        from attn_deploy.export.to_onnx import to_onnx

        self.progress.stage("capture")
        captured = capture(self.source, self.options.dims)
        self.warnings += narrowed(self.options.dims, captured.dims)
        self.progress.stage("attention sites")
        rewritten = rewrite(captured, recognize(captured))
        self.progress.stage("ONNX")
        return rewritten, to_onnx(rewritten, opset=self.options.opset)

    def build(
        self, folder: Path, rewritten: RewrittenModel, canonical: CanonicalModel, split: Split | None,
        unavailable: Mapping[Target, str],
    ) -> tuple[list[Proof], list[CandidateEntry]]:  # fmt: skip
        """Lowers every candidate to a file and opens it; those of targets that cannot run here are only written."""
        from attn_deploy.export.build import build_candidates, save_sources

        self.progress.stage("candidates")
        save_sources(canonical, folder)
        calibration = self._calibration(rewritten.captured, split)
        kernels = native.kernel_names()
        proofs, not_run = [], []
        for candidate in build_candidates(
            rewritten, canonical, folder, self.options, calibration, _open_model, kernels, self.progress
        ):
            if candidate.target in unavailable:
                self.not_run.append(candidate)
                not_run.append(_not_run(candidate, unavailable[candidate.target]))
                continue
            session = proving.open_candidate(candidate, self.threads, canonical.inputs, canonical.outputs)
            proofs.append(Proof(candidate, session))
        return proofs, not_run

    def _calibration(self, captured: CapturedModel, split: Split | None) -> Any:
        """Feeds to calibrate on: the user's, or made ones, which is said."""

        def batches() -> Iterable[Mapping[str, Array]]:
            self.calibrated = 0
            if split is not None:
                for batch in split.calibration.batches(DATA_BATCH):
                    self.calibrated += len(batch.keys)
                    yield batch.feeds
                return
            warning = "INT8 was calibrated on random inputs: give --data for ranges of real activations"
            if warning not in self.warnings:
                self.warnings.append(warning)
            for seed in range(1000, 1000 + (self.options.calibration_samples // DATA_BATCH or 1)):
                yield make_feeds(captured.inputs, batch=DATA_BATCH if BATCH in captured.dims else None, seed=seed)

        return batches

    def prove(self, proofs: Sequence[Proof], captured: CapturedModel, split: Split | None) -> None:
        """Read-back, parity and accuracy."""
        self.progress.stage("parity")
        cases = parity_cases(captured.inputs, captured.dims)
        references = [captured.reference(case.feeds) for case in cases]
        single = self._single(captured)
        for done, proof in enumerate(proofs):
            self.progress.step(done, len(proofs))
            proving.read_back(proof, single)
            tolerance = self.options.budget.tolerance(proof.built.precision)
            proving.check_parity(proof, cases, references, tolerance, has_data=split is not None)
        if split is None:
            return
        self.progress.stage("accuracy")
        shapes = {name: value.shape for name, value in references[0].items()}

        def progress(samples: int) -> None:
            self.judged = samples
            self.progress.step(samples, split.judgement.size or 0)

        batch = DATA_BATCH if BATCH in captured.dims else captured.inputs[0].shape[0]
        proving.check_accuracy(
            proofs, split.judgement, batch, captured.reference, scores_output(shapes), self.options.budget, progress
        )

    def _single(self, captured: CapturedModel) -> dict[str, Array]:
        batch = captured.dims[BATCH].min if BATCH in captured.dims else None
        return make_feeds(captured.inputs, batch=batch, seed=31)

    def locate(self, proof: Proof, folder: Path, captured: CapturedModel, split: Split | None) -> str:
        """Where a candidate that failed parity went wrong first, on inputs on which it did."""
        self.progress.stage("blocks")
        real = None if split is None else lambda: next(iter(split.judgement.batches(DATA_BATCH))).feeds
        case = localizing.telling_case(proof.cases, parity_cases(captured.inputs, captured.dims), real)
        try:
            probe = localizing.Probe(case.name, case.feeds, captured.reference(case.feeds))
            found = localizing.localize(proof.built, localizing.own_graphs(folder), probe, threads=self.threads)
        except Exception as error:  # what is to be told is that parity failed, whatever a broken model does in parts
            return f"the module could not be found: {error}"
        return found.verdict()

    def measure(self, proofs: Sequence[Proof], captured: CapturedModel) -> Measurement | None:
        """Latency of what passed, against eager PyTorch and plain ONNX Runtime in the same interleaved run; memory."""
        from attn_deploy.export.build import eager_system, plain_model

        self.progress.stage("latency")
        feeds = self._single(captured)
        with plain_model(captured, self.options.opset) as path:
            plain = runtimes.open_session(Target.ONNXRUNTIME_CPU, path, threads=self.threads)
            self.peers = [
                System(PLAIN, lambda: plain.run(feeds)),
                eager_system(captured, feeds, EAGER, self.threads),
            ]
            measurement = proving.measure_latency(
                proofs, self.peers, feeds, max_total_s=LATENCY_BUDGET_S, progress=self.progress.step
            )
        self.progress.stage("memory")
        for done, proof in enumerate(proofs):
            self.progress.step(done, len(proofs))
            if proof.fault is None:
                proving.measure_memory(proof, feeds, self.threads)
        return measurement

    def receipt(
        self, rewritten: RewrittenModel, canonical: CanonicalModel, proofs: Sequence[Proof],
        not_run: Sequence[CandidateEntry], measurement: Measurement | None,
    ) -> Receipt:  # fmt: skip
        batch = next(iter(self._single(rewritten.captured).values())).shape[0]
        candidates = [proving.entry(p, measurement, batch, self.threads) for p in proofs] + list(not_run)
        chosen = choose(candidates, measurement.clearly_faster if measurement is not None else lambda a, b: False)
        warnings = [*self.warnings, environment.load_warning(self.host), environment.throttling_note(self.host)]
        if Precision.FP16 in self.options.precisions:
            warnings.append("fp16 on an x86 CPU is storage only: weights take half the file and are computed in FP32")
        sites = site_entries(rewritten, canonical)
        return Receipt(
            schema_version=RECEIPT_VERSION,
            source=self.source.description,
            weights=self.source.weights,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=self.options.command,
            host={k: ", ".join(v) if isinstance(v, (list, tuple)) else v for k, v in self.host.items()},
            versions=environment.versions(),
            data=self._data_entry(),
            sites=sites,
            candidates=tuple(candidates),
            peers=self._peers(measurement, chosen, batch),
            chosen=chosen,
            warnings=tuple(w for w in warnings if w),
            intent=intent_of(sites, rewritten),
        )

    def _data_entry(self) -> DataEntry:
        if self.dataset is None:
            return DataEntry(seed=self.options.seed)
        return DataEntry(
            path=self.options.data,
            seed=self.options.seed,
            split="by sha256 of seed and key",
            calibration_asked=self.options.calibration_samples,
            judgement_asked=self.options.eval_samples,
            calibration=self.calibrated,
            judgement=self.judged,
            labelled=self.dataset.labelled,
            unreadable=tuple(self.dataset.unreadable),
        )

    def _peers(self, measurement: Measurement | None, chosen: Mapping[str, str], batch: int) -> tuple[Peer, ...]:
        if measurement is None or not chosen:
            return ()
        best = next(iter(chosen.values()))
        rows = []
        for peer in self.peers:
            comparison = measurement.compare(best, peer.name)
            latency = measurement.latency(peer.name, batch, self.threads)
            rows.append(Peer(peer.name, latency, comparison.ratio, comparison.ratio_ci95, comparison.verdict))
        return tuple(rows)

    def write(self, folder: Path, canonical: CanonicalModel, proofs: Sequence[Proof], receipt: Receipt) -> None:
        """Keeps the chosen variants, and writes receipt, report and manifest."""
        from attn_deploy.report import write_html

        kept = set(receipt.chosen.values()) | {c.id for c in receipt.candidates if c.status == "not_run"}
        if self.options.keep_best and not kept:
            kept = {max(proofs, key=lambda p: min((c.sqnr_db for c in p.cases), default=0.0)).built.id}
        variants = {}
        for built in (*(p.built for p in proofs), *self.not_run):
            if built.id not in kept:
                for file in built.files:
                    file.unlink()
                continue
            files = tuple(f.relative_to(folder).as_posix() for f in built.files)
            library = "attn_deploy_native" if built.library else None
            variants[built.id] = Variant(str(built.target), str(built.precision), files, library, built.options)
        (folder / bundles.RECEIPT).write_bytes(bundles.encode(receipt))
        write_html(receipt, folder / bundles.REPORT)
        bundles.write_manifest(
            folder,
            Manifest(
                schema_version=SCHEMA_VERSION,
                name=self.source.name,
                source=self.source.description,
                graphs={
                    GRAPH: Graph(canonical.inputs, canonical.outputs, canonical.dims, variants, self.source.inputs)
                },
                preprocess=self.source.preprocess,
                labels=self.source.labels,
                chosen=receipt.chosen,
                requirements={"attn-deploy": f">={environment.versions().get('attn-deploy', '0')}"},
                files={},
            ),
        )


def _open_model(model: Any) -> Run:
    """Opens an ONNX model in memory, for calibration."""
    import onnx_ir

    content = onnx_ir.to_proto(model).SerializeToString()
    return runtimes.open_session(Target.ONNXRUNTIME_CPU, content).run


def _not_run(built: Built, reason: str) -> CandidateEntry:
    return CandidateEntry(
        id=built.id, target=str(built.target), precision=str(built.precision), status="not_run", reason=reason,
        exempt=built.exempt, storage=built.storage,
    )  # fmt: skip


__all__ = ["ExportOptions", "ExportResult", "export_model"]
