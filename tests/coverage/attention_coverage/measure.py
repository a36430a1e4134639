"""One model of the table: exported stage by stage, its attention compared with what is expected, its numbers with
PyTorch's.

Run in a process of its own (`attn_deploy.memory.serve`), so that its peak of memory is its own.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from attention_coverage.expectations import checked_in, of_source
from attention_coverage.kinds import Expected, differences
from attention_coverage.models import BY_NAME, CoverageModel
from attn_deploy import runtimes
from attn_deploy.errors import AttnDeployError
from attn_deploy.export.build import save_sources
from attn_deploy.export.candidates import Means, Plan, lowered_candidates
from attn_deploy.export.canonical import CanonicalModel, portable
from attn_deploy.export.capture import CapturedModel, capture
from attn_deploy.export.levelled import LevelledModel
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.lower.lowered import Conditions
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import RewrittenModel, rewrite
from attn_deploy.export.site_parity import record_sites, site_cases
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.inputs import make_feeds
from attn_deploy.memory import measure_peak, serve
from attn_deploy.parity import FP32_MAX_REL, FP32_MIN_SQNR_DB, Moments, Tolerance, sqnr_db
from attn_deploy.runtimes import openvino
from attn_deploy.session import Array, DimBounds, Session
from attn_deploy.target import Precision, Target

BATCHES = (1, 3)
TIMEOUT_S = 900.0
TOLERANCE = Tolerance(FP32_MIN_SQNR_DB, FP32_MAX_REL)


class Count(msgspec.Struct, frozen=True):
    kind: str
    found: int
    expected: int
    skipped: int


class OutputParity(msgspec.Struct, frozen=True):
    """One file in one engine against eager PyTorch: the worst of all outputs and batches."""

    file: str
    engine: str
    sqnr_db: float
    max_rel: float
    passed: bool
    native: bool = False
    """With kernels of the native library: `file` says at which grain they ran."""


class SiteDb(msgspec.Struct, frozen=True):
    """The operator of one site in ONNX Runtime against the same in PyTorch."""

    module: str
    sqnr_db: float


class Record(msgspec.Struct, frozen=True):
    """What the table says of a model. `error` is what ended its export, in which case the rest is what was reached."""

    name: str
    source: str
    tiny: bool
    error: str | None = None
    input_shapes: dict[str, list[int]] = {}
    parameters: int = 0
    counts: tuple[Count, ...] = ()
    skipped: tuple[tuple[str, str, str], ...] = ()
    """Kind, module and reason."""
    differences: tuple[str, ...] = ()
    unproven: tuple[str, ...] = ()
    sites: tuple[SiteDb, ...] = ()
    outputs: tuple[OutputParity, ...] = ()
    seconds: dict[str, float] = {}
    peak_mb: float = 0.0
    """Of the process that measured it; 0 when that was the caller's own."""

    @property
    def passed(self) -> bool:
        """Exported, found as expected, every site proven and close, every file the same model in every engine."""
        close = all(s.sqnr_db >= FP32_MIN_SQNR_DB for s in self.sites) and all(o.passed for o in self.outputs)
        return self.error is None and not self.differences and not self.unproven and close and bool(self.outputs)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 2)


def measure(model: CoverageModel, *, tiny: bool, threads: int) -> Record:
    """Exports the model and compares everything that the table shows. An error of any stage is a row, not an end."""
    torch.set_num_threads(threads)
    clock, reached = _Clock(), dict[str, Any]()
    error = None
    try:
        _measure(model, tiny, threads, clock, reached)
    except Exception as raised:  # whatever a package or an engine raises is what the row has to say
        stage = next(reversed(clock.seconds), "source")
        error = f"{stage}: {type(raised).__name__}: {raised}"
    return Record(name=model.name, source=model.source, tiny=tiny, error=error, seconds=clock.seconds, **reached)


def _measure(model: CoverageModel, tiny: bool, threads: int, clock: _Clock, reached: dict[str, Any]) -> None:
    with clock.stage("source"):
        source = model.load(tiny=tiny)
    reached["input_shapes"] = {i.name: list(i.shape) for i in source.inputs}
    reached["parameters"] = sum(p.numel() for p in source.module.parameters())
    tree = of_source(source)
    expected = tree if tiny else checked_in(model.name)
    stale = tuple(f"expected.json against the module tree: {line}" for line in differences(tree, expected))
    with clock.stage("capture"):
        captured = capture(source, {"batch": DimBounds()})
    with clock.stage("recognition"):
        findings = recognize(captured)
    with clock.stage("rewriting"):
        rewritten = rewrite(captured, findings)
    reached.update(_compare(expected, rewritten, stale))
    with clock.stage("onnx"):
        canonical = to_onnx(rewritten)
    with clock.stage("site parity"):
        reached["sites"] = tuple(_sites(rewritten, canonical, threads))
    with clock.stage("engines"), tempfile.TemporaryDirectory() as folder:
        save_sources(canonical, Path(folder))
        opened = chain(_engines(Path(folder), threads), _native(canonical, Path(folder), threads))
        reached["outputs"] = tuple(_outputs(captured, opened))


