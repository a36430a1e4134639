"""The stages of an export for one graph of the bundle; `pipeline` calls them in their order."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from attn_deploy import environment, localizing, proving, runtimes
from attn_deploy.accuracy import Run, scores_output
from attn_deploy.built import Built
from attn_deploy.choice import choose
from attn_deploy.data import Dataset, Split, open_data, require_labels
from attn_deploy.errors import UnavailableError, UsageError
from attn_deploy.inputs import make_feeds, named_specs, narrowed
from attn_deploy.intent import intent_of, site_entries
from attn_deploy.judged_samples import JudgedSamples
from attn_deploy.manifest import Graph, graph_file
from attn_deploy.measuring import Conditions, Measured, measure_candidates
from attn_deploy.options import ExportOptions
from attn_deploy.parity import parity_cases
from attn_deploy.planning import Planner
from attn_deploy.progress import Progress
from attn_deploy.proving import Proof
from attn_deploy.receipt import MAIN, SCHEMA_VERSION, CandidateEntry, DataEntry, Receipt
from attn_deploy.searching import Samples
from attn_deploy.session import BATCH, Array
from attn_deploy.target import Precision, Target
from attn_deploy.tuning import MIN_CALL_MS, SECONDS, Tuned, is_tuned, tune, tuned_levels

if TYPE_CHECKING:
    from attn_deploy.export.canonical import CanonicalModel
    from attn_deploy.export.capture import CapturedModel
    from attn_deploy.export.lower.lowered import Batches
    from attn_deploy.export.lower.lowered import Conditions as LoweringConditions
    from attn_deploy.export.rewrite import RewrittenModel
    from attn_deploy.export.sources import LoadedSource

DATA_BATCH = 8
TUNING_BUDGET_S = SECONDS
SCORED_BATCHES = 4
"""Of those that calibrate: what each part of the model is tried on when its precision is searched."""


class GraphExport:
    """One graph: what every stage needs, so that stages are methods of few arguments. `root` is the bundle's folder."""

    def __init__(self, name: str, source: LoadedSource, options: ExportOptions, progress: Progress) -> None:
        self.name = name
        self.options = options
        self.source = source
        self.progress = progress
        self.threads = options.threads or environment.available_cores()
        self.host = environment.host() | runtimes.device_facts(options.targets)
        self.dataset: Dataset | None = None
        self.split: Split | None = None
        self.judged = self.calibrated = 0
        self.warnings: list[str] = []
        self.not_run: list[Built] = []

    def open_data(self) -> None:
        """Opens `--data` early: a wrong path must not be told after minutes of work."""
        options = self.options
        if options.data is None:
            if options.budget.max_drop is not None:
                raise UsageError("--max-drop needs labelled data", next_step="add --data FOLDER")
            if options.budget.min_agreement is not None and Precision.AUTO in options.precisions:
                raise UsageError("a plan is searched for --min-agreement on data", next_step="add --data FOLDER")
            return
        specs = named_specs(self.source.inputs, options.dims)
        self.dataset = open_data(
            options.data, inputs=specs, preprocess=self.source.preprocess, labels=self.source.labels
        )
        if options.budget.max_drop is not None:
            require_labels(self.dataset, "--max-drop asks for accuracy")
        self.split = self.dataset.split(options.calibration_samples, options.eval_samples, options.seed)
        if self.split.note:
            self.warnings.append(self.split.note)
        if self.name != MAIN:
            self._require_fitting(self.split)

    def _require_fitting(self, split: Split) -> None:
        """Of several graphs only one fits data of a fixed size: that must not be told when the others are built."""
        try:
            next(iter(split.judgement.batches(1)), None)
        except UsageError as error:
            error.next_step = "give a folder of images, which are prepared for each resolution; or export one by one"
            raise

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
        self, root: Path, rewritten: RewrittenModel, canonical: CanonicalModel, unavailable: Mapping[Target, str]
    ) -> tuple[list[Proof], list[CandidateEntry]]:
        """Lowers every candidate to a file and opens it; those of targets that cannot run here are only written."""
        from attn_deploy.export.build import build_candidates, save_sources
        from attn_deploy.export.candidates import Means

        options = self.options
        folder = self._folder(root)
        folder.mkdir(exist_ok=True)
        save_sources(canonical, folder)
        captured = rewritten.captured
        planner = Planner(canonical, options, self.threads, self.progress, self.warnings)
        tuned = self._tune(captured, canonical, planner, unavailable)
        conditions = {target: self._conditions(target, tuned, planner) for target in options.targets}
        calibration = self._calibration(captured)
        size = None if self.split is None else self.split.calibration.size
        means = planner.prepared(Means(calibration, _open_model, options.exclude), size)
        planned, search = planner.auto(
            means, None if tuned is None else tuned_levels(tuned), lambda: self._samples(captured, calibration)
        )
        extra = {t: runtimes.variant_options(t, canonical.dims, options.runtime_options) for t in options.targets}
        proofs, not_run = [], []
        self.progress.stage("candidates")
        for candidate in build_candidates(
            rewritten, canonical, folder, options, means, conditions, planned, self.progress
        ):
            candidate = replace(candidate, options={**extra[candidate.target], **candidate.options})
            if candidate.precision is Precision.AUTO and not candidate.target.on_gpu:
                candidate = replace(candidate, search=search)
            if tuned is not None and is_tuned(candidate, tuned):
                candidate = replace(candidate, tuning=tuned.entry(candidate.precision))
            if candidate.target in unavailable:
                self.not_run.append(candidate)
                not_run.append(_not_run(candidate, unavailable[candidate.target]))
                continue
            with runtimes.progress_of(candidate.target, self.progress):
                proofs.append(proving.opened(candidate, self.threads, canonical.inputs, canonical.outputs))
        return proofs, not_run

    def _tune(
        self, captured: CapturedModel, canonical: CanonicalModel, planner: Planner, unavailable: Mapping[Target, str]
    ) -> Tuned | None:
        """The fastest level of each unit on the CPU; None where that is no target here, or not worth it."""
        from attn_deploy.export.levelled import LevelledModel

        options, cpu = self.options, Target.ONNXRUNTIME_CPU
        built = planner.precisions(cpu)
        asked = bool(built & {Precision.FP32, Precision.INT8, Precision.AUTO}) and cpu not in unavailable
        if not asked or options.tune is False:
            return None
        plan = planner.int8 if any(precision.quantized for precision in built) else None
        model = LevelledModel(canonical, frozenset(runtimes.kernel_names(cpu)), plan)
        try:
            return tune(
                model, self._single(captured), threads=self.threads, seconds=TUNING_BUDGET_S, progress=self.progress,
                min_call_ms=0.0 if options.tune else MIN_CALL_MS, verdict=built != {Precision.INT8},
            )  # fmt: skip
        except UnavailableError as error:
            self.warnings.append(f"not tuned: {error.what} ({error.got}; {error.expected})")
            return None

    def _samples(self, captured: CapturedModel, calibration: Batches) -> Samples:
        """What a search scores and judges with: parts of the data, or without data typical made inputs."""
        split, single = self.split, self._single(captured)
        scoring = tuple(itertools.islice(calibration(), SCORED_BATCHES))
        scores = scores_output({name: value.shape for name, value in captured.reference(single).items()})
        if split is None:
            cases = [case for case in parity_cases(captured.inputs, captured.dims) if case.typical]
            judged = JudgedSamples(lambda: ((case.feeds, None) for case in cases), captured.reference)
        else:
            batches = split.judgement.batches
            size = DATA_BATCH if BATCH in captured.dims else captured.inputs[0].shape[0]
            judged = JudgedSamples(lambda: ((b.feeds, b.labels) for b in batches(size)), captured.reference)
        return Samples(scoring, judged, scores, single)

    def _conditions(self, target: Target, tuned: Tuned | None, planner: Planner) -> LoweringConditions:
        from attn_deploy.export.lower.lowered import Conditions

        found = {} if tuned is None or target is not Target.ONNXRUNTIME_CPU else tuned_levels(tuned)
        kernels = frozenset(runtimes.kernel_names(target))
        blocks = target is Target.ONNXRUNTIME_CPU and self.options.plan is None and runtimes.multiplies_blocks()
        plan = planner.int8 if any(p.quantized for p in planner.precisions(target)) else None
        return Conditions(kernels, self.options.tensorrt_version, found, plan, blocks)

    def _folder(self, root: Path) -> Path:
        return root / graph_file(self.name, "")

    def _calibration(self, captured: CapturedModel) -> Batches:
        """Feeds to calibrate on: the user's, or made ones, which is said."""

        def batches() -> Iterable[Mapping[str, Array]]:
            if self.split is not None:
                seen = 0
                for batch in self.split.calibration.batches(DATA_BATCH):
                    seen += len(batch.keys)
                    self.calibrated = max(self.calibrated, seen)  # not every pass needs all of them
                    yield batch.feeds
                return
            warning = "ranges were calibrated on random inputs: give --data for those of real activations"
            if warning not in self.warnings:
                self.warnings.append(warning)
            for seed in range(1000, 1000 + (self.options.calibration_samples // DATA_BATCH or 1)):
                yield make_feeds(captured.inputs, batch=DATA_BATCH if BATCH in captured.dims else None, seed=seed)

        return batches

    def prove(self, proofs: Sequence[Proof], captured: CapturedModel) -> None:
        """Read-back, parity and accuracy."""
        self.progress.stage("parity")
        split = self.split
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

    def locate(self, proof: Proof, root: Path, captured: CapturedModel) -> str:
        """Where a candidate that failed parity went wrong first, on inputs on which it did."""
        self.progress.stage("blocks")
        split = self.split
        real = None if split is None else lambda: next(iter(split.judgement.batches(DATA_BATCH))).feeds
        case = localizing.telling_case(proof.cases, parity_cases(captured.inputs, captured.dims), real)
        try:
            probe = localizing.Probe(case.name, case.feeds, captured.reference(case.feeds))
            graphs = localizing.own_graphs(self._folder(root))
            found = localizing.localize(proof.built, graphs, probe, threads=self.threads)
        except Exception as error:  # what is to be told is that parity failed, whatever a broken model does in parts
            return f"the module could not be found: {error}"
        return found.verdict()

    def measure(self, proofs: Sequence[Proof], captured: CapturedModel) -> Measured:
        """Latency of what passed beside its peers, and memory."""
        conditions = Conditions(self._single(captured), self.threads, self.options.opset)
        measured = measure_candidates(proofs, captured, conditions, self.progress)
        self.warnings += [f"the peer {name} was not measured: {reason}" for name, reason in measured.absent.items()]
        return measured

    def receipt(
        self, rewritten: RewrittenModel, canonical: CanonicalModel, proofs: Sequence[Proof],
        not_run: Sequence[CandidateEntry], measured: Measured,
    ) -> Receipt:  # fmt: skip
        """The receipt of this graph alone."""
        batch = measured.conditions.batch
        candidates = [proving.entry(p, measured.of(p.built.id), batch, self.threads) for p in proofs] + list(not_run)
        chosen = choose(candidates, measured.clearly_faster)
        warnings = [*self.warnings, environment.load_warning(self.host), environment.throttling_note(self.host)]
        warnings += [] if self.dataset is None else self.dataset.short
        if any(c.precision == Precision.FP16 and c.target == Target.ONNXRUNTIME_CPU for c in candidates):
            warnings.append("fp16 on an x86 CPU is storage only: weights take half the file and are computed in FP32")
        sites = site_entries(rewritten, canonical)
        return Receipt(
            schema_version=SCHEMA_VERSION,
            source=self.source.description,
            weights=self.source.weights,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=self.options.command,
            host={k: ", ".join(v) if isinstance(v, (list, tuple)) else v for k, v in self.host.items()},
            versions=environment.versions(),
            data=self._data_entry(),
            sites=sites,
            candidates=tuple(candidates),
            peers=measured.peer_entries(tuple(chosen.values())),
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

    def keep(self, root: Path, canonical: CanonicalModel, proofs: Sequence[Proof], receipt: Receipt) -> Graph:
        """The graph as the manifest has it. Variants that were not chosen are removed."""
        kept = set(receipt.chosen.values()) | {c.id for c in receipt.candidates if c.status == "not_run"}
        if self.options.keep_best and not kept:
            kept = {max(proofs, key=lambda p: min((c.sqnr_db for c in p.cases), default=0.0)).built.id}
        variants = {}
        for built in (*(p.built for p in proofs), *self.not_run):
            if built.id not in kept:
                for file in built.held:
                    file.unlink()
                continue
            library = runtimes.library_name(built.target) if built.library else None
            variants[built.id] = built.variant(
                library, {file: file.relative_to(root).as_posix() for file in built.held}
            )
        graph = Graph(canonical.inputs, canonical.outputs, canonical.dims, variants, self.source.inputs)
        if self.name == MAIN:
            return graph
        return msgspec.structs.replace(graph, chosen=receipt.chosen, preprocess=self.source.preprocess)


def _open_model(model: Any) -> Run:
    """Opens an ONNX model in memory, for calibration."""
    import onnx_ir

    content = onnx_ir.to_proto(model).SerializeToString()
    return runtimes.open_session(Target.ONNXRUNTIME_CPU, content).run


def _not_run(built: Built, reason: str) -> CandidateEntry:
    return CandidateEntry(
        id=built.id, target=str(built.target), precision=str(built.precision), status="not_run", reason=reason,
        exempt=built.exempt, storage=built.storage, blocks=built.blocks,
    )  # fmt: skip
