"""Gates inside ONNX Runtime's blocked layout: what is rewritten, that it computes the same, what the cache gives."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from attn_deploy import environment
from attn_deploy.parity import sqnr_db
from attn_deploy.runtimes import blocked, native, onnxruntime_blocked
from attn_deploy.runtimes import onnxruntime as runtime
from attn_deploy.runtimes.device_cache import DeviceCache
from attn_deploy.runtimes.onnxruntime_blocked import KIND, MIN_SQNR_DB

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "native"))

import blocked_models
import native_build

OPTIONS = {"layout": "blocked"}

MODELS: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "se_resnet": (
        lambda: blocked_models.residual_block("se"),
        {"BlockedPool", "BlockedExciteReluSigmoid", "BlockedPointwiseOutputGateResidualRelu"},
    ),
    "eca_resnet": (
        lambda: blocked_models.residual_block("eca"),
        {"BlockedPool", "BlockedEca", "BlockedPointwiseOutputGateResidualRelu"},
    ),
    "se_resnet_40_channels": (
        lambda: blocked_models.residual_block("se", channels=40), {"BlockedPointwiseOutputGateResidualRelu"},
    ),
    "eca_resnet_40_channels": (
        lambda: blocked_models.residual_block("eca", channels=40), {"BlockedEca"},
    ),
    "efficientnet": (
        lambda: blocked_models.bottlenecks("Silu"),
        {"BlockedExpandDepthwisePoolSilu", "BlockedExciteSiluSigmoid", "BlockedPointwiseInputGate",
         "BlockedPointwiseInputGateResidual"},
    ),
    "bottlenecks_of_hardswish": (
        lambda: blocked_models.bottlenecks("HardSwish"),
        {"BlockedExpandDepthwisePoolHardswish", "BlockedPointwiseInputGateResidual"},
    ),
    "bottlenecks_without_gates": (
        lambda: blocked_models.bottlenecks("Silu", gated=False), {"BlockedExpandDepthwiseSilu"},
    ),
    "mobilenetv3": (
        blocked_models.hard_gates,
        {"BlockedDepthwisePoolRelu", "BlockedExciteReluHardSigmoid", "BlockedPointwiseInputGate"},
    ),
    "cbam": (blocked_models.attention_by_pixels, {"BlockedGate", "BlockedPool"}),
    "silu": (blocked_models.plain_silu, {"BlockedPointwiseSilu", "BlockedActivateSilu"}),
}  # fmt: skip


@pytest.fixture(scope="session")
def library_folder() -> Path:
    if not native_build.can_build():
        pytest.skip("no cmake and c++ to build the native library")
    return native_build.library_in(native_build.build("release")).parent


@pytest.fixture(autouse=True)
def surroundings(library_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This tree's library, an empty cache, and the installed ONNX Runtime counts as tried."""
    monkeypatch.setattr(native, "library_folders", lambda: iter([library_folder]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(onnxruntime_blocked, "TESTED", (onnxruntime.__version__,))


def saved(content: bytes, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return path


def made(path: Path) -> onnx.ModelProto:
    found = onnxruntime_blocked.find(path)
    assert isinstance(found, bytes), found
    return onnx.load_from_string(found)


def feeds(batch: int, *, side: int = 12, scale: float = 1.0) -> dict[str, np.ndarray]:
    return {"x": (np.random.default_rng(batch).standard_normal((batch, 3, side, side)) * scale).astype(np.float32)}


def both(path: Path, batch: int, threads: int = 2, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(stock, blocked) outputs; a warning that the stock graph runs is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = [runtime.open_session(path, threads=threads, options=o) for o in ({}, OPTIONS)]
    one, other = (next(iter(session.run(feeds(batch, scale=scale)).values())) for session in pair)
    return one, other


# -- what is rewritten -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_in_the_layout(name: str, tmp_path: Path) -> None:
    make, operators = MODELS[name]
    path = saved(make(), tmp_path)
    assert runtime.prepare(path, options=OPTIONS) is None
    found = collections.Counter(node.op_type for node in made(path).graph.node)
    assert operators <= set(found), found
    for batch in (1, 2, 5):
        stock, inside = both(path, batch)
        assert sqnr_db(stock, inside) >= MIN_SQNR_DB


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"cbam"}))
def test_nothing_is_reordered_between_convolutions(name: str, tmp_path: Path) -> None:
    path = saved(MODELS[name][0](), tmp_path)
    assert runtime.prepare(path, options=OPTIONS) is None
    graph = made(path).graph
    reorders = [node for node in graph.node if node.op_type in ("ReorderInput", "ReorderOutput")]
    readers = {node.op_type for r in reorders for node in graph.node if r.output[0] in node.input}
    assert readers <= {"Flatten"}, "only the pooled vector leaves the layout"
    assert not [node for node in graph.node if node.op_type in ("Mul", "Sigmoid", "Relu", "QuickGelu")]


def test_large_values_and_padding_do_not_leak(tmp_path: Path) -> None:
    path = saved(blocked_models.bottlenecks("Silu", channels=20), tmp_path)
    assert runtime.prepare(path, options=OPTIONS) is None
    for scale in (1e-3, 30.0):
        stock, inside = both(path, 2, scale=scale)
        assert sqnr_db(stock, inside) >= MIN_SQNR_DB


@pytest.mark.parametrize("name", ["efficientnet", "eca_resnet"])
def test_any_number_of_threads_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    path = saved(MODELS[name][0](), tmp_path)
    assert runtime.prepare(path, options=OPTIONS) is None
    first, *others = (both(path, 3, threads)[1] for threads in (1, 2, 3, 8))
    assert all(np.array_equal(first, other) for other in others)


def test_nodes_are_named_after_what_they_were_made_from(tmp_path: Path) -> None:
    path = saved(blocked_models.residual_block("se"), tmp_path)
    assert runtime.prepare(path, options=OPTIONS) is None
    nodes = runtime.read_back(path, feeds(1), options=OPTIONS)
    gate = next(n for n in nodes if n.op_type == "BlockedPointwiseOutputGateResidualRelu")
    assert gate.name.startswith("net/Mul_")
    assert runtime.read_back(path, feeds(1))[0].op_type == "Conv", "the stock graph without the option"


def test_a_fixed_batch_is_compared_as_it_stands(tmp_path: Path) -> None:
    net = blocked_models.Network()
    stem = net.node("Relu", net.conv("x", 32, 3))
    path = saved(net.model(net.squeeze_excite(stem, 8), batch=2), tmp_path)
    assert runtime.prepare(path, options=OPTIONS) is None


def test_a_gate_that_something_else_reads_stays_whole(tmp_path: Path) -> None:
    net = blocked_models.Network()
    wide = net.conv(net.node("Relu", net.conv("x", 32, 3)), 32)
    gated = net.squeeze_excite(wide, 8)
    path = saved(net.model(net.node("Add", net.conv(gated, 32), net.node("Add", gated, wide))), tmp_path)
    assert runtime.prepare(path, options=OPTIONS) is None
    stock, inside = both(path, 3)
    assert sqnr_db(stock, inside) >= MIN_SQNR_DB


# -- why not ---------------------------------------------------------------------------------------------------------


def test_a_model_without_convolutions_has_no_such_graph(tmp_path: Path) -> None:
    net = blocked_models.Network()
    graph = net.node("Relu", "x")
    net.nodes.append(onnx.helper.make_node("Identity", [graph], ["y"]))
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 3, 12, 12]) for n in ("x", "y")]
    model = onnx.helper.make_model(onnx.helper.make_graph(net.nodes, "g", info[:1], info[1:]), ir_version=10)
    path = saved(model.SerializeToString(), tmp_path)
    assert runtime.prepare(path, options=OPTIONS) == "ONNX Runtime uses no blocked layout in this graph"


