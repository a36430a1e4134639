"""load(): a bundle -> a session of its chosen variant. Imports neither torch nor onnx."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from attn_deploy import runtimes
from attn_deploy.bundle import Bundle, open_bundle
from attn_deploy.errors import FeedError, UnavailableError, UsageError
from attn_deploy.manifest import Graph, Manifest
from attn_deploy.preprocess import is_image_like, prepare_batch
from attn_deploy.session import Array, FeedChecker, Session, TensorSpec
from attn_deploy.target import Target, nearest, parse_target


class Prediction(msgspec.Struct, frozen=True):
    """One class: its index, its label (the index as text where the bundle has no labels) and its softmax score."""

    index: int
    label: str
    score: float


class BundleSession:
    """A model ready to run. Safe to call from many threads at once; a context manager that frees the model.

    with attn_deploy.load("vit.attn", threads=2) as session:
        scores = session(["cat.jpg", "dog.jpg"])        # images, prepared as the bundle says
        scores = session(batch)                         # or the input itself, float32 [batch, 3, 224, 224]
        outputs = session.run({"x": batch})             # or inputs and outputs by name
    """

    def __init__(self, session: Session, bundle: Bundle, graph: Graph, variant: str) -> None:
        self._session = session
        self._graph = graph
        self._checker = FeedChecker(graph.inputs, graph.dims)
        self.manifest: Manifest = bundle.manifest
        self.variant = variant

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.outputs

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Feeds by input name -> outputs by output name.

        Takes NumPy arrays, and CPU tensors that speak DLPack (torch, JAX, CuPy on the host) without a copy.
        Raises FeedError: a wrong name, dtype or shape, or a batch beyond the bundle's bound.
        """
        return self._session.run(self._checker.check(feeds))

    def __call__(self, *values: Any) -> Any:
        """Inputs in the order of `inputs`, or images -> the output, or a dict when there are several outputs.

        Images (paths, PIL images, uint8 arrays [height, width, 3], or a list of them) are prepared as the bundle says
        and make one batch.
        """
        outputs = self.run(self._feeds(values))
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def prepare(self, images: Any) -> Array:
        """Images -> the model's input [batch, channels, height, width] float32."""
        config = self.manifest.preprocess
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
        self._session.close()

    def __enter__(self) -> BundleSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _feeds(self, values: Sequence[Any]) -> dict[str, Any]:
        if len(values) == 1 and is_image_like(values[0]) and not _is_input(values[0], self.inputs[0]):
            config = self.manifest.preprocess
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
) -> BundleSession:
    """Opens the variant of a bundle that was chosen for this host.

    `threads` None leaves the number to the runtime. `target` and `variant` override the choice; `graph` is needed only
    where a bundle has several. Raises BundleError for a damaged or newer bundle, UnavailableError when no variant can
    run here.
    """
    if threads is not None and threads < 1:
        raise UsageError("threads must be at least 1", got=threads)
    bundle = open_bundle(path)
    manifest = bundle.manifest
    entry = graph_of(manifest, graph)
    name = variant or _chosen(manifest, entry, target)
    if name not in entry.variants:
        raise UsageError("the bundle has no such variant", got=name, expected=nearest(name, entry.variants))
    lowered = entry.variants[name]
    model_name, *others = lowered.files
    for other in others:
        bundle.check(other)
    model = bundle.check(model_name) if others else bundle.read(model_name)
    session = runtimes.open_session(
        Target(lowered.target),
        model,
        inputs=entry.inputs,
        outputs=entry.outputs,
        threads=threads,
        library=lowered.library is not None,
        options=lowered.options,
    )
    return BundleSession(session, bundle, entry, name)


def graph_of(manifest: Manifest, name: str | None) -> Graph:
    """The named graph; without a name the only one. Raises UsageError when that is not clear."""
    if name is None and len(manifest.graphs) == 1:
        return next(iter(manifest.graphs.values()))
    if name is None or name not in manifest.graphs:
        raise UsageError("which graph of the bundle?", got=name, expected=", ".join(manifest.graphs))
    return manifest.graphs[name]


def _chosen(manifest: Manifest, graph: Graph, target: str | None) -> str:
    """The chosen variant of the given target, or of the first target that this host can run."""
    wanted = [parse_target(target)] if target is not None else [Target(t) for t in manifest.chosen if t in set(Target)]
    reasons = []
    for candidate in wanted:
        if candidate not in manifest.chosen:
            raise UsageError(
                "the bundle has no variant for this target", got=candidate, expected=", ".join(manifest.chosen)
            )
        reason = runtimes.availability(candidate)
        if reason is None:
            return manifest.chosen[candidate]
        reasons.append(f"{candidate}: {reason}")
    raise UnavailableError(
        "no variant of the bundle can run here",
        got="; ".join(reasons) or "a bundle for " + ", ".join(manifest.chosen),
        expected="one of: " + ", ".join(manifest.chosen),
        next_step="attn-deploy doctor",
    )
