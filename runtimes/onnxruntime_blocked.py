"""The graph that ONNX Runtime's optimizer made on this host, with gates inside its blocked layout.

ONNX Runtime keeps convolutions in a layout of its own (NCHWc) and leaves it for every operator that it does not know
there: a gate costs two copies of the map. Here the optimized graph is saved, rewritten (runtimes.blocked) and loaded
again without optimization. That leans on internals: it is done for versions that the tests cover, compared with the
stock graph before use, and belongs to one CPU, so that it is kept in the device cache and not in the bundle.

`prepare` makes the graph and needs the onnx package; `find` only looks into the cache, which is all an application
does.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attn_deploy import environment
from attn_deploy.errors import AttnDeployError
from attn_deploy.parity import sqnr_db
from attn_deploy.runtimes import native
from attn_deploy.runtimes.device_cache import DeviceCache
from attn_deploy.runtimes.onnxruntime import availability, create_session, session_settings
from attn_deploy.session import Array

KIND = "onnxruntime-blocked"
TESTED = ("1.20.1", "1.21.1", "1.24.4", "1.28.0", "1.31.1", "1.32.0")
"""Versions of ONNX Runtime whose optimized graphs the tests rewrite (tests/runtimes/test_blocked_releases.py)."""

RULES = "2"
"""Version of the rewriting rules: what other ones made is made again."""

MIN_SQNR_DB = 100.0
"""Between the stock graph and the rewritten one: 32-bit sums in another order leave 110 to 130 dB."""

BATCHES = (1, 3)
LIMIT_BYTES = 2_000_000_000
"""A model beyond it does not fit one protobuf message."""


def prepare(model: Path, *, library: bool, cache: DeviceCache | None = None) -> str | None:
    """Makes the rewritten graph and keeps it. None when it is there, else why the stock graph will run.

    `library`: the model itself holds operators of the native library.
    """
    cache = cache or DeviceCache()
    key = _key(model)
    if isinstance(key, str):
        return key
    if cache.get(KIND, key) is not None:
        return None
    with cache.making(KIND, key):
        if cache.get(KIND, key) is not None:
            return None
        made = _make(model, library)
        if isinstance(made, str):
            return made
        if not cache.put(KIND, key, made):
            return f"it cannot be kept in {cache.folder}"
    return None


def find(model: bytes | Path, cache: DeviceCache | None = None) -> bytes | str:
    """The rewritten graph from the cache, or why the stock graph runs."""
    key = _key(model)
    if isinstance(key, str):
        return key
    return (cache or DeviceCache()).get(KIND, key) or (
        "no graph was made for this CPU, ONNX Runtime and library, or it was damaged; attn-deploy validate BUNDLE "
        "makes it"
    )


def settings(threads: int | None) -> Any:
    """What a rewritten graph is opened with: it is optimized already."""
    import onnxruntime

    options = session_settings(threads, native.session_library())
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


@functools.cache
def block() -> int:
    """How many channels stand together in ONNX Runtime's layout on this CPU, told by what its reorder does."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(base64.b64decode(_REORDER), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.arange(32, dtype=np.float32).reshape(1, 16, 1, 2)})
    return 16 if found.ravel()[8] == 16 else 8  # the ninth number is channel 8 of pixel 0, or channel 0 of pixel 1


_REORDER = (
    "CAgSADpoCikKAXgSAXkiDFJlb3JkZXJJbnB1dDoTY29tLm1pY3Jvc29mdC5uY2h3YxIBZ1obCgF4EhYKFAgBEhAKAggBCgIIEAoCCAEKAggCYhsK"
    "AXkSFgoUCAESEAoCCAEKAggQCgIIAQoCCAJCBAoAEBRCFwoTY29tLm1pY3Jvc29mdC5uY2h3YxAB"
)
"""An ONNX model, x [1, 16, 1, 2] -> com.microsoft.nchwc ReorderInput -> y: an application has no onnx package to make
it with."""


def _key(model: bytes | Path) -> dict[str, str] | str:
    """What the rewritten graph depends on; why there can be none, as text."""
    reason = availability() or _refusal(model)
    if reason is not None:
        return reason
    path = native.library_path()
    assert path is not None
    import onnxruntime

    return {
        "model": _digest(model),
        "onnxruntime": str(onnxruntime.__version__),
        "library": f"{native.library_version(path)} {_digest(path)[:16]}",
        "rules": RULES,
        **_cpu(),
    }