def test_convolutions_alone_are_left_alone(tmp_path: Path) -> None:
    net = blocked_models.Network()
    model = onnx.load_from_string(net.model(net.node("Relu", net.conv("x", 32, 3))))
    del model.graph.node[-2:]  # its pool and flatten
    model.graph.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info(model.graph.node[-1].output[0], onnx.TensorProto.FLOAT, None)
    )
    reason = runtime.prepare(saved(model.SerializeToString(), tmp_path), options=OPTIONS)
    assert reason == "the graph has nothing that our operators could do in the blocked layout"


def test_a_version_that_was_not_tried_runs_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(blocked_models.plain_silu(), tmp_path)
    monkeypatch.setattr(onnxruntime_blocked, "TESTED", ("1.0.0",))
    reason = runtime.prepare(path, options=OPTIONS)
    assert reason is not None
    assert "is not one of those that were tried: 1.0.0" in reason


def test_a_missing_library_runs_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(blocked_models.plain_silu(), tmp_path)
    monkeypatch.setattr(native, "library_folders", lambda: iter([]))
    reason = runtime.prepare(path, options=OPTIONS)
    assert reason is not None
    assert reason.startswith("the native library is not there")


def test_a_rewritten_graph_that_differs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = blocked.rewrite

    def wrong(*arguments: object) -> object:
        found = rewrite(*arguments)  # type: ignore[arg-type]
        for node in found.model.graph.node:  # type: ignore[union-attr]
            if node.op_type == "BlockedPointwiseSilu":
                node.op_type = "BlockedPointwiseRelu"
        return found

    monkeypatch.setattr(blocked, "rewrite", wrong)
    path = saved(blocked_models.plain_silu(), tmp_path)
    reason = runtime.prepare(path, options=OPTIONS)
    assert reason is not None
    assert "differs from the stock graph's" in reason
    assert DeviceCache().entries() == []


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    path = saved(blocked_models.plain_silu(), tmp_path)
    assert runtime.prepare(path, options=OPTIONS) is None
    return path