def _compare(expected: Counter[Expected], rewritten: RewrittenModel, stale: tuple[str, ...]) -> dict[str, Any]:
    sites = Counter(Expected(s.kind, s.module) for s in rewritten.sites)
    skipped = Counter(Expected(s.kind, s.module, s.reason.name) for s in rewritten.skipped)
    kinds = list(dict.fromkeys(item.kind for item in (*expected, *sites)))
    return {
        "counts": tuple(
            Count(
                str(kind),
                found=sum(n for item, n in sites.items() if item.kind is kind),
                expected=sum(n for item, n in expected.items() if item.kind is kind and item.skip is None),
                skipped=sum(n for item, n in skipped.items() if item.kind is kind),
            )
            for kind in kinds
        ),
        "skipped": tuple((str(s.kind), s.module, str(s.reason)) for s in rewritten.skipped),
        "differences": stale + differences(expected, sites + skipped),
        "unproven": tuple(s.module for s in rewritten.sites if not s.proven),
    }


def _sites(rewritten: RewrittenModel, canonical: CanonicalModel, threads: int) -> Iterator[SiteDb]:
    for case in site_cases(canonical, portable(canonical), record_sites(rewritten)):
        session = runtimes.open_session(Target.ONNXRUNTIME_CPU, case.model, threads=threads)
        (got,) = session.run(case.feeds).values()
        session.close()
        yield SiteDb(case.module, round(sqnr_db(case.expected, got), 1))


class _Opened(NamedTuple):
    """A file opened in an engine."""

    file: str
    engine: str
    session: Session
    native: bool = False


def _engines(folder: Path, threads: int) -> Iterator[_Opened]:
    """canonical.onnx by its function bodies in ONNX Runtime, portable.onnx in ONNX Runtime and OpenVINO."""
    for file in ("canonical", "portable"):
        path = folder / f"{file}.onnx"
        yield _Opened(file, "onnxruntime", runtimes.open_session(Target.ONNXRUNTIME_CPU, path, threads=threads))
    yield _Opened("portable", "openvino", openvino.open_session(folder / "portable.onnx", threads=threads))


def _native(canonical: CanonicalModel, folder: Path, threads: int) -> Iterator[_Opened]:
    """The lowerings with kernels of the native library: all that can be at each grain, and the blocked layout."""
    kernels = frozenset(runtimes.kernel_names(Target.ONNXRUNTIME_CPU))
    model = LevelledModel(canonical, kernels)
    for level in model.levels[1:]:
        files = model.save(model.uniform(level), folder / f"{level}.onnx")
        session = runtimes.open_session(Target.ONNXRUNTIME_CPU, files[0], threads=threads, library=True)
        yield _Opened(level, "onnxruntime", session, native=True)
    offered = onnxruntime_cpu.alternatives(canonical, Precision.FP32, Conditions(kernels))
    plans = [Plan(Target.ONNXRUNTIME_CPU, Precision.FP32, a) for a in offered if a.options]
    for built, _ in lowered_candidates(canonical, plans, folder, Means(), _Silent()):
        if runtimes.prepare(built.target, built.files[0], library=built.library, options=built.options) is None:
            session = runtimes.open_session(
                built.target, built.files[0], threads=threads, library=built.library, options=built.options
            )
            yield _Opened("blocked", "onnxruntime", session, native=True)


class _Silent:
    def step(self, done: int, total: int) -> None:
        pass


def _outputs(captured: CapturedModel, opened: Iterable[_Opened]) -> Iterator[OutputParity]:
    feeds = [make_feeds(captured.inputs, batch=batch, seed=40 + batch) for batch in BATCHES]
    references = [captured.reference(f) for f in feeds]
    for one in opened:
        results = [one.session.run(f) for f in feeds]
        one.session.close()
        yield _worst(one, references, results)


def _worst(opened: _Opened, references: list[dict[str, Array]], results: list[Mapping[str, Array]]) -> OutputParity:
    fidelities, passed = [], True
    for reference, result in zip(references, results, strict=True):
        for name, expected in reference.items():
            moments = Moments()
            moments.add(expected, result[name])
            fidelity = moments.fidelity()
            fidelities.append(fidelity)
            passed &= TOLERANCE.holds(fidelity) and not moments.constant
    sqnr, max_rel = round(min(f.sqnr_db for f in fidelities), 1), max(f.max_rel for f in fidelities)
    return OutputParity(opened.file, opened.engine, sqnr, max_rel, passed, opened.native)


def measure_apart(model: CoverageModel, out: Path, *, threads: int) -> Record:
    """`measure` in a process of its own, its record left in `out`. A process that dies is a row as well."""
    out.unlink(missing_ok=True)
    payload = {"name": model.name, "threads": threads, "out": str(out)}
    try:
        peak_mb = measure_peak("attention_coverage.measure", payload, timeout_s=TIMEOUT_S)
        record = msgspec.json.decode(out.read_bytes(), type=Record)
    except AttnDeployError as error:
        peak_mb, record = 0.0, Record(name=model.name, source=model.source, tiny=False, error=str(error))
    record = msgspec.structs.replace(record, peak_mb=round(peak_mb))
    out.write_bytes(msgspec.json.encode(record))
    return record


def _serve(payload: dict[str, Any]) -> None:
    record = measure(BY_NAME[payload["name"]], tiny=False, threads=payload["threads"])
    Path(payload["out"]).write_bytes(msgspec.json.encode(record))


if __name__ == "__main__":
    serve(_serve)
