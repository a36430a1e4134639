"""Our TensorRT sessions upon a made TensorRT and a made GPU: builds and the cache, lanes, graphs, parts of a batch, and
what is left after an error. The numbers are those of `y = 2 x + 1`, computed on the addresses that our code gave."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx.parser
import pytest

from attn_deploy.errors import AttnDeployError, FeedError, UnavailableError, UsageError
from attn_deploy.runtimes import tensorrt
from attn_deploy.runtimes.cuda_device import DeviceArray, DeviceMemoryError, DeviceStream
from attn_deploy.runtimes.device_cache import DeviceCache
from attn_deploy.runtimes.tensorrt_progress import shown_by
from attn_deploy.session import TensorSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tensorrt_stand_in"))

import tensorrt as tensorrt_stand_in

from attn_deploy.runtimes.tensorrt_log import Messages
from attn_deploy.runtimes.tensorrt_network import parse, require_types

Array = np.ndarray[Any, Any]
X, Y = TensorSpec("x", "float32", ("batch", 4)), TensorSpec("y", "float32", ("batch", 4))
PROFILES = {"profile:batch": "1,1,1;2,4,8"}


def model(*, dtype: str = "float", **faults: Any) -> bytes:
    """y = 2 x + 1 in FP32, or inside in another type; `faults` are those of tensorrt_stand_in/tensorrt/faults.py."""
    onnx_type = {"float": 1, "float16": 10}[dtype]
    diagonal = ", ".join("2" if row == column else "0" for row in range(4) for column in range(4))
    parsed = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
        made (float[batch, 4] x) => (float[batch, 4] y)
        <float[4, 4] weight = {{{diagonal}}}, float[1] one = {{1}}> {{
            narrow = Cast <to: int = {onnx_type}> (x)
            factor = Cast <to: int = {onnx_type}> (weight)
            product = MatMul (narrow, factor)
            wide = Cast <to: int = 1> (product)
            y = Add (wide, one)
        }}""")
    for node in parsed.graph.node:
        node.name = f"layer/{node.op_type}" if node.op_type == "MatMul" else node.output[0]
    onnx.helper.set_model_props(parsed, {"made_tensorrt": json.dumps(faults)})
    content: bytes = parsed.SerializeToString()
    return content


