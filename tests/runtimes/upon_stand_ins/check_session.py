"""runtimes/onnxruntime_cuda.py with the real ONNX Runtime on a made GPU: its CUDA provider places the nodes, keeps its
memory, captures graphs and copies; what moves data alone gives real numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from attn_deploy.errors import AttnDeployError, FeedError, NotAsAskedError, UsageError
from attn_deploy.runtimes import onnxruntime_cuda
from attn_deploy.runtimes.cuda_device import DeviceArray, DeviceMemoryError, DeviceStream
from attn_deploy.session import TensorSpec

Array = np.ndarray[Any, Any]


def model(text: str) -> bytes:
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    return parsed.SerializeToString()


MOVES = model("""moves (float[batch, 2, 3] x, float[batch, 6] z) => (float[batch, 6] y, float[batch, 2, 3] w)
    { y = Flatten (x)  shape = Shape (x)  w = Reshape (z, shape) }""")
"""Every node copies; the shape is computed on the CPU."""
COMPUTES = model("""computes (float[batch, 4] x) => (float[batch, 4] y)
    <float[4, 4] weight = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}>
    { product = MatMul (x, weight)  y = Relu (product) }""")
ELSEWHERE = model(
    """elsewhere (float[batch, 3, 3] x) => (float[batch] y) { positive = Relu (x)  y = Det (positive) }"""
)
"""ONNX Runtime has no CUDA kernel for Det."""
ALLOCATIONS = {"cudaMalloc", "cuMemAllocAsync", "cuMemAllocHost"}


def feeds(batch: int, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "x": random.normal(size=(batch, 2, 3)).astype(np.float32),
        "z": random.normal(size=(batch, 6)).astype(np.float32),
    }


def check(fed: dict[str, Array], outputs: dict[str, Any]) -> None:
    np.testing.assert_array_equal(np.asarray(outputs["y"]), fed["x"].reshape(-1, 6))
    np.testing.assert_array_equal(np.asarray(outputs["w"]), fed["z"].reshape(-1, 2, 3))


@pytest.fixture(params=["0", "1"], ids=["launched", "graph"])
def session(request: pytest.FixtureRequest, gpu: Any) -> Iterator[Any]:
    session = onnxruntime_cuda.open_session(MOVES, options={"cuda_graph": request.param})
    gpu.trace()
    yield session
    session.close()


@pytest.fixture
def captured(gpu: Any) -> Iterator[Any]:
    session = onnxruntime_cuda.open_session(MOVES, options={"cuda_graph": "1", "cuda_graph_shapes": "2"})
    gpu.trace()
    yield session
    session.close()


def on_device(stream: DeviceStream, fed: dict[str, Array]) -> dict[str, DeviceArray]:
    arrays = {name: stream.allocate(array.shape, array.dtype) for name, array in fed.items()}
    for name, array in fed.items():
        stream.upload(name, array, arrays[name])
    return arrays


# -- NumPy in and out -------------------------------------------------------------------------------------------------


def test_the_runtime_is_available_and_says_its_inputs(session: Any) -> None:
    assert onnxruntime_cuda.availability() is None
    assert session.inputs == (TensorSpec("x", "float32", ("batch", 2, 3)), TensorSpec("z", "float32", ("batch", 6)))
    assert [spec.name for spec in session.outputs] == ["y", "w"]


def test_every_call_gives_its_own_numbers(session: Any) -> None:
    results = []
    for seed in range(6):
        fed = feeds(1 + seed % 3, seed)
        results.append((fed, session.run(fed)))
    for fed, outputs in results:  # also those of earlier calls: nothing is written over
        check(fed, outputs)


def test_a_known_shape_allocates_nothing(session: Any, gpu: Any) -> None:
    session.run(feeds(2))
    gpu.trace()
    session.run(feeds(2, seed=1))
    assert not ALLOCATIONS & set(gpu.calls())


def test_memory_is_kept_for_a_bounded_number_of_shapes(gpu: Any) -> None:
    session = onnxruntime_cuda.open_session(MOVES)
    for batch in range(1, 41):
        check(feeds(batch), session.run(feeds(batch)))
    assert gpu.allocations() < 40, "four arrays a shape"
    session.close()


def test_an_output_whose_size_does_not_follow_from_the_inputs(gpu: Any) -> None:
    outputs = (TensorSpec("y", "float32", ("?", 6)), TensorSpec("w", "float32", ("rows", 2, 3)))
    session = onnxruntime_cuda.open_session(MOVES, outputs=outputs, options={"cuda_graph": "1"})
    gpu.trace()
    for seed in range(3):
        check(feeds(2, seed), session.run(feeds(2, seed)))
        check(feeds(2, seed), session.run_device(feeds(2, seed)))
    assert "cudaStreamBeginCapture" not in gpu.calls(), "a graph needs addresses that are known before"
    session.close()


def test_many_threads_get_their_own_numbers(session: Any) -> None:
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(8):
                fed = feeds(1 + (seed + step) % 2, 100 * seed + step)
                check(fed, session.run(fed))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- tensors of the GPU -----------------------------------------------------------------------------------------------


def test_tensors_of_the_gpu_in_and_out(session: Any) -> None:
    stream = DeviceStream()
    for seed in range(3):
        fed = feeds(2, seed)
        outputs = session.run_device(on_device(stream, fed), stream=stream.handle)
        assert all(isinstance(array, DeviceArray) for array in outputs.values())
        check(fed, outputs)
        check(fed, session.run_device({"x": fed["x"], "z": on_device(stream, fed)["z"]}))
        check(fed, session.run(on_device(stream, fed)))
    stream.close()


def test_results_on_the_gpu_are_not_written_over(session: Any) -> None:
    first = session.run_device(feeds(2, seed=1))
    session.run_device(feeds(2, seed=2))
    check(feeds(2, seed=1), first)


def test_without_a_graph_nothing_is_copied(gpu: Any) -> None:
    session = onnxruntime_cuda.open_session(COMPUTES)
    stream = DeviceStream()
    arrays = on_device(stream, {"x": np.ones((2, 4), np.float32)})
    session.run_device(arrays)
    gpu.trace()
    session.run_device(arrays)
    calls = gpu.calls()
    assert "cublasSgemm_v2" in calls
    assert "cudaLaunchKernel" in calls
    assert not [call for call in calls if "emcpy" in call]
    session.close()


def test_with_a_stream_the_call_waits_for_it_and_it_waits_for_the_call(session: Any, gpu: Any) -> None:
    stream = DeviceStream()
    arrays = on_device(stream, feeds(2))
    session.run_device(arrays, stream=stream.handle)
    gpu.trace()
    session.run_device(arrays, stream=stream.handle)
    rows = gpu.trace()
    names = [name for name, _, _ in rows]
    assert not [name for name in names if "Synchronize" in name], "the call returns at once"
    waits = [(first, index) for index, (name, first, _) in enumerate(rows) if name == "cuStreamWaitEvent"]
    work = [index for index, name in enumerate(names) if name in ("cudaMemcpyAsync", "cudaGraphLaunch")]
    ours = session._device.handle
    assert waits[0][0] == ours
    assert waits[0][1] < work[0]
    assert waits[-1][0] == stream.handle
    assert waits[-1][1] > work[-1]
    stream.close()


def test_without_a_stream_the_results_are_there(session: Any, gpu: Any) -> None:
    arrays = on_device(DeviceStream(), feeds(2))
    gpu.trace()
    results = session.run_device(arrays)
    assert gpu.calls()[-1] == "cuStreamSynchronize"
    check(feeds(2), results)


def test_inputs_live_until_they_have_been_read(session: Any, gpu: Any) -> None:
    stream = DeviceStream()
    arrays = on_device(stream, feeds(2))
    pointers = {array.pointer for array in arrays.values()}
    gpu.trace()
    session.run_device(arrays, stream=stream.handle)
    del arrays
    gpu.allocations()
    freed = {first for name, first, _ in gpu.trace() if name == "cuMemFreeAsync"}
    assert not freed & pointers, "the GPU may not have read them yet"
    session.run_device(feeds(2))
    freed = {first for name, first, _ in gpu.trace() if name == "cuMemFreeAsync"}
    assert pointers <= freed
    stream.close()


def test_a_tensor_that_is_not_contiguous_is_refused_and_the_session_goes_on(session: Any) -> None:
    class Transposed:
        shape = (2, 2, 3)

        def __init__(self) -> None:
            self.memory = DeviceStream().allocate(self.shape, np.float32)
            self.__cuda_array_interface__ = {**self.memory.__cuda_array_interface__, "strides": (4, 8, 16)}

    with pytest.raises(FeedError, match="'x' is not contiguous"):
        session.run_device({**feeds(2), "x": Transposed()})
    check(feeds(2), session.run(feeds(2)))


# -- graphs -----------------------------------------------------------------------------------------------------------


def test_a_shape_is_captured_once_and_replayed(captured: Any, gpu: Any) -> None:
    captured.run(feeds(2))
    assert gpu.calls().count("cudaStreamBeginCapture") == 1
    for seed in range(3):
        check(feeds(2, seed), captured.run(feeds(2, seed)))
    calls = gpu.calls()
    assert calls.count("cudaGraphLaunch") == 3
    assert "cudaStreamBeginCapture" not in calls
    assert "cudaMemcpyAsync" not in calls


def test_shapes_beyond_the_bound_run_without_a_graph(captured: Any, gpu: Any) -> None:
    for batch in (1, 2, 3, 4):
        check(feeds(batch), captured.run(feeds(batch)))
    assert gpu.calls().count("cudaStreamBeginCapture") == 2
    check(feeds(4, seed=1), captured.run(feeds(4, seed=1)))
    assert "cudaGraphLaunch" not in gpu.calls()
    check(feeds(1, seed=1), captured.run(feeds(1, seed=1)))
    assert "cudaGraphLaunch" in gpu.calls()


def test_with_a_second_thread_graphs_move_to_one_thread(captured: Any, gpu: Any) -> None:
    captured.run(feeds(1))
    for _ in range(5):
        thread = threading.Thread(target=lambda: check(feeds(1, seed=3), captured.run(feeds(1, seed=3))))
        thread.start()
        thread.join()
    assert gpu.calls().count("cudaStreamBeginCapture") == 2, "the first thread's, then the session's own"


@pytest.mark.parametrize(
    ("function", "skip"),
    [("cudaStreamBeginCapture", 0), ("cudaMemcpyAsync", 4), ("cudaStreamEndCapture", 0), ("cudaGraphInstantiate", 0)],
)
def test_a_capture_that_breaks_leaves_a_session_without_that_graph(
    captured: Any, gpu: Any, function: str, skip: int
) -> None:
    """The two calls before a capture make two copies each: the fifth is captured."""
    gpu.fail(function, skip=skip, code=900)
    for seed in range(3):
        check(feeds(2, seed), captured.run(feeds(2, seed)))
    calls = gpu.calls()
    assert calls.count("cudaStreamBeginCapture") == 1
    assert "cudaGraphLaunch" not in calls
    check(feeds(1), captured.run(feeds(1)))
    assert "cudaGraphLaunch" in gpu.calls(), "other shapes are captured"


def test_a_graph_that_does_not_start_is_an_error(captured: Any, gpu: Any) -> None:
    captured.run(feeds(2))
    gpu.fail("cudaGraphLaunch", code=700)
    with pytest.raises(AttnDeployError, match="the GPU reported an error"):
        captured.run(feeds(2))
    check(feeds(2), captured.run(feeds(2)))


# -- errors -----------------------------------------------------------------------------------------------------------


def test_full_memory_is_an_error_and_smaller_batches_still_run(session: Any, gpu: Any) -> None:
    session.run(feeds(1))
    gpu.limit_memory(1 << 20)
    with pytest.raises(DeviceMemoryError, match="memory is full"):
        session.run(feeds(100_000))
    check(feeds(2), session.run(feeds(2)))
    gpu.limit_memory(8 << 30)
    check(feeds(100_000), session.run(feeds(100_000)))


def test_full_memory_inside_the_runtime(gpu: Any) -> None:
    session = onnxruntime_cuda.open_session(COMPUTES)
    gpu.fail("cudaMalloc")  # of the arena, when the first call needs room between the nodes
    with pytest.raises(DeviceMemoryError, match="memory is full") as caught:
        session.run({"x": np.ones((2, 4), np.float32)})
    assert "out of memory" in str(caught.value.got) or "allocate memory" in str(caught.value.got)
    assert session.run({"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 4)
    session.close()


def test_what_is_kept_goes_when_memory_ran_out_inside_the_runtime(gpu: Any) -> None:
    session = onnxruntime_cuda.open_session(COMPUTES)
    session.run({"x": np.ones((2, 4), np.float32)})
    session.run({"x": np.ones((3, 4), np.float32)})
    before = gpu.allocations()
    gpu.fail("cudaMalloc")
    with pytest.raises(DeviceMemoryError):
        session.run({"x": np.ones((1000, 4), np.float32)})
    assert gpu.allocations() == before - 4
    session.close()


def test_memory_of_other_shapes_is_given_back_before_a_call_fails(gpu: Any) -> None:
    session = onnxruntime_cuda.open_session(MOVES)
    session.run(feeds(1))
    session.run(feeds(1000))
    gpu.limit_memory(0)
    with pytest.raises(DeviceMemoryError):
        session.run(feeds(900))
    gpu.limit_memory(100_000)  # enough for 900 rows once those of 1000 have gone
    check(feeds(900), session.run(feeds(900)))
    session.close()


def test_a_closed_session_says_so_and_holds_nothing(gpu: Any) -> None:
    before = gpu.allocations()
    for graph in "01":
        session = onnxruntime_cuda.open_session(MOVES, options={"cuda_graph": graph})
        kept = session.run_device(feeds(2))
        session.close()
        session.close()
        with pytest.raises(AttnDeployError, match="the session is closed"):
            session.run(feeds(2))
        check(feeds(2), kept)
    del kept
    assert gpu.allocations() == before


def test_a_broken_model_is_told(gpu: Any) -> None:
    with pytest.raises(AttnDeployError, match="ONNX Runtime rejected the model"):
        onnxruntime_cuda.open_session(b"not a model")


@pytest.mark.parametrize(
    ("options", "got"), [({"use_tf23": "1"}, "use_tf23"), ({"use_tf32": "yes"}, "yes"), ({"device_id": "x"}, "x")]
)
def test_an_unknown_option_is_an_error(gpu: Any, options: dict[str, str], got: str) -> None:
    with pytest.raises(UsageError) as caught:
        onnxruntime_cuda.open_session(MOVES, options=options)
    assert caught.value.got == got


def test_every_option_is_one_of_the_installed_runtimes(gpu: Any) -> None:
    """It rejects an option that it does not know."""
    options = dict.fromkeys(onnxruntime_cuda._FLAGS, "1") | {
        "arena_extend_strategy": "kNextPowerOfTwo",
        "gpu_mem_limit": "1000000",
        "cudnn_conv_algo_search": "HEURISTIC",
        "sdpa_kernel": "0",
        "device_id": "0",
    }
    assert set(options) == {*onnxruntime_cuda._FLAGS, *onnxruntime_cuda._SETTINGS}
    session = onnxruntime_cuda.open_session(MOVES, options=options)
    there = session._session.get_provider_options()["CUDAExecutionProvider"]
    assert there["user_compute_stream"] == str(session._device.handle)
    assert {there[name] for name in ("prefer_nhwc", "use_tf32", "fuse_conv_bias")} == {"1"}
    assert there["arena_extend_strategy"] == "kNextPowerOfTwo"
    session.close()


def test_fp32_is_fp32_unless_asked_otherwise(session: Any) -> None:
    assert session._session.get_provider_options()["CUDAExecutionProvider"]["use_tf32"] == "0"


# -- placement --------------------------------------------------------------------------------------------------------


def test_a_node_without_a_gpu_kernel_is_named(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(ELSEWHERE)
    feed = {"x": np.ones((2, 3, 3), np.float32)}
    for call in (
        lambda: onnxruntime_cuda.open_session(ELSEWHERE),
        lambda: onnxruntime_cuda.read_back(tmp_path / "m.onnx", feed),
    ):
        with pytest.raises(NotAsAskedError, match="do not run on the GPU") as caught:
            call()
        assert "1 of " in str(caught.value.got)
        assert "(Det)" in str(caught.value.got)
        assert caught.value.exit_code == 4


def test_a_graph_with_a_node_elsewhere_cannot_be_captured(gpu: Any) -> None:
    with pytest.raises(NotAsAskedError, match="cannot be captured as a CUDA graph"):
        onnxruntime_cuda.open_session(ELSEWHERE, options={"cuda_graph": "1"})


def test_what_computes_shapes_may_stay_on_the_cpu(gpu: Any, tmp_path: Path) -> None:
    text = """resizes (float[batch, 3, 8, 8] x) => (float[batch, 3, 4, 4] y)
        <int64[1] two = {2}, int64[1] end = {4}>
        { shape = Shape (x)  size = Slice (shape, two, end)  half = Div (size, two)
          rest = Shape <start: int = 0, end: int = 2> (x)  sizes = Concat <axis: int = 0> (rest, half)
          y = Resize <mode = "nearest"> (x, , , sizes) }"""
    (tmp_path / "m.onnx").write_bytes(model(text))
    nodes = onnxruntime_cuda.read_back(tmp_path / "m.onnx", {"x": np.ones((2, 3, 8, 8), np.float32)})
    providers = {node.op_type: node.provider for node in nodes}
    assert providers["Resize"] == "CUDAExecutionProvider"
    assert providers["Div"] == "CPUExecutionProvider", "else this test shows nothing"


def test_read_back_names_nodes_with_types_and_shapes(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(COMPUTES)
    nodes = onnxruntime_cuda.read_back(
        tmp_path / "m.onnx", {"x": np.ones((2, 4), np.float32)}, options={"cuda_graph": "1"}
    )
    assert [(node.op_type, node.provider) for node in nodes] == [
        ("MatMul", "CUDAExecutionProvider"),
        ("Relu", "CUDAExecutionProvider"),
    ]
    assert [(t.dtype, t.shape) for t in nodes[0].inputs] == [("float32", (2, 4)), ("float32", (4, 4))]
