"""A small attention model on a real GPU with a real TensorRT: built, cached, run, captured, read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime
import pytest

from attn_deploy.errors import AttnDeployError, FeedError
from attn_deploy.runtimes import tensorrt
from attn_deploy.session import TensorSpec

REASON = tensorrt.availability()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

X, Y = TensorSpec("x", "float32", ("batch", 64, 64)), TensorSpec("y", "float32", ("batch", 64, 64))
OPTIONS = {"profile:batch": "1,1,1;2,4,8"}
FP16 = """<ir_version: 10, opset_import: ["" : 17]>
attention (float[batch, 64, 64] x) => (float[batch, 64, 64] y)
<int64[4] split = {0, 64, 4, 16}, int64[3] join = {0, 64, 64}, float[1] quarter = {0.25}>
{
  half = Cast <to = 10> (x)
  scale = Cast <to = 10> (quarter)
  heads = Reshape (half, split)
  q0 = Transpose <perm = [0, 2, 1, 3]> (heads)
  query = Mul (q0, scale)
  key = Transpose <perm = [0, 2, 3, 1]> (heads)
  value = Transpose <perm = [0, 2, 1, 3]> (heads)
  scores = MatMul (query, key)
  weights = Softmax <axis = -1> (scores)
  summed = MatMul (weights, value)
  merged = Transpose <perm = [0, 2, 1, 3]> (summed)
  joined = Reshape (merged, join)
  y = Cast <to = 1> (joined)
}"""


def model(text: str = FP16) -> bytes:
    """Its nodes are named as those of a lowered site are."""
    parsed = onnx.parser.parse_model(text)
    for index, node in enumerate(parsed.graph.node):
        node.name = f"block.attention/Attention/{node.op_type}_{index}"
    return parsed.SerializeToString()


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    session = tensorrt.open_session(model(), inputs=[X], outputs=[Y], options=OPTIONS)
    yield session
    session.close()


def batch(size: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(size, 64, 64)).astype(np.float32)


def expected(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return onnxruntime.InferenceSession(model(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def close(got: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> None:
    right = expected(x)
    noise = np.square(got - right).sum() / np.square(right).sum()
    assert -10 * np.log10(noise + 1e-20) > 45


@pytest.mark.parametrize("size", [1, 4, 8, 19])
def test_results_are_those_of_the_cpu_call_after_call(session: Any, size: int) -> None:
    for seed in range(4):  # kernel by kernel, captured, as a graph
        close(session.run({"x": batch(size, seed)})["y"], batch(size, seed))


def test_torch_tensors_go_in_and_out_without_a_copy(session: Any) -> None:
    torch = pytest.importorskip("torch")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.from_numpy(batch(4)).cuda()
        y = torch.from_dlpack(session.run_device({"x": x}, stream=stream)["y"])
    stream.synchronize()
    close(y.cpu().numpy(), batch(4))


def test_the_engine_is_read_back_in_fp16(session: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model())
    nodes = tensorrt.read_back(path, {"x": batch(4)}, options=OPTIONS)
    work: dict[str, int] = {}
    for node in nodes:
        for product in node.products:  # type: ignore[attr-defined]
            work[node.computes_in] = work.get(node.computes_in, 0) + product.multiply_adds  # type: ignore[attr-defined]
    assert sum(work.values()) == 2 * 4 * 4 * 64 * 64 * 16
    assert set(work) == {"float16"}


def test_a_second_opening_is_fast_enough_to_come_from_the_cache(session: Any) -> None:
    from attn_deploy.runtimes import tensorrt_progress

    class Never:
        def stage(self, name: str) -> None:
            raise AssertionError("an engine was built again")

        def step(self, done: int, total: int) -> None: ...

    with tensorrt_progress.shown_by(Never()):
        tensorrt.open_session(model(), inputs=[X], outputs=[Y], options=OPTIONS).close()


def test_a_wrong_shape_is_refused_and_the_session_goes_on(session: Any) -> None:
    with pytest.raises(FeedError):
        session.run({"x": np.zeros((2, 63, 64), np.float32)})
    close(session.run({"x": batch(2)})["y"], batch(2))


def test_a_node_that_tensorrt_does_not_take_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = '<ir_version: 10, opset_import: ["" : 17]> d (float[batch, 3, 3] x) => (float[batch] y) { y = Det (x) }'
    with pytest.raises(AttnDeployError, match="does not take the model") as error:
        tensorrt.open_session(onnx.parser.parse_model(text).SerializeToString(), options={"profile:batch": "1,1,2"})
    assert "Det" in str(error.value.got)