MODEL = model()
RANGES = [{"x": [[1, 4]] * 3}, {"x": [[2, 4], [4, 4], [8, 4]]}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tensorrt_stand_in.built.clear()
    return tmp_path


def opened(content: bytes = MODEL, **options: str) -> Any:
    return tensorrt.open_session(content, inputs=[X], outputs=[Y], options={**PROFILES, **options})


@pytest.fixture(params=["0", "1"], ids=["launched", "graph"])
def session(request: pytest.FixtureRequest, gpu: Any) -> Iterator[Any]:
    session = opened(cuda_graph=request.param)
    yield session
    session.close()


def batch(size: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(size, 4)).astype(np.float32)


def right(x: Array) -> Array:
    return 2 * x + 1


# -- building ---------------------------------------------------------------------------------------------------------


def test_the_runtime_is_available() -> None:
    assert tensorrt.availability() is None


def test_an_engine_is_built_as_the_options_say(gpu: Any) -> None:
    opened(workspace_mb="64", optimization_level="5").close()
    (config,) = tensorrt_stand_in.built
    assert config.profiles == RANGES
    assert tensorrt_stand_in.BuilderFlag.TF32 not in config.flags
    assert config.limits == {tensorrt_stand_in.MemoryPoolType.WORKSPACE: 64 << 20}
    assert config.builder_optimization_level == 5
    assert config.profiling_verbosity is tensorrt_stand_in.ProfilingVerbosity.DETAILED


def test_tf32_and_compatible_engines_on_request(gpu: Any) -> None:
    session = opened(tf32="1", hardware_compatible="ampere_plus")
    (config,) = tensorrt_stand_in.built
    assert tensorrt_stand_in.BuilderFlag.TF32 in config.flags
    assert config.hardware_compatibility_level is tensorrt_stand_in.HardwareCompatibilityLevel.AMPERE_PLUS
    session.close()


def test_a_compatibility_that_this_version_lacks_is_refused(gpu: Any) -> None:
    with pytest.raises(UsageError, match="compute capability"):
        opened(hardware_compatible="same_compute_capability")


def test_a_second_opening_takes_the_engine_from_the_cache(gpu: Any) -> None:
    for cuda_graph in "01":
        opened(cuda_graph=cuda_graph).close()
    assert len(tensorrt_stand_in.built) == 1
    assert sorted(e.kind for e in DeviceCache().entries()) == ["tensorrt-engine", "tensorrt-timing"]


@pytest.mark.parametrize("change", [{"optimization_level": "4"}, {"profile:batch": "1,2,8"}, {"tf32": "1"}])
def test_what_an_engine_depends_on_builds_another(change: dict[str, str], gpu: Any) -> None:
    opened().close()
    opened(**change).close()
    assert len(tensorrt_stand_in.built) == 2


def test_another_model_or_other_weights_build_another(folder: Path, gpu: Any) -> None:
    path, weights = folder / "model.onnx", folder / "model.onnx.data"
    path.write_bytes(model(weights="model.onnx.data"))
    for content in (b"one", b"two", b"two"):
        weights.write_bytes(content)
        opened(path).close()  # type: ignore[arg-type]
    assert len(tensorrt_stand_in.built) == 2


def test_what_was_measured_is_used_for_the_next_engine(gpu: Any) -> None:
    opened().close()
    opened(optimization_level="4").close()
    assert [c.timing.content for c in tensorrt_stand_in.built if c.timing is not None] == [b"", b"+"]


def test_an_engine_in_the_cache_that_is_not_taken_is_built_again(gpu: Any) -> None:
    opened().close()
    cache = DeviceCache()
    (entry,) = [e for e in cache.entries() if e.kind == "tensorrt-engine"]
    cache.put(entry.kind, entry.key, tensorrt_stand_in.plan(version=(10, 3, 0, 26)))
    session = opened()
    assert len(tensorrt_stand_in.built) == 2
    np.testing.assert_array_equal(session.run({"x": batch(2)})["y"], right(batch(2)))
    session.close()


def test_nodes_that_are_not_taken_are_named(gpu: Any) -> None:
    errors = [["blocks.0/Det", "Det", "[parser.cpp::made::9] no such operator"], ["blocks.1/Det", "Det", "the same"]]
    with pytest.raises(AttnDeployError, match="does not take the model") as error:
        opened(model(errors=errors))
    assert error.value.got == "blocks.0/Det (Det): no such operator; blocks.1/Det (Det): the same"


def test_a_build_without_memory_says_so(gpu: Any) -> None:
    with pytest.raises(DeviceMemoryError) as error:
        opened(model(fails_to_build="FAILED_ALLOCATION"))
    assert "workspace_mb" in str(error.value.next_step)


def test_a_build_that_fails_gives_the_reason(gpu: Any) -> None:
    with pytest.raises(AttnDeployError, match="cannot build") as error:
        opened(model(fails_to_build="INVALID_ARGUMENT"))
    assert error.value.got == "a reason"


def test_a_build_is_shown_and_a_key_ends_it(gpu: Any) -> None:
    class Shown:
        steps: ClassVar[list[int]] = []

        def stage(self, name: str) -> None: ...

        def step(self, done: int, total: int) -> None:
            self.steps.append(done)
            if done == 500:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), shown_by(Shown()):
        opened()
    assert Shown.steps == [250, 500]


def test_an_engine_file_of_another_version_is_refused(folder: Path, gpu: Any) -> None:
    path = folder / "old.engine"
    path.write_bytes(tensorrt_stand_in.plan(version=(10, 3, 0, 26)))
    with pytest.raises(UnavailableError, match="another TensorRT") as error:
        opened(path)  # type: ignore[arg-type]
    assert "10.3.0.26" in str(error.value.got)


def test_an_engine_file_runs(folder: Path, gpu: Any) -> None:
    path = folder / "own.engine"
    path.write_bytes(tensorrt_stand_in.plan(MODEL, profiles=RANGES))
    session = opened(path)  # type: ignore[arg-type]
    np.testing.assert_array_equal(session.run({"x": batch(3)})["y"], right(batch(3)))
    session.close()
    assert tensorrt_stand_in.built == []


# -- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_host_arrays_in_and_out(session: Any, size: int) -> None:
    for seed in range(5):
        x = batch(size, seed)
        np.testing.assert_array_equal(session.run({"x": x})["y"], right(x))


@pytest.mark.parametrize("size", [9, 16, 17, 30])
def test_a_batch_beyond_the_profiles_runs_in_parts(session: Any, size: int) -> None:
    for seed in range(3):
        x = batch(size, seed)
        np.testing.assert_array_equal(session.run({"x": x})["y"], right(x))


