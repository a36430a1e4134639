"""What `validate` compares a bundle's graphs with: its own portable model, another bundle, or a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_deploy import bundle as bundles
from attn_deploy import loading, localizing, runtimes
from attn_deploy.accuracy import Run
from attn_deploy.bundle import Bundle, open_bundle
from attn_deploy.errors import UsageError
from attn_deploy.extras import require_export
from attn_deploy.manifest import Graph, graph_file
from attn_deploy.session import Array
from attn_deploy.target import Target

if TYPE_CHECKING:
    from attn_deploy.export.capture import CapturedModel


@dataclass(frozen=True)
class Reference:
    """What the variants of one graph are compared with, whole; `graphs` gives it as ONNX for comparing block by block.
    `eager` says that `run` is PyTorch."""

    run: Run
    name: str
    graphs: Callable[[], localizing.Graphs]
    eager: bool = False

    def outputs(self, feeds: Mapping[str, Array], graph: Graph) -> Mapping[str, Array]:
        """Raises UsageError when they are not the graph's."""
        outputs = self.run(feeds)
        expected = [o.name for o in graph.outputs]
        if sorted(outputs) != sorted(expected):
            raise UsageError("the reference has other outputs", got=", ".join(outputs), expected=", ".join(expected))
        return outputs


@dataclass(frozen=True)
class SourceOfReference:
    """What the user named: `text` a source (`weights` and `arguments` are its own) or a bundle; None: the bundle
    itself."""

    text: str | None
    weights: str | None
    arguments: Mapping[str, Any]

    @property
    def is_bundle(self) -> bool:
        return self.text is not None and (Path(self.text) / bundles.MANIFEST).is_file()


def references(bundle: Bundle, given: SourceOfReference, threads: int) -> Callable[[str], Reference]:
    """A function that opens the reference of a graph, by the graph's name."""
    if given.text is None:
        return lambda graph: own_reference(bundle, graph, threads)
    if given.is_bundle:
        other, name = open_bundle(given.text), given.text
        run = loading.load(name, threads=threads).run  # runs on the graph that takes the feed
        return lambda graph: Reference(run, name, lambda: _graphs_of_bundle(bundle, graph, other))
    require_export()
    from attn_deploy.export.sources import SourceRequest, load_resolutions

    examples = {name: graph.examples for name, graph in bundle.manifest.graphs.items()}
    sources = load_resolutions(given.text, SourceRequest("", given.weights, given.arguments), examples)

    def from_source(graph: str) -> Reference:
        from attn_deploy.export.capture import capture

        source = sources[graph]
        captured = capture(source, bundle.manifest.graphs[graph].dims)
        name = f"{source.description} ({source.weights})"
        return Reference(captured.reference, name, lambda: _graphs_of_source(bundle, graph, captured, name), eager=True)

    return from_source


def own_graphs(bundle: Bundle, graph: str) -> localizing.Graphs:
    """The graph's own portable FP32 model as the reference."""
    return localizing.own_graphs(bundle.root / graph_file(graph, ""))


def own_reference(bundle: Bundle, graph: str, threads: int) -> Reference:
    """The graph's own portable FP32 model, to run."""
    model = bundle.check(graph_file(graph, bundles.PORTABLE))
    specs = bundle.manifest.graphs[graph]
    session = runtimes.open_session(
        Target.ONNXRUNTIME_CPU, model, inputs=specs.inputs, outputs=specs.outputs, threads=threads
    )
    return Reference(session.run, "its own portable FP32 model", lambda: own_graphs(bundle, graph))


def _graphs_of_bundle(bundle: Bundle, graph: str, other: Bundle) -> localizing.Graphs:
    require_export()
    import onnx_ir as ir

    inputs = bundle.manifest.graphs[graph].inputs
    shapes = [spec.shape for spec in inputs]
    graphs = other.manifest.graphs
    alike = next((name for name in graphs if [s.shape for s in graphs[name].inputs] == shapes), next(iter(graphs)))
    portable = other.check(graph_file(alike, bundles.PORTABLE))
    return dataclasses.replace(own_graphs(bundle, graph), reference=ir.load(portable), reference_name=str(portable))


def _graphs_of_source(bundle: Bundle, graph: str, captured: CapturedModel, name: str) -> localizing.Graphs:
    from attn_deploy.export.canonical import portable
    from attn_deploy.export.recognize import recognize
    from attn_deploy.export.rewrite import rewrite
    from attn_deploy.export.to_onnx import to_onnx

    canonical = to_onnx(rewrite(captured, recognize(captured)))
    own = own_graphs(bundle, graph)
    return dataclasses.replace(own, reference=portable(canonical), reference_name=f"{name}, captured anew")
