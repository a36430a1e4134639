"""benchmark(): bundles and sources against their peers, interleaved in one run for each batch size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from attn_deploy import bundle as bundles
from attn_deploy import environment, loading, runtimes
from attn_deploy.accuracy import Run
from attn_deploy.errors import UsageError
from attn_deploy.extras import require_export
from attn_deploy.inputs import ExampleInput, make_feeds
from attn_deploy.latency import System, measure
from attn_deploy.progress import Progress, Silent
from attn_deploy.receipt import MAIN, Latency
from attn_deploy.resolutions import about, require_one_resolution
from attn_deploy.session import Array, DimBounds
from attn_deploy.target import Target, nearest

PEERS = ("eager", "compile", "onnxruntime", "openvino")
"""Eager PyTorch, torch.compile, ONNX Runtime and OpenVINO on what torch.onnx.export makes by itself."""


class BenchRow(msgspec.Struct, frozen=True):
    """One system at one batch size. `ratio` = its time over that of the item it is a peer of: more than 1 means that
    the item is faster. An item itself has no ratio but to the first item, when there are several."""

    item: str
    system: str
    latency: Latency
    against: str | None
    ratio: float | None
    ratio_ci95: tuple[float, float] | None
    verdict: str | None


class Benchmark(msgspec.Struct, frozen=True):
    host: dict[str, str | int | float | None]
    versions: dict[str, str]
    rows: tuple[BenchRow, ...]
    warnings: tuple[str, ...]


def benchmark(
    items: Sequence[str],
    *,
    against: Sequence[str] = ("eager", "onnxruntime"),
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    seconds: float = 30.0,
    inputs: Sequence[ExampleInput] = (),
    graph: str | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Times each bundle or source and its peers. `seconds` is the budget for each batch size.

    A bundle with several graphs is an item for each of them, or for the named one alone. A source without a bundle is
    its peers alone. Weights do not change the time, so sources are built without any.
    """
    for peer in against:
        if peer not in PEERS:
            raise UsageError("unknown peer", got=peer, expected=nearest(peer, PEERS))
    if not items or any(b < 1 for b in batches):
        raise UsageError("nothing to measure", got=f"{len(items)} items, batches {list(batches)}")
    require_one_resolution(inputs)
    progress = progress or Silent()
    threads = threads or environment.available_cores()
    facts = environment.host()
    rows: list[BenchRow] = []
    with contextlib.ExitStack() as stack:
        progress.stage("models")
        opened = [one for item in items for one in _open(stack, item, graph, against, threads, inputs)]
        for batch in batches:
            progress.stage(f"batch {batch}")
            rows += _measure(opened, batch, threads, seconds, progress)
    warnings = (environment.load_warning(facts), environment.throttling_note(facts))
    return Benchmark(
        host={k: ", ".join(v) if isinstance(v, (list, tuple)) else v for k, v in facts.items()},
        versions=environment.versions(),
        rows=tuple(rows),
        warnings=tuple(w for w in warnings if w),
    )


class _Item:
    """A bundle or source with the functions that run it and its peers."""

    def __init__(
        self, name: str, examples: Sequence[ExampleInput], dims: Mapping[str, DimBounds], runs: Mapping[str, Run]
    ) -> None:
        self.name = name
        self.examples = examples
        self.dims = dims
        self.runs = dict(runs)

    def feeds(self, batch: int) -> dict[str, Array]:
        bounds = self.dims.get("batch")
        if bounds is None:
            fixed = self.examples[0].shape[0]
            if batch != fixed:
                raise UsageError(f"the batch of {self.name} is fixed", got=batch, expected=fixed)
            return make_feeds(self.examples, batch=None, seed=31)
        if batch < bounds.min or (bounds.max is not None and batch > bounds.max):
            raise UsageError(
                f"{self.name} does not take this batch", got=batch, expected=f"{bounds.min} to {bounds.max}"
            )
        return make_feeds(self.examples, batch=batch, seed=31)