def test_results_are_the_callers_own(session: Any) -> None:
    first = session.run({"x": batch(2, 1)})["y"]
    session.run({"x": batch(2, 2)})
    np.testing.assert_array_equal(first, right(batch(2, 1)))


def test_a_shape_that_comes_again_is_captured_and_then_launched_as_a_graph(gpu: Any) -> None:
    session = opened()
    calls = []
    for seed in range(4):
        gpu.trace()
        np.testing.assert_array_equal(session.run({"x": batch(4, seed)})["y"], right(batch(4, seed)))
        calls.append(gpu.calls())
    assert ["cuGraphLaunch" in c for c in calls] == [False, False, True, True]
    assert ["cuStreamBeginCapture" in c for c in calls] == [False, True, False, False]
    assert "cuMemAllocAsync" not in calls[3]
    session.close()


def test_several_shapes_keep_their_graphs(gpu: Any) -> None:
    session = opened()
    for seed in range(3):
        for size in (1, 2, 3, 4):
            session.run({"x": batch(size, seed)})
    gpu.trace()
    for size in (1, 2, 3, 4):
        np.testing.assert_array_equal(session.run({"x": batch(size, 9)})["y"], right(batch(size, 9)))
    assert gpu.calls().count("cuGraphLaunch") == 4
    session.close()


def test_an_engine_that_cannot_be_captured_runs_kernel_by_kernel(gpu: Any) -> None:
    session = opened(model(capturable=False))
    for seed in range(4):
        np.testing.assert_array_equal(session.run({"x": batch(2, seed)})["y"], right(batch(2, seed)))
    assert "cuGraphLaunch" not in gpu.calls()
    session.close()


def test_more_shapes_than_are_kept_give_memory_back(gpu: Any) -> None:
    session = tensorrt.open_session(MODEL, inputs=[X], outputs=[Y], options={"profile:batch": "1,4,64"})
    sizes = range(1, 40)
    for size in sizes:
        session.run({"x": batch(size)})
    assert gpu.allocations() <= 1 + 2 * 8
    session.close()
    assert gpu.allocations() == 0


def put(stream: DeviceStream, x: Array) -> DeviceArray:
    array = stream.allocate(x.shape, x.dtype)
    stream.upload("x", x, array)
    return array


def test_gpu_arrays_in_and_out_without_a_copy(session: Any, gpu: Any) -> None:
    stream = DeviceStream()
    for seed in range(4):
        x = put(stream, batch(3, seed))
        gpu.trace()
        y = session.run_device({"x": x}, stream=stream.handle)["y"]
        assert "copy" not in gpu.calls()
        assert y.shape == (3, 4)
        np.testing.assert_array_equal(y.numpy(), right(batch(3, seed)))


def test_the_same_addresses_again_launch_a_graph(gpu: Any) -> None:
    session, stream = opened(), DeviceStream()
    x = put(stream, batch(3))
    found = set()
    for _ in range(60):  # results that are dropped give their addresses to later ones
        gpu.trace()
        y = session.run_device({"x": x}, stream=stream.handle)["y"]
        np.testing.assert_array_equal(y.numpy(), right(batch(3)))
        del y
        found |= set(gpu.calls())
    assert "cuGraphLaunch" in found
    session.close()


def test_a_view_that_is_not_aligned_is_copied_on_the_gpu(session: Any, gpu: Any) -> None:
    stream = DeviceStream()
    whole = put(stream, batch(5))
    view = stream.borrow(whole.pointer + 16, (4, 4), np.float32, owner=whole)
    gpu.trace()
    y = session.run_device({"x": view})["y"]
    assert gpu.calls().count("cuMemcpyDtoDAsync") == 1
    np.testing.assert_array_equal(y.numpy(), right(batch(5)[1:]))


@pytest.mark.parametrize("size", [9, 17])
def test_a_large_batch_on_the_gpu_runs_in_parts(session: Any, size: int) -> None:
    stream = DeviceStream()
    for seed in range(3):
        x = batch(size, seed)
        y = session.run_device({"x": put(stream, x)}, stream=stream.handle)["y"]
        np.testing.assert_array_equal(y.numpy(), right(x))


def test_a_gpu_array_given_to_run_comes_back_to_the_host(session: Any) -> None:
    y = session.run({"x": put(DeviceStream(), batch(2))})["y"]
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, right(batch(2)))


