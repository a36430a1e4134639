"""benchmark(): bundles and sources against their peers, interleaved in one run for each batch size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from attn_deploy import bundle as bundles
from attn_deploy import environment, loading, runtimes
from attn_deploy.errors import UnavailableError, UsageError
from attn_deploy.extras import require_export
from attn_deploy.inputs import ExampleInput, make_feeds
from attn_deploy.latency import System, measure
from attn_deploy.peers import Peer, Place, Resident, check_peers, open_peers
from attn_deploy.progress import Progress, Silent
from attn_deploy.receipt import MAIN, Latency
from attn_deploy.resolutions import about, require_one_resolution
from attn_deploy.session import Array, DimBounds
from attn_deploy.target import Precision, Target, parse_precision, parse_target

if TYPE_CHECKING:
    from attn_deploy.export.capture import CapturedModel


class BenchRow(msgspec.Struct, frozen=True):
    """One system at one batch size. `ratio` = its time over that of the item it is a peer of: more than 1 means that
    the item is faster. An item itself has no ratio but to the first item, when there are several. `device`: the same
    calls by the events of the GPU, where the system runs on one and copies are left out."""

    item: str
    system: str
    latency: Latency
    against: str | None
    ratio: float | None
    ratio_ci95: tuple[float, float] | None
    verdict: str | None
    device: Latency | None = None


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
    target: str | None = None,
    precision: str = "fp32",
    copies: bool = True,
    progress: Progress | None = None,
) -> Benchmark:
    """Times each bundle or source and its peers. `seconds` is the budget for each batch size.

    A bundle with several graphs is an item for each of them, or for the named one alone. A source without a bundle is
    its peers alone. Weights do not change the time, so sources are built without any.

    `target` chooses the variant of bundles [default: what this host runs best], and with `precision` the place of a
    source's peers [default: the CPU]. Without `copies` what runs on a GPU finds its inputs there and leaves its outputs
    there; on a CPU nothing is copied anyway.
    """
    check_peers(against)
    if not items or any(b < 1 for b in batches):
        raise UsageError("nothing to measure", got=f"{len(items)} items, batches {list(batches)}")
    require_one_resolution(inputs)
    progress = progress or Silent()
    threads = threads or environment.available_cores()
    rows: list[BenchRow] = []
    settings = _Settings(tuple(against), threads, inputs, graph, target, parse_precision(precision))
    with contextlib.ExitStack() as stack:
        progress.stage("models")
        with runtimes.progress_of(Target.TENSORRT, progress):  # whose engines may have to be built
            opened = [one for item in items for one in _open(stack, item, settings)]
        facts = environment.host() | runtimes.device_facts(item.target for item in opened)
        for batch in batches:
            progress.stage(f"batch {batch}")
            rows += _measure(opened, batch, threads, seconds, copies, progress)
    absent = dict.fromkeys(note for item in opened for note in item.absent)
    warnings = (environment.load_warning(facts), environment.throttling_note(facts), *absent)
    return Benchmark(
        host={k: ", ".join(v) if isinstance(v, (list, tuple)) else v for k, v in facts.items()},
        versions=environment.versions(),
        rows=tuple(rows),
        warnings=tuple(w for w in warnings if w),
    )


@dataclass(frozen=True)
class _Settings:
    """What items are opened by."""

    against: tuple[str, ...]
    threads: int
    inputs: Sequence[ExampleInput]
    graph: str | None
    target: str | None
    precision: Precision

    def place(self, target: Target, precision: Precision) -> Place:
        from attn_deploy.export.to_onnx import MIN_OPSET

        return Place(target, precision, self.threads, MIN_OPSET)


class _Item:
    """A bundle or source with what runs it and its peers, itself first; and notes on peers that do not run here."""

    def __init__(
        self, name: str, examples: Sequence[ExampleInput], dims: Mapping[str, DimBounds], runs: Sequence[Peer],
        target: Target, absent: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.name = name
        self.target = target
        self.examples = examples
        self.dims = dims
        self.runs = tuple(runs)
        self.absent = [f"{name}: the peer {peer} was not measured: {why}" for peer, why in absent.items()]

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


def _measure(
    opened: Sequence[_Item], batch: int, threads: int, seconds: float, copies: bool, progress: Progress
) -> list[BenchRow]:
    systems = []
    for item in opened:
        feeds = item.feeds(batch)
        for peer in item.runs:
            systems.append(_system(f"{item.name} | {peer.name}", peer, feeds, copies))
            systems[-1].call()  # torch.compile compiles here, outside the budget
    measurement = measure(systems, max_total_s=seconds, progress=progress.step)
    rows = []
    first = systems[0].name
    for item in opened:
        base = f"{item.name} | {item.runs[0].name}"
        for peer in item.runs:
            system = f"{item.name} | {peer.name}"
            other = base if system != base else first
            compared = measurement.compare(other, system) if other != system else None
            rows.append(
                BenchRow(
                    item=item.name, system=peer.name, latency=measurement.latency(system, batch, threads),
                    against=other if compared else None, ratio=compared.ratio if compared else None,
                    ratio_ci95=compared.ratio_ci95 if compared else None,
                    verdict=compared.verdict if compared else None,
                    device=measurement.device_latency(system, batch, threads),
                )
            )  # fmt: skip
    return rows


def _system(name: str, peer: Peer, feeds: Mapping[str, Array], copies: bool) -> System:
    if copies or peer.resident is None:
        return System(name, lambda: peer.run(feeds))
    return peer.resident(name, feeds)


def _open(stack: contextlib.ExitStack, item: str, settings: _Settings) -> Iterator[_Item]:
    """The graphs of a bundle, or a source, opened for as long as `stack` is."""
    if (Path(item) / bundles.MANIFEST).is_file() or item.endswith(".attn"):
        manifest = bundles.open_bundle(item).manifest
        for name, entry in loading.graphs_of(manifest, settings.graph).items():
            session = stack.enter_context(
                loading.load(item, threads=settings.threads, graph=name, target=settings.target)
            )
            variant = entry.variants[session.variant]
            target, precision = Target(variant.target), Precision(variant.precision)
            runs = [Peer(session.variant, session.run, _resident(session) if target.on_gpu else None)]
            absent: dict[str, str] = {}
            if settings.against:
                with about(name):
                    captured = _captured(manifest.source, settings.threads, entry.examples, entry.dims)
                    peers, absent = open_peers(stack, captured, settings.against, settings.place(target, precision))
                runs += peers
            shown = Path(item).name if name == MAIN else f"{Path(item).name} {name}"
            yield _Item(shown, entry.examples, entry.dims, runs, target, absent)
        return
    if not settings.against:
        raise UsageError("a source has nothing to run but its peers", got=item, next_step="add --against eager")
    dims = {"batch": DimBounds()}
    captured = _captured(item, settings.threads, settings.inputs, dims)
    target = Target.ONNXRUNTIME_CPU if settings.target is None else parse_target(settings.target)
    peers, absent = open_peers(stack, captured, settings.against, settings.place(target, settings.precision))
    if not peers:
        raise UnavailableError("no peer of the source runs here", got=absent, next_step="attn-deploy doctor")
    yield _Item(item, captured.inputs, captured.dims, peers, target, absent)


def _resident(session: loading.BundleSession) -> Resident:
    from attn_deploy.runtimes.resident import resident

    return lambda name, feeds: resident(name, session, feeds)


def _captured(
    source: str, threads: int, examples: Sequence[ExampleInput], dims: Mapping[str, DimBounds]
) -> CapturedModel:
    require_export()
    import torch

    from attn_deploy.export.capture import capture
    from attn_deploy.export.sources import SourceRequest, load_source
    from attn_deploy.export.sources.base import PACKAGE_DEFAULTS

    torch.set_num_threads(threads)
    weights = None if source == "demo" or source.endswith(".pt2") or ":" not in source else PACKAGE_DEFAULTS
    loaded = load_source(source, SourceRequest("", weights, {}, () if source.endswith(".pt2") else examples))
    return capture(loaded, dims)