def _measure(opened: Sequence[_Item], batch: int, threads: int, seconds: float, progress: Progress) -> list[BenchRow]:
    systems = []
    for item in opened:
        feeds = item.feeds(batch)
        for name, run in item.runs.items():
            systems.append(System(f"{item.name} | {name}", lambda run=run, feeds=feeds: run(feeds)))  # type: ignore[misc]
            systems[-1].call()  # torch.compile compiles here, outside the budget
    measurement = measure(systems, max_total_s=seconds, progress=progress.step)
    rows = []
    first = systems[0].name
    for item in opened:
        base = f"{item.name} | {next(iter(item.runs))}"
        for name in item.runs:
            system = f"{item.name} | {name}"
            other = base if system != base else first
            compared = measurement.compare(other, system) if other != system else None
            rows.append(
                BenchRow(
                    item=item.name, system=name, latency=measurement.latency(system, batch, threads),
                    against=other if compared else None, ratio=compared.ratio if compared else None,
                    ratio_ci95=compared.ratio_ci95 if compared else None,
                    verdict=compared.verdict if compared else None,
                )
            )  # fmt: skip
    return rows


def _open(
    stack: contextlib.ExitStack, item: str, graph: str | None, against: Sequence[str], threads: int,
    inputs: Sequence[ExampleInput],
) -> Iterator[_Item]:  # fmt: skip
    """The graphs of a bundle, or a source, opened for as long as `stack` is."""
    if (Path(item) / bundles.MANIFEST).is_file() or item.endswith(".attn"):
        manifest = bundles.open_bundle(item).manifest
        for name, entry in loading.graphs_of(manifest, graph).items():
            session = stack.enter_context(loading.load(item, threads=threads, graph=name))
            runs: dict[str, Run] = {session.variant: session.run}
            if against:
                with about(name):
                    runs |= _peers(stack, manifest.source, against, threads, entry.examples, entry.dims)[1]
            shown = Path(item).name if name == MAIN else f"{Path(item).name} {name}"
            yield _Item(shown, entry.examples, entry.dims, runs)
        return
    if not against:
        raise UsageError("a source has nothing to run but its peers", got=item, next_step="add --against eager")
    dims = {"batch": DimBounds()}
    examples, peers = _peers(stack, item, against, threads, inputs, dims)
    yield _Item(item, examples, dims, peers)


def _peers(
    stack: contextlib.ExitStack, source: str, against: Sequence[str], threads: int,
    examples: Sequence[ExampleInput], dims: Mapping[str, DimBounds],
) -> tuple[Sequence[ExampleInput], dict[str, Run]]:  # fmt: skip
    """The source's inputs, and the functions that run it by the peer's name."""
    require_export()
    import torch

    from attn_deploy.export.build import plain_model
    from attn_deploy.export.capture import capture
    from attn_deploy.export.sources import SourceRequest, load_source
    from attn_deploy.export.sources.base import PACKAGE_DEFAULTS
    from attn_deploy.export.to_onnx import MIN_OPSET

    torch.set_num_threads(threads)
    weights = None if source == "demo" or source.endswith(".pt2") or ":" not in source else PACKAGE_DEFAULTS
    loaded = load_source(source, SourceRequest("", weights, {}, () if source.endswith(".pt2") else examples))
    captured = capture(loaded, dims)
    runs: dict[str, Run] = {}
    if "eager" in against:
        runs["eager PyTorch"] = captured.reference
    if "compile" in against:
        runs["torch.compile"] = captured.compiled_reference()
    if "onnxruntime" in against or "openvino" in against:
        plain = stack.enter_context(plain_model(captured, MIN_OPSET))
        if "onnxruntime" in against:
            session = runtimes.open_session(Target.ONNXRUNTIME_CPU, plain, threads=threads)
            runs["plain ONNX Runtime"] = session.run
        if "openvino" in against:
            from attn_deploy.runtimes import openvino

            runs["OpenVINO"] = openvino.open_session(plain, threads=threads).run
    return loaded.inputs, runs