def _refusal(model: bytes | Path) -> str | None:
    import onnxruntime

    version = str(onnxruntime.__version__)
    if version not in TESTED:
        return f"ONNX Runtime {version} is not one of those that were tried: {', '.join(TESTED)}"
    found = native.status()
    if not found.available:
        return f"the native library is not there: {found.reason}"
    if isinstance(model, Path) and _external(model):
        return "the model's weights are in files of their own"
    return None


def _external(model: Path) -> bool:
    return model.with_name(f"{model.name}.data").exists() or model.stat().st_size > LIMIT_BYTES


def _cpu() -> dict[str, str]:
    facts = environment.host()
    return {
        "cpu": str(facts["cpu"]),
        "instruction_sets": f"{facts['architecture']} {facts['instruction_sets']}",
        "block": str(block()),
    }


def _digest(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _make(model: Path, library: bool) -> bytes | str:
    """The rewritten graph, or why there is none."""
    try:
        import onnx
    except ImportError:
        return "making it needs the onnx package: pip install 'attn-deploy[export]'"
    from attn_deploy.runtimes import blocked

    assert blocked.VERSION == RULES
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = session_settings(None, native.session_library() if library else None)
        options.optimized_model_filepath = str(optimized)
        try:
            stock = create_session(model, options)
            if optimized.stat().st_size > LIMIT_BYTES:
                return "the model is too large"
            found = blocked.rewrite(onnx.load(optimized), block(), frozenset(native.status().operators))
        except AttnDeployError as error:
            return f"{error.what}: {error.got}"
    if isinstance(found, str):
        return found
    content: bytes = found.model.SerializeToString()
    return _difference(stock, content) or content


def _difference(stock: Any, content: bytes) -> str | None:
    """Why the rewritten graph must not stand in for the stock one, on random inputs; None where it may."""
    try:
        rewritten = create_session(content, settings(None))
    except AttnDeployError as error:
        return f"ONNX Runtime does not take the rewritten graph: {error.got}"
    symbolic = any(not isinstance(i.shape[0], int) for i in stock.get_inputs() if i.shape)
    for batch in BATCHES if symbolic else (None,):
        feeds = _feeds(stock.get_inputs(), batch)
        if isinstance(feeds, str):
            return feeds
        try:
            expected, got = stock.run(None, feeds), rewritten.run(None, feeds)
        except Exception as error:
            return f"the rewritten graph does not run: {str(error).splitlines()[0]}"
        reason = _compare([o.name for o in stock.get_outputs()], expected, got)
        if reason is not None:
            return f"{reason}, batch {batch or 'as exported'}"
    return None


def _compare(names: Sequence[str], expected: Sequence[Array], got: Sequence[Array]) -> str | None:
    for name, one, other in zip(names, expected, got, strict=True):
        if one.shape != other.shape:
            return f"output {name!r} has shape {list(other.shape)}, stock {list(one.shape)}"
        if not np.isfinite(one).all():
            return f"output {name!r} of the stock graph is not finite on random inputs: nothing to compare with"
        found = sqnr_db(one, other)
        if found < MIN_SQNR_DB:
            return f"output {name!r} differs from the stock graph's: {found:.1f} dB"
    return None


_MADE: Mapping[str, type] = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64, "tensor(bool)": np.bool_,
    "tensor(int32)": np.int32, "tensor(uint8)": np.uint8,
}  # fmt: skip


def _feeds(inputs: Sequence[Any], batch: int | None) -> dict[str, Array] | str:
    """Normal numbers for floats, 0 and 1 for the others; the first dimension is the batch where it is symbolic."""
    rng = np.random.default_rng(5)
    feeds: dict[str, Array] = {}
    for item in inputs:
        first = item.shape[0] if not item.shape or isinstance(item.shape[0], int) else batch
        shape = [first, *item.shape[1:]] if item.shape else []
        if item.type not in _MADE or not all(isinstance(d, int) for d in shape):
            return f"the input {item.name!r} ({item.type}, {item.shape}) cannot be made to compare the graphs on"
        floats = np.issubdtype(_MADE[item.type], np.floating)
        drawn = rng.standard_normal(shape) if floats else rng.integers(0, 2, shape)
        feeds[item.name] = np.asarray(drawn).astype(_MADE[item.type])
    return feeds