def test_a_host_array_given_to_run_device_is_taken_there(session: Any) -> None:
    np.testing.assert_array_equal(session.run_device({"x": batch(2)})["y"].numpy(), right(batch(2)))


def test_many_threads(session: Any) -> None:
    faults: list[str] = []

    def work(seed: int) -> None:
        for turn in range(20):
            x = batch(1 + (seed + turn) % 10, seed * 100 + turn)
            if not np.array_equal(session.run({"x": x})["y"], right(x)):
                faults.append(f"{seed} {turn}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


@pytest.mark.parametrize("shape", [(2, 5), (4,), (2, 4, 1)])
def test_a_wrong_shape_is_refused(session: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(FeedError):
        session.run({"x": np.zeros(shape, np.float32)})


def test_a_gpu_array_of_another_type_is_refused(session: Any) -> None:
    with pytest.raises(FeedError, match="dtype"):
        session.run_device({"x": put(DeviceStream(), batch(2).astype(np.float64))})


def test_memory_that_runs_out_leaves_the_session_usable(session: Any, gpu: Any) -> None:
    session.run({"x": batch(2)})
    gpu.fail("cuMemAllocAsync")
    with pytest.raises(DeviceMemoryError):
        session.run({"x": batch(7)})
    for seed in range(4):
        np.testing.assert_array_equal(session.run({"x": batch(7, seed)})["y"], right(batch(7, seed)))


def test_activations_that_do_not_fit_are_an_error_and_smaller_batches_run(gpu: Any) -> None:
    session = opened()
    gpu.limit_memory(4 * tensorrt_stand_in.ACTIVATION_BYTES)
    with pytest.raises(DeviceMemoryError):
        session.run({"x": batch(8)})
    np.testing.assert_array_equal(session.run({"x": batch(1)})["y"], right(batch(1)))
    session.close()


def test_closing_gives_everything_back(gpu: Any) -> None:
    before = gpu.allocations()
    session = opened()
    session.run({"x": batch(17)})
    session.close()
    assert gpu.allocations() == before
    with pytest.raises(AttnDeployError, match="closed"):
        session.run({"x": batch(1)})


@pytest.mark.parametrize("size", [1, 2], ids=["first profile", "second profile"])
def test_read_back_says_what_runs(size: int, folder: Path, gpu: Any) -> None:
    path = folder / "model.onnx"
    path.write_bytes(model(dtype="float16"))
    nodes = tensorrt.read_back(path, {"x": batch(size)}, options=PROFILES)
    assert len(nodes) == 5
    (node,) = [n for n in nodes if n.products]
    assert node.op_type == "gemm"
    assert node.covers == ("layer/MatMul",)
    assert node.computes_in == "float16"
    assert [p.multiply_adds for p in node.products] == [size * 4 * 4]
    assert all(n.time_us > 0 for n in nodes)
    assert len(tensorrt_stand_in.built) == 1


def test_an_engine_that_widens_its_types_is_read_back_as_such(folder: Path, gpu: Any) -> None:
    path = folder / "model.onnx"
    path.write_bytes(model(dtype="float16", widens=True))
    nodes = tensorrt.read_back(path, {"x": batch(2)}, options=PROFILES)
    assert [n.computes_in for n in nodes if n.products] == ["float32"]


def test_without_specs_the_model_itself_says_its_inputs(gpu: Any) -> None:
    session = tensorrt.open_session(MODEL, options=PROFILES)
    assert session.inputs == (X,)
    assert session.outputs == (TensorSpec("y", "float32", ("y.0", 4)),)
    session.close()


def test_a_gpu_without_fp8_is_told_before_the_build(gpu: Any) -> None:
    """The made GPU has compute capability 9.0; what an older one is told does not need one."""
    parsed = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        made (float[2, 4] x) => (float[2, 4] y)
        <float scale = {0.5}, float8e4m3fn[2, 4] levels> {
            levels = QuantizeLinear <output_dtype: int = 17> (x, scale)
            y = DequantizeLinear (levels, scale)
        }""")
    network = parse(parsed.SerializeToString(), Messages()).network
    for capability in ("8.9", "12.0"):
        require_types(network, capability)
    with pytest.raises(UnavailableError, match="cannot compute in FP8") as caught:
        require_types(network, "8.6")
    assert caught.value.got == "compute capability 8.6"
    require_types(parse(MODEL, Messages()).network, "8.9")
