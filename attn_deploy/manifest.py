"""manifest.json: what a bundle holds and how an application feeds it."""

from __future__ import annotations

import msgspec

from attn_deploy.inputs import ExampleInput
from attn_deploy.preprocess import Preprocess
from attn_deploy.receipt import MAIN
from attn_deploy.session import DimBounds, TensorSpec

SCHEMA_VERSION = 1


class FileEntry(msgspec.Struct, frozen=True):
    sha256: str
    size: int


class Variant(msgspec.Struct, frozen=True):
    """One lowered model. `files` are bundle-relative, the model first, then what it refers to (external data).

    `library` names the native library the model's custom operators need, None for plain ONNX. `options` are what the
    session is opened with. `plan` is the file with the precision plan that it was lowered by, `statistics` the one with
    the ranges of activations that this needed: with both it can be lowered again on another host, without data.
    """

    target: str
    precision: str
    files: tuple[str, ...]
    library: str | None = None
    options: dict[str, str] = {}
    plan: str | None = None
    statistics: str | None = None

    @property
    def held(self) -> tuple[str, ...]:
        """All of its files in the bundle."""
        return self.files + tuple(name for name in (self.plan, self.statistics) if name is not None)


class Graph(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry point: its inputs and outputs with named dimensions, and the variants that compute it by id.

    `examples` say how inputs to try it with are made: `validate` and `bench` need no source for that. `chosen` and
    `preprocess` are its own where a bundle has several graphs; None: those of the manifest.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimBounds]
    variants: dict[str, Variant]
    examples: tuple[ExampleInput, ...] = ()
    chosen: dict[str, str] | None = None
    preprocess: Preprocess | None = None


class Manifest(msgspec.Struct, frozen=True):
    """`chosen` (target -> variant) and `preprocess` are the first graph's where there are several."""

    schema_version: int
    name: str
    source: str
    graphs: dict[str, Graph]
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None
    chosen: dict[str, str]
    requirements: dict[str, str]
    files: dict[str, FileEntry]

    def chosen_of(self, graph: str) -> dict[str, str]:
        """Target -> the variant that was chosen for this graph."""
        own = self.graphs[graph].chosen
        return self.chosen if own is None else own

    def preprocess_of(self, graph: str) -> Preprocess | None:
        """How an image becomes the input of this graph."""
        return self.graphs[graph].preprocess or self.preprocess


def graph_file(graph: str, file: str) -> str:
    """The bundle-relative name of a file that every graph has: a bundle's only graph has no folder of its own."""
    return file if graph == MAIN else f"{graph}/{file}"
