"""load(): a bundle -> a session of its chosen variant. Imports neither torch nor onnx."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import msgspec
import numpy as np

from attn_deploy import runtimes
from attn_deploy.bundle import Bundle, open_bundle
from attn_deploy.dispatch import Dispatcher, require_device
from attn_deploy.errors import FeedError, UnavailableError, UsageError
from attn_deploy.manifest import Graph, Manifest
from attn_deploy.preprocess import Preprocess, is_image_like, prepare_batch
from attn_deploy.session import Array, FeedChecker, Session, TensorSpec
from attn_deploy.target import Target, nearest, parse_target


class Prediction(msgspec.Struct, frozen=True):
    """One class: its index, its label (the index as text where the bundle has no labels) and its softmax score."""

    index: int
    label: str
    score: float


class _Runner(Protocol):
    """Feeds as a caller gives them, to be checked -> outputs."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]: ...

    def run_device(self, feeds: Mapping[str, Any], *, stream: Any = None) -> dict[str, Any]: ...

    def close(self) -> None: ...


class _OneGraph:
    def __init__(self, graph: Graph, session: Session) -> None:
        self._checker = FeedChecker(graph.inputs, graph.dims)
        self._session = session
        self.close = session.close

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        return self._session.run(self._checker.check(feeds))

    def run_device(self, feeds: Mapping[str, Any], *, stream: Any = None) -> dict[str, Any]:
        session = require_device(self._session)
        return session.run_device(self._checker.check(feeds, device=True), stream=stream)


class BundleSession:
    """A model ready to run. Safe to call from many threads at once; a context manager that frees the model.

    with attn_deploy.load("vit.attn", threads=2) as session:
        scores = session(["cat.jpg", "dog.jpg"])        # images, prepared as the bundle says
        scores = session(batch)                         # or the input itself, float32 [batch, 3, 224, 224]
        outputs = session.run({"x": batch})             # or inputs and outputs by name

    `graph` and `variant` are what it runs. Of a bundle with several resolutions that was loaded without naming one,
    they are the first resolution's, for which images are prepared; arrays run on the graph of their sizes.
    """

    def __init__(self, runner: _Runner, manifest: Manifest, graph: str, variant: str) -> None:
        self._runner = runner
        self.manifest = manifest
        self.graph = graph
        self.variant = variant

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.manifest.graphs[self.graph].inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.manifest.graphs[self.graph].outputs

    @property
    def preprocess(self) -> Preprocess | None:
        """How images are prepared, where the bundle says it."""
        return self.manifest.preprocess_of(self.graph)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Feeds by input name -> outputs by output name.

        Takes NumPy arrays, and CPU tensors that speak DLPack (torch, JAX, CuPy on the host) without a copy.
        Raises FeedError: a wrong name, dtype or shape, or a batch beyond the bundle's bound.
        """
        return self._runner.run(feeds)

    def run_device(self, feeds: Mapping[str, Any], *, stream: Any = None) -> dict[str, Any]:
        """Feeds by input name, in GPU memory (torch, CuPy, whatever speaks DLPack) or as arrays -> outputs in GPU
        memory, which speak DLPack. With a `stream`, a handle or a stream of torch, the call returns at once.

        Raises FeedError as `run` does, UsageError where the variant does not run on a GPU.
        """
        return self._runner.run_device(feeds, stream=stream)

    def __call__(self, *values: Any) -> Any:
        """Inputs in the order of `inputs`, or images -> the output, or a dict when there are several outputs.

        Images (paths, PIL images, uint8 arrays [height, width, 3], or a list of them) are prepared as the bundle says
        and make one batch.
        """
        outputs = self.run(self._feeds(values))
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def prepare(self, images: Any) -> Array:
        """Images -> the model's input [batch, channels, height, width] float32."""
        config = self.preprocess
        if config is None:
            raise UsageError(
                "the bundle does not say how images are prepared",
                expected=f"arrays: {'; '.join(s.describe() for s in self.inputs)}",
                next_step="export again with --preprocess FILE.json",
            )
        return prepare_batch(list(images) if isinstance(images, (list, tuple)) else [images], config)

    def classify(self, images: Any, top: int = 1) -> list[list[Prediction]]:
        """For each image its `top` classes, the most likely first. `images` is what a call takes."""
        scores = next((v for v in self.run(self._feeds((images,))).values() if v.ndim == 2), None)
        if scores is None:
            raise UsageError("the model gives no class scores", expected="an output of shape [batch, classes]")
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
        share = shifted / shifted.sum(axis=1, keepdims=True)
        order = np.argsort(-share, axis=1, kind="stable")[:, :top]
        return [
            [Prediction(int(i), self._label(int(i)), float(row[i])) for i in best]
            for row, best in zip(share, order, strict=True)
        ]

    def close(self) -> None:
        self._runner.close()

    def __enter__(self) -> BundleSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _feeds(self, values: Sequence[Any]) -> dict[str, Any]:
        if len(values) == 1 and is_image_like(values[0]) and not _is_input(values[0], self.inputs[0]):
            config = self.preprocess
            name = config.input if config is not None else self.inputs[0].name
            return {name: self.prepare(values[0])}
        if len(values) != len(self.inputs):
            raise FeedError(
                "the number of inputs is wrong",
                got=len(values),
                expected="; ".join(s.describe() for s in self.inputs),
                next_step="pass them in this order, or by name with session.run({...})",
            )
        return {spec.name: value for spec, value in zip(self.inputs, values, strict=True)}

    def _label(self, index: int) -> str:
        labels = self.manifest.labels
        return labels[index] if labels is not None and index < len(labels) else str(index)


