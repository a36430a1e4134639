"""The checked-in expectation: tests/coverage/expected.json, written from the models' own module trees.

`python -m attention_coverage.expectations` writes it; read the difference before it is committed.
"""

from __future__ import annotations

import functools
from collections import Counter

import msgspec
import torch

from attention_coverage.kinds import Expected, expected_sites
from attention_coverage.models import FOLDER, MODELS, PACKAGE_DEFAULTS
from attn_deploy.export.recognize.site import Kind
from attn_deploy.export.sources import LoadedSource
from attn_deploy.inputs import make_feeds

FILE = FOLDER / "expected.json"


class Attention(msgspec.Struct, frozen=True, omit_defaults=True):
    """`modules` that compute attention of this kind; `skip` names the Reason where none of it is to be rewritten."""

    kind: str
    modules: list[str]
    skip: str | None = None


def of_source(source: LoadedSource) -> Counter[Expected]:
    """What the module tree of a loaded model computes."""
    assert isinstance(source.module, torch.nn.Module)
    feeds = make_feeds(source.inputs, batch=1, seed=0)
    return Counter(expected_sites(source.module, {name: torch.from_numpy(value) for name, value in feeds.items()}))


@functools.cache
def _read() -> dict[str, list[Attention]]:
    return msgspec.json.decode(FILE.read_bytes(), type=dict[str, list[Attention]])


def checked_in(name: str) -> Counter[Expected]:
    return Counter(Expected(Kind(a.kind), module, a.skip) for a in _read()[name] for module in a.modules)


def write() -> None:
    """All models, built without the initializer: only their trees count."""
    found: dict[str, list[Attention]] = {}
    for model in MODELS:
        rows: dict[tuple[str, str | None], list[str]] = {}
        for item in of_source(model.load(weights=PACKAGE_DEFAULTS)).elements():
            rows.setdefault((str(item.kind), item.skip), []).append(item.module)
        found[model.name] = [Attention(kind, modules, skip) for (kind, skip), modules in rows.items()]
        print(model.name, {f"{a.kind}{' skipped' if a.skip else ''}": len(a.modules) for a in found[model.name]})
    FILE.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


if __name__ == "__main__":
    write()
