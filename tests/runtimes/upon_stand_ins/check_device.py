"""runtimes/cuda_device.py, cuda_array.py and cuda_facts.py with NVIDIA's cuda-core, on a GPU that is made up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from attn_deploy import runtimes
from attn_deploy.errors import FeedError, UnavailableError
from attn_deploy.runtimes.cuda_device import (
    DeviceArray,
    DeviceMemoryError,
    DeviceStream,
    as_device_array,
    availability,
    is_device_tensor,
    stream_handle,
)
from attn_deploy.runtimes.cuda_facts import device_facts
from attn_deploy.target import Target


@pytest.fixture
def stream(gpu: Any) -> Iterator[DeviceStream]:
    stream = DeviceStream()
    gpu.trace()
    yield stream
    stream.close()


def on_device(stream: DeviceStream, array: np.ndarray[Any, Any]) -> DeviceArray:
    result = stream.allocate(array.shape, array.dtype)
    stream.upload("x", array, result)
    return result


class WithInterface:
    """A tensor of another library that has `__cuda_array_interface__`."""

    def __init__(self, array: DeviceArray, **changes: Any) -> None:
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changes}


class WithDlpack:
    """A tensor of another library that speaks DLPack."""

    def __init__(self, array: DeviceArray) -> None:
        self.array = array
        self.asked: list[Any] = []

    def __dlpack__(self, **request: Any) -> Any:
        self.asked.append(request["stream"])
        return self.array.__dlpack__(**request)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


PROTOCOLS = pytest.mark.parametrize("protocol", [WithDlpack, WithInterface])


# -- is there a GPU ---------------------------------------------------------------------------------------------------


def test_a_gpu_with_a_driver_is_available(gpu: Any) -> None:
    assert availability() is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (100, "the driver finds no GPU: look at `nvidia-smi`"),
        (34, "empty stub: remove its folder from LD_LIBRARY_PATH"),
        (803, "of two versions: reboot"),
        (804, "forward compatibility package does not support this GPU: install NVIDIA driver 580"),
        (999, "cuInit failed with CUDA_ERROR_UNKNOWN"),
    ],
)
def test_why_the_driver_does_not_start_is_told(gpu: Any, code: int, words: str) -> None:
    gpu.fail("cuInit", code=code)
    assert words in str(availability())


def test_a_driver_that_is_too_old_is_told_with_both_versions(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_DRIVER", "12040")
    assert str(availability(13)).startswith(
        "the driver supports CUDA 12.4, and CUDA 13 is needed: install NVIDIA driver 580"
    )
    assert availability(12) is None


def test_a_gpu_that_is_not_there_is_unavailable(gpu: Any) -> None:
    with pytest.raises(UnavailableError, match="there is no such GPU") as caught:
        DeviceStream(1)
    assert (caught.value.got, caught.value.expected, caught.value.exit_code) == ("cuda:1", "0 to 0", 6)


def test_facts_come_from_cuda_and_from_nvml(gpu: Any) -> None:
    facts = device_facts()
    assert (facts.compute_capability, facts.cuda_driver, facts.memory_mb) == ("9.0", "13.2", 8192)
    assert (facts.driver, facts.sm_clock_mhz, facts.memory_clock_mhz, facts.power_w) == (
        "580.00.00",
        1980,
        2619,
        123.456,
    )
    assert facts.power_limit_w is None, "a value that the GPU does not tell"
    assert facts.throttled_by == ("power limit", "idle")


def test_the_facts_of_a_host_have_those_of_its_gpu_where_a_target_is_on_one(gpu: Any) -> None:
    assert runtimes.device_facts([Target.ONNXRUNTIME_CPU]) == {}
    found = runtimes.device_facts([Target.ONNXRUNTIME_CPU, Target.ONNXRUNTIME_CUDA])
    assert found["gpu_name"] == "stand-in: no GPU, no kernel runs"
    assert (found["gpu_sm_clock_mhz"], found["gpu_power_w"], found["gpu_power_limit_w"]) == (1980, 123.456, None)
    assert found["gpu_throttled_by"] == "power limit, idle"
    assert all(value is None or isinstance(value, str | int | float) for value in found.values())


# -- memory and copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "bool", "uint8"])
@pytest.mark.parametrize("shape", [(2, 3), (1,), (), (0, 4)], ids=str)
def test_what_is_uploaded_is_downloaded(stream: DeviceStream, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    there = on_device(stream, array)
    for back in (stream.download({"x": there})["x"], there.numpy(), np.asarray(there)):
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


def test_strided_host_memory_is_uploaded_in_c_order(stream: DeviceStream) -> None:
    array = np.arange(24.0, dtype=np.float32).reshape(4, 6).T[::2]
    np.testing.assert_array_equal(on_device(stream, array).numpy(), array)


def test_the_staging_memory_is_used_again_when_the_copy_has_read_it(stream: DeviceStream, gpu: Any) -> None:
    first = on_device(stream, np.full((64,), 1.0, np.float32))
    gpu.trace()
    second = on_device(stream, np.full((64,), 2.0, np.float32))
    calls = gpu.calls()
    assert "cuMemAllocHost" not in calls
    assert calls.index("cuEventSynchronize") < calls.index("cuMemcpyHtoDAsync")
    assert (first.numpy()[0], second.numpy()[0]) == (1.0, 2.0)


def test_results_are_the_callers_own(stream: DeviceStream) -> None:
    there = on_device(stream, np.zeros((4,), np.float32))
    first = stream.download({"x": there})["x"]
    stream.upload("x", np.ones((4,), np.float32), there)
    stream.download({"x": there})
    assert first.tolist() == [0.0] * 4


def test_a_copy_inside_the_gpu(stream: DeviceStream) -> None:
    source = on_device(stream, np.arange(6, dtype=np.float32))
    into = stream.allocate((6,), np.float32)
    stream.copy(source, into)
    np.testing.assert_array_equal(into.numpy(), source.numpy())


def test_full_memory_is_an_error_that_leaves_everything_usable(stream: DeviceStream, gpu: Any) -> None:
    gpu.limit_memory(4096)
    with pytest.raises(DeviceMemoryError, match="memory is full") as caught:
        stream.allocate((1000, 1000), np.float32)
    assert caught.value.where == "3.8 MB for float32[1000, 1000]"
    assert "OUT_OF_MEMORY" in str(caught.value.got)
    assert caught.value.exit_code == 1
    assert on_device(stream, np.ones((8,), np.float32)).numpy().tolist() == [1.0] * 8


def test_an_error_of_a_copy_is_ours(stream: DeviceStream, gpu: Any) -> None:
    there = stream.allocate((4,), np.float32)
    gpu.fail("cuMemcpyHtoDAsync", code=700)
    with pytest.raises(Exception, match="the GPU reported an error") as caught:
        stream.upload("x", np.zeros((4,), np.float32), there)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(caught.value)


def test_closing_gives_everything_back(gpu: Any) -> None:
    before = gpu.allocations()
    stream = DeviceStream()
    array = on_device(stream, np.ones((4,), np.float32))
    stream.close()
    del array
    assert gpu.allocations() == before


# -- tensors of other libraries ---------------------------------------------------------------------------------------


@PROTOCOLS
def test_a_foreign_tensor_is_read_in_place(stream: DeviceStream, gpu: Any, protocol: Any) -> None:
    source = on_device(stream, np.arange(6, dtype=np.float32).reshape(2, 3))
    gpu.trace()
    foreign = protocol(source)
    assert is_device_tensor(foreign)
    array = as_device_array("x", foreign, stream.handle)
    assert (array.pointer, array.shape, array.dtype) == (source.pointer, (2, 3), np.float32)
    assert not [call for call in gpu.calls() if "Memcpy" in call or "MemAlloc" in call]


def test_the_producer_is_told_our_stream(stream: DeviceStream) -> None:
    foreign = WithDlpack(stream.allocate((2,), np.float32))
    as_device_array("x", foreign, stream.handle)
    assert foreign.asked == [stream.handle]


@PROTOCOLS
def test_the_memory_lives_as_long_as_its_reader(stream: DeviceStream, gpu: Any, protocol: Any) -> None:
    before = gpu.allocations()
    source = on_device(stream, np.full((3,), 5.0, np.float32))
    holder = source if protocol is WithInterface else None  # that protocol keeps its object alone
    array = as_device_array("x", protocol(source), stream.handle)
    del source
    assert array.numpy().tolist() == [5.0] * 3
    del array, holder
    assert gpu.allocations() == before


def test_strides_other_than_c_order_are_refused(stream: DeviceStream) -> None:
    foreign = WithInterface(stream.allocate((2, 3), np.float32), strides=(4, 8))
    with pytest.raises(FeedError, match="'x' is not contiguous") as caught:
        as_device_array("x", foreign, stream.handle)
    assert caught.value.got == "shape [2, 3] with strides [1, 2] (in elements)"
    assert caught.value.next_step == "pass tensor.contiguous()"


def test_a_dimension_of_size_one_may_have_any_stride(stream: DeviceStream) -> None:
    foreign = WithInterface(stream.allocate((1, 3), np.float32), strides=(400, 4))
    assert as_device_array("x", foreign, stream.handle).shape == (1, 3)


def test_an_array_of_another_gpu_is_refused(stream: DeviceStream) -> None:
    array = stream.allocate((2,), np.float32)
    array.device_id = 1
    with pytest.raises(FeedError, match="on another GPU") as caught:
        as_device_array("x", array, stream.handle)
    assert (caught.value.got, caught.value.expected) == ("cuda:1", "cuda:0")


# -- order ------------------------------------------------------------------------------------------------------------


def test_a_reader_through_dlpack_waits_until_the_data_is_there(stream: DeviceStream, gpu: Any) -> None:
    array = on_device(stream, np.ones((2,), np.float32))
    array.ready = stream.record()
    reader = DeviceStream()
    gpu.trace()
    array.__dlpack__(stream=reader.handle)
    assert ("cuStreamWaitEvent", reader.handle, int(array.ready.handle)) in gpu.trace()
    array.__dlpack__(stream=-1)
    assert "cuStreamWaitEvent" not in gpu.calls(), "-1 asks for no order"
    reader.close()


def test_memory_goes_back_in_the_order_of_its_last_reader(stream: DeviceStream, gpu: Any) -> None:
    reader = DeviceStream()
    array = stream.allocate((2,), np.float32)
    capsule = array.__dlpack__(stream=reader.handle)
    pointer = array.pointer
    gpu.trace()
    del array, capsule
    gpu.allocations()
    assert ("cuMemFreeAsync", pointer, reader.handle) in gpu.trace()
    reader.close()


def test_two_streams_wait_for_each_other_by_events(stream: DeviceStream, gpu: Any) -> None:
    caller = DeviceStream()
    gpu.trace()
    stream.wait_for(caller.handle)
    stream.make_wait(caller.handle)
    rows = gpu.trace()
    assert [(name, second if name == "cuEventRecord" else first) for name, first, second in rows] == [
        ("cuEventRecord", caller.handle),
        ("cuStreamWaitEvent", stream.handle),
        ("cuEventRecord", stream.handle),
        ("cuStreamWaitEvent", caller.handle),
    ]
    caller.close()


def test_a_stream_is_given_as_a_handle_or_by_an_object(stream: DeviceStream, gpu: Any) -> None:
    class Torch:
        cuda_stream = 77

    class Cupy:
        ptr = 79

    class Protocol:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, 78)

    assert [stream_handle(s) for s in (0, Torch(), Cupy(), Protocol())] == [0, 77, 79, 78]
    stream.wait_for(0)  # the default stream: torch's, when none was chosen
    assert [second for name, _, second in gpu.trace() if name == "cuEventRecord"] == [1]
    with pytest.raises(FeedError, match="unknown kind"):
        stream.wait_for("stream")


def test_events_measure_time_between_them(stream: DeviceStream) -> None:
    begin, end = stream.record(timing=True), stream.record(timing=True)
    end.sync()
    assert 0 <= end - begin < 1000


def test_a_capture_that_was_left_open_is_ended(stream: DeviceStream) -> None:
    from cuda.bindings import driver

    assert not stream.abandon_capture()
    driver.cuStreamBeginCapture(stream.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
    assert stream.abandon_capture()
    stream.synchronize()