def test_a_graph_that_is_there_is_not_made_again(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_blocked, "_make", lambda *_: pytest.fail("made again"))
    assert runtime.prepare(prepared, options=OPTIONS) is None
    assert [e.kind for e in DeviceCache().entries()] == [KIND]


def test_bytes_find_what_was_made_from_the_file(prepared: Path) -> None:
    assert onnxruntime_blocked.find(prepared.read_bytes()) == onnxruntime_blocked.find(prepared)


def test_a_damaged_entry_is_ignored_and_made_again(prepared: Path) -> None:
    (entry,) = DeviceCache().folder.glob("*.entry")
    content = bytearray(entry.read_bytes())
    content[-100] ^= 1
    entry.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="no graph was made for this CPU"):
        runtime.open_session(prepared, options=OPTIONS)
    assert runtime.prepare(prepared, options=OPTIONS) is None
    stock, inside = both(prepared, 1)
    assert sqnr_db(stock, inside) >= MIN_SQNR_DB


@pytest.mark.parametrize("fact", ["cpu", "instruction_sets", "architecture"])
def test_another_cpu_has_no_use_for_it(prepared: Path, fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = environment.host()
    monkeypatch.setattr(environment, "host", lambda: {**host, fact: "another"})
    with pytest.warns(RuntimeWarning, match="gates run outside the blocked layout here"):
        session = runtime.open_session(prepared, options=OPTIONS)
    assert session.run(feeds(1)).keys() == runtime.open_session(prepared).run(feeds(1)).keys()


def test_other_rules_library_and_version_have_no_use_for_it(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = onnxruntime_blocked._key(prepared)
    assert isinstance(key, dict)
    assert DeviceCache().get(KIND, key) is not None
    assert {"model", "onnxruntime", "library", "rules", "cpu", "instruction_sets", "block"} == key.keys()
    for part in key:
        assert DeviceCache().get(KIND, {**key, part: "another"}) is None


def test_an_application_needs_no_onnx_package(prepared: Path, library_folder: Path) -> None:
    script = (
        "import sys; sys.modules['onnx'] = sys.modules['onnx_ir'] = None\n"
        "from pathlib import Path; import numpy as np, onnxruntime\n"
        "from attn_deploy.runtimes import native, onnxruntime as runtime, onnxruntime_blocked\n"
        "native.library_folders = lambda: iter([Path(sys.argv[2])])\n"
        "onnxruntime_blocked.TESTED = (onnxruntime.__version__,)\n"
        "session = runtime.open_session(Path(sys.argv[1]), options={'layout': 'blocked'})\n"
        "session.run({'x': np.ones((1, 3, 12, 12), np.float32)})\n"
        "sys.modules['attn_deploy.runtimes.blocked'] = None\n"
        "Path(sys.argv[1]).write_bytes(Path(sys.argv[1]).read_bytes() + bytes([0x52, 0]))\n"
        "print(runtime.prepare(Path(sys.argv[1]), options={'layout': 'blocked'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(prepared), str(library_folder)],
        env=os.environ.copy(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("making it needs the onnx package")


@pytest.mark.parametrize("isa", ["avx2", "avx512", "neon"])
def test_every_instruction_set_computes_the_same(isa: str, library_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: the block is ONNX Runtime's, whatever our kernels run with."""
    script = (
        "import sys; from pathlib import Path; import onnxruntime\n"
        "from attn_deploy.runtimes import native, onnxruntime as runtime, onnxruntime_blocked\n"
        "native.library_folders = lambda: iter([Path(sys.argv[1])])\n"
        "onnxruntime_blocked.TESTED = (onnxruntime.__version__,)\n"
        "print(native.status().fault, [runtime.prepare(Path(p), options={'layout': 'blocked'}) for p in sys.argv[2:]]"
        " if not native.status().fault else '')\n"
    )
    paths = []
    for number, name in enumerate(("efficientnet", "eca_resnet", "mobilenetv3")):
        (tmp_path / str(number)).mkdir()
        paths.append(str(saved(MODELS[name][0](), tmp_path / str(number))))
    done = subprocess.run(
        [sys.executable, "-c", script, str(library_folder), *paths],
        env={**os.environ, native.ISA_VARIABLE: isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("True"):
        pytest.skip(f"this CPU has no {isa}")
    assert done.stdout.strip() == "False [None, None, None]"