def _is_input(value: Any, spec: TensorSpec) -> bool:
    """A uint8 array may be the model's own input."""
    return isinstance(value, np.ndarray) and value.dtype == spec.dtype and value.ndim == len(spec.shape)


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    target: str | None = None,
    variant: str | None = None,
    graph: str | None = None,
    spinning: bool = True,
) -> BundleSession:
    """Opens the variant of a bundle that was chosen for this host.

    `threads` None leaves the number to the runtime. `spinning` False: the CPU's threads sleep while they wait for work,
    which is slower where nothing else runs and faster beside other processes. `target` and `variant` override the
    choice. A bundle with several resolutions runs each feed on the graph of its sizes, which is opened by the first
    feed that needs it; `graph` opens one of them alone. Raises BundleError for a damaged or newer bundle,
    UnavailableError when no variant can run here.
    """
    if threads is not None and threads < 1:
        raise UsageError("threads must be at least 1", got=threads)
    bundle = open_bundle(path)
    manifest = bundle.manifest
    graphs = graphs_of(manifest, graph)
    variants = {name: variant or _chosen(manifest, name, target) for name in graphs}
    for name, chosen in variants.items():
        if chosen not in graphs[name].variants:
            raise UsageError(
                "the bundle has no such variant", got=chosen, expected=nearest(chosen, graphs[name].variants)
            )
    opened = functools.partial(_open, bundle, variants, threads, spinning)
    first = next(iter(graphs))
    runner = Dispatcher(graphs, opened) if len(graphs) > 1 else _OneGraph(graphs[first], opened(first))
    return BundleSession(runner, manifest, first, variants[first])


def _open(bundle: Bundle, variants: Mapping[str, str], threads: int | None, spinning: bool, name: str) -> Session:
    """The session of a graph's variant. Its files are checked here."""
    graph = bundle.manifest.graphs[name]
    lowered = graph.variants[variants[name]]
    model_name, *others = lowered.files
    for other in others:
        bundle.check(other)
    model = bundle.check(model_name) if others else bundle.read(model_name)
    waiting = {} if spinning or Target(lowered.target).on_gpu else {"spinning": "0"}
    return runtimes.open_session(
        Target(lowered.target),
        model,
        inputs=graph.inputs,
        outputs=graph.outputs,
        threads=threads,
        library=lowered.library is not None,
        options=lowered.options | waiting,
    )


def graphs_of(manifest: Manifest, name: str | None) -> dict[str, Graph]:
    """All graphs, or the named one alone. Raises UsageError when there is no such graph."""
    if name is None:
        return dict(manifest.graphs)
    if name not in manifest.graphs:
        raise UsageError("the bundle has no such graph", got=name, expected=", ".join(manifest.graphs))
    return {name: manifest.graphs[name]}


def _chosen(manifest: Manifest, graph: str, target: str | None) -> str:
    """The graph's chosen variant of the given target, or of the first target that this host can run, GPUs first."""
    chosen = manifest.chosen_of(graph)
    known = [Target(t) for t in chosen if t in set(Target)]
    wanted = [parse_target(target)] if target is not None else sorted(known, key=lambda t: not t.on_gpu)
    reasons = []
    unproven = {v.target for v in manifest.graphs[graph].variants.values()} - chosen.keys()
    if unproven and (not chosen or (wanted and wanted[0] in unproven)):
        raise UnavailableError(
            "the bundle's variants were not proven yet", got="not run: " + ", ".join(sorted(unproven)),
            expected="a variant that was proven on a host like this one",
            next_step="attn-deploy validate BUNDLE on the device proves them and chooses",
        )  # fmt: skip
    for candidate in wanted:
        if candidate not in chosen:
            raise UsageError("the bundle has no variant for this target", got=candidate, expected=", ".join(chosen))
        reason = runtimes.availability(candidate)
        if reason is None:
            return chosen[candidate]
        reasons.append(f"{candidate}: {reason}")
    raise UnavailableError(
        "no variant of the bundle can run here",
        got="; ".join(reasons) or "a bundle for " + ", ".join(chosen),
        expected="one of: " + ", ".join(chosen),
        next_step="attn-deploy doctor",
    )
