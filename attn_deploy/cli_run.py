"""`attn-deploy run`: files -> feeds -> labels or arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from attn_deploy.bundle import storage_errors
from attn_deploy.errors import UsageError
from attn_deploy.loading import BundleSession, Prediction, load
from attn_deploy.session import Array


class OutputSummary(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[float, ...]
    """The first few."""


class RunResult(msgspec.Struct, frozen=True):
    """What came out of one input file: classes where the model gives class scores, and every output in short."""

    input: str
    predictions: tuple[Prediction, ...]
    outputs: tuple[OutputSummary, ...]


SHOWN_VALUES = 5


def run_inputs(
    bundle: Path, inputs: Sequence[Path], *, out: Path | None, top: int, threads: int | None, graph: str | None = None
) -> list[RunResult]:
    """Runs the bundle on each file: an image, an .npy (the first input) or an .npz (inputs by name)."""
    for path in inputs:
        if not path.is_file():
            raise UsageError("the input file does not exist", got=str(path), expected="an image, .npy or .npz")
    results = []
    saved: dict[str, Array] = {}
    with load(bundle, threads=threads, graph=graph) as session:
        for number, path in enumerate(inputs):
            feeds = _feeds(session, path)
            outputs = session.run(feeds)
            prefix = f"{number}/" if len(inputs) > 1 else ""
            saved |= {prefix + name: value for name, value in outputs.items()}
            results.append(RunResult(str(path), _predictions(session, feeds, top), _summaries(outputs)))
    if out is not None:
        with storage_errors(out):
            np.savez(out, **saved)  # type: ignore[arg-type]
    return results


def _feeds(session: BundleSession, path: Path) -> dict[str, Array]:
    if path.suffix not in (".npy", ".npz"):
        config = session.preprocess
        images = session.prepare([path])
        return {config.input if config is not None else session.inputs[0].name: images}
    try:
        loaded = np.load(path, allow_pickle=False)
        if path.suffix == ".npy":
            return {session.inputs[0].name: loaded}
        names = {spec.name for spec in session.inputs}
        return {name: loaded[name] for name in loaded.files if name in names or name != "labels"}
    except (OSError, ValueError) as error:
        raise UsageError("the input file cannot be read", got=str(error), where=str(path)) from error


def _predictions(session: BundleSession, feeds: dict[str, Array], top: int) -> tuple[Prediction, ...]:
    """Of the first sample, where an output is class scores and the bundle has labels or an image went in."""
    scores = any(len(o.shape) == 2 for o in session.outputs)
    if not scores or len(feeds) != 1 or session.preprocess is None:
        return ()
    return tuple(session.classify(next(iter(feeds.values())), top=top)[0])


def _summaries(outputs: dict[str, Array]) -> tuple[OutputSummary, ...]:
    return tuple(
        OutputSummary(name, str(value.dtype), value.shape, tuple(float(v) for v in value.ravel()[:SHOWN_VALUES]))
        for name, value in outputs.items()
    )
