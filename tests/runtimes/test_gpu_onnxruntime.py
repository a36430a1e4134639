"""ONNX Runtime on a GPU: numbers against its CPU provider, torch tensors in and out, streams, graphs, full memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from attn_deploy.errors import FeedError
from attn_deploy.runtimes import onnxruntime_cuda
from attn_deploy.runtimes.cuda_device import DeviceMemoryError, DeviceStream
from attn_deploy.runtimes.cuda_facts import device_facts

_REASON = onnxruntime_cuda.availability()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]

Array = np.ndarray[Any, Any]
WIDTH, HEADS = 64, 4
MAX_FP32_ERROR = 2e-5
"""Of values around 1 after three products of 64 summands: 2**-24 * 64 * 3 = 1.1e-5, and TF32 would give 1e-3."""


@pytest.fixture(scope="module")
def block() -> bytes:
    """Attention with its projections and a LayerNormalization on [batch, tokens, 64], of random weights."""
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        block (float[batch, tokens, {WIDTH}] x) => (float[batch, tokens, {WIDTH}] y)
        {{
            query = MatMul (x, weight_q)  key = MatMul (x, weight_k)  value = MatMul (x, weight_v)
            mixed = com.microsoft.MultiHeadAttention <num_heads: int = {HEADS}> (query, key, value)
            projected = MatMul (mixed, weight_o)
            sum = Add (projected, x)
            y = LayerNormalization <axis: int = -1> (sum, scale, bias)
        }}""")
    random = np.random.default_rng(0)
    for name in ("q", "k", "v", "o"):
        weight = (random.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"weight_{name}"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(WIDTH, np.float32), "scale"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(WIDTH, np.float32), "bias"))
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def reference(block: bytes) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(block, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


@pytest.fixture(params=["0", "1"], ids=["launched", "graph"])
def session(request: pytest.FixtureRequest, block: bytes) -> Iterator[Any]:
    session = onnxruntime_cuda.open_session(block, options={"cuda_graph": request.param})
    yield session
    session.close()


def inputs(batch: int, tokens: int = 16, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(batch, tokens, WIDTH)).astype(np.float32)


def close(got: Any, expected: Array) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=MAX_FP32_ERROR)


def test_numbers_are_those_of_the_cpu_on_every_call(session: Any, reference: Any) -> None:
    for seed in range(6):
        x = inputs(1 + seed % 3, seed=seed)
        close(session.run({"x": x})["y"], reference(x))


def test_torch_tensors_in_and_out_on_the_callers_stream(session: Any, reference: Any) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for seed in range(4):
            x = torch.from_numpy(inputs(2, seed=seed)).cuda(non_blocking=True)
            doubled = x * 2  # queued on the stream: the session has to wait for it
            y = torch.from_dlpack(session.run_device({"x": doubled}, stream=stream)["y"]) + 1
            close(y.cpu() - 1, reference(inputs(2, seed=seed) * 2))


def test_torch_tensors_without_a_stream(session: Any, reference: Any) -> None:
    x = inputs(2, seed=5)
    results = [session.run_device({"x": torch.from_numpy(x).cuda()})["y"] for _ in range(3)]
    for result in results:
        assert torch.from_dlpack(result).data_ptr() == result.pointer, "nothing is copied"
        close(torch.from_dlpack(result).cpu(), reference(x))


def test_inputs_that_are_dropped_at_once_are_still_read(session: Any, reference: Any) -> None:
    stream = torch.cuda.Stream()
    results = []
    with torch.cuda.stream(stream):
        for seed in range(20):
            x = torch.from_numpy(inputs(4, seed=seed)).cuda()
            results.append(session.run_device({"x": x}, stream=stream)["y"])
            del x
            torch.full((4, 16, WIDTH), 1e6, device="cuda")  # takes the memory that was dropped
    for seed, result in enumerate(results):
        close(result, reference(inputs(4, seed=seed)))


def test_many_threads(session: Any, reference: Any) -> None:
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(10):
                x = inputs(1 + step % 2, seed=100 * seed + step)
                close(session.run({"x": x})["y"], reference(x))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_full_memory_leaves_the_session_usable(session: Any, reference: Any) -> None:
    free = torch.cuda.mem_get_info()[0]
    rows = free // (4 * WIDTH * 16) + 1
    huge = np.broadcast_to(np.float32(0), (rows, 16, WIDTH))
    with pytest.raises(DeviceMemoryError, match="memory is full"):
        session.run({"x": huge})
    close(session.run({"x": inputs(2)})["y"], reference(inputs(2)))


def test_a_transposed_tensor_is_refused(session: Any) -> None:
    with pytest.raises(FeedError, match="not contiguous"):
        session.run_device({"x": torch.zeros(16, 2, WIDTH, device="cuda").transpose(0, 1)})


def test_every_node_is_read_back_on_the_gpu(block: bytes, tmp_path: Path) -> None:
    (tmp_path / "block.onnx").write_bytes(block)
    nodes = onnxruntime_cuda.read_back(tmp_path / "block.onnx", {"x": inputs(2)})
    assert {node.provider for node in nodes} == {"CUDAExecutionProvider"}
    assert "MultiHeadAttention" in [node.op_type for node in nodes]


def test_closing_gives_the_memory_back(block: bytes) -> None:
    def used() -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free

    for _ in range(2):  # the first opens what stays: cuBLAS, cuDNN, the pool
        session = onnxruntime_cuda.open_session(block, options={"cuda_graph": "1"})
        session.run({"x": inputs(8)})
        session.close()
        before = used()
    session = onnxruntime_cuda.open_session(block, options={"cuda_graph": "1"})
    session.run({"x": inputs(8)})
    session.close()
    assert used() - before < 8 * 2**20


def test_events_measure_the_gpus_own_time() -> None:
    stream = DeviceStream()
    array = stream.allocate((256, 2**20), np.float32)
    begin = stream.record(timing=True)
    stream.copy(array, stream.allocate((256, 2**20), np.float32))
    end = stream.record(timing=True)
    end.sync()
    assert 0.05 < end - begin < 1000, "a gigabyte is read and written: 8 TB/s would take 0.27 ms"
    stream.close()


def test_facts_of_the_gpu() -> None:
    facts = device_facts()
    major, minor = torch.cuda.get_device_capability()
    assert (facts.name, facts.compute_capability) == (torch.cuda.get_device_name(), f"{major}.{minor}")
    assert facts.memory_mb > 1000
