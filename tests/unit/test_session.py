"""FeedChecker: what is fed reaches the runtime without a copy, and what is wrong is said in full."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attn_deploy.errors import FeedError
from attn_deploy.session import DimBounds, FeedChecker, TensorSpec

IMAGE = TensorSpec("image", "float32", ("batch", 3, 4, 4))
TOKENS = TensorSpec("tokens", "int64", ("batch", "length"))
MASK = TensorSpec("mask", "int64", ("batch", "length"))
SCALE = TensorSpec("scale", "float32", (1,))


def check_one(value: Any, spec: TensorSpec = IMAGE, **dims: DimBounds) -> np.ndarray:
    return FeedChecker([spec], dims).check({spec.name: value})[spec.name]


def images(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, 4, 4)).astype(np.float32)


def refused(feeds: Any, specs: tuple[TensorSpec, ...] = (IMAGE,), **dims: DimBounds) -> FeedError:
    with pytest.raises(FeedError) as caught:
        FeedChecker(specs, dims).check(feeds)
    return caught.value


def test_arrays_pass_as_they_are() -> None:
    feeds = {"image": images(), "scale": np.ones(1, np.float32)}
    checked = FeedChecker([IMAGE, SCALE], {}).check(feeds)
    assert checked.keys() == feeds.keys()
    assert all(checked[name] is feeds[name] for name in feeds)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda a: np.asfortranarray(a),
        lambda a: a[::-1],
        lambda a: a.transpose(0, 1, 3, 2),
        lambda a: np.repeat(a, 2, axis=3)[..., ::2],
        lambda a: np.broadcast_to(a[:1], a.shape),
    ],
    ids=["column order", "reversed", "transposed", "every other column", "broadcast"],
)
def test_an_array_that_is_not_contiguous_is_fine(arrange: Any) -> None:
    array = arrange(images())
    assert check_one(array) is array


def test_a_torch_tensor_is_read_in_its_own_memory() -> None:
    tensor = torch.zeros(2, 3, 4, 4)
    array = check_one(tensor)
    assert array.__array_interface__["data"][0] == tensor.data_ptr()
    tensor[1, 2, 3, 3] = 5.0
    assert array[1, 2, 3, 3] == 5.0


def test_a_torch_tensor_that_is_not_contiguous_is_read_in_its_own_memory() -> None:
    tensor = torch.arange(96.0).reshape(2, 4, 4, 3).permute(0, 3, 1, 2)
    array = check_one(tensor)
    assert array.__array_interface__["data"][0] == tensor.data_ptr()
    np.testing.assert_array_equal(array, tensor.numpy())


def test_a_read_only_memory_map_is_read_where_it_lies(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images())
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    checked = check_one(array)
    assert np.shares_memory(checked, array)
    np.testing.assert_array_equal(checked, images())


def test_a_list_of_numbers_is_an_array() -> None:
    np.testing.assert_array_equal(check_one([[1, 2], [3, 4]], TOKENS), [[1, 2], [3, 4]])


def test_inputs_share_a_named_dimension() -> None:
    feeds = {"tokens": np.zeros((2, 5), np.int64), "mask": np.zeros((2, 5), np.int64)}
    assert FeedChecker([TOKENS, MASK], {}).check(feeds).keys() == feeds.keys()


@pytest.mark.parametrize("size", [2, 8], ids=["lower", "upper"])
def test_both_bounds_of_a_dimension_are_inside(size: int) -> None:
    assert len(check_one(images(size), batch=DimBounds(2, 8))) == size


def test_a_dimension_without_upper_bound_takes_any_size() -> None:
    assert len(check_one(images(1000), batch=DimBounds(1))) == 1000


WRONG: dict[str, tuple[Any, tuple[TensorSpec, ...], dict[str, DimBounds], tuple[str, str, str, str]]] = {
    "no mapping": (
        images(),
        (IMAGE,),
        {},
        ("not a mapping", "ndarray", "image: float32[batch, 3, 4, 4]", "pass {'image': array}"),
    ),
    "empty feed": (
        {},
        (IMAGE, SCALE),
        {},
        ("names", "an empty feed", "image: float32[batch, 3, 4, 4]; scale: float32[1]", "add image, scale"),
    ),
    "one name missing": (
        {"image": images()},
        (IMAGE, SCALE),
        {},
        ("names", "image", "scale: float32[1]", "add scale"),
    ),
    "misspelt name": ({"imag": images()}, (IMAGE,), {}, ("names", "imag", "image: float32", "did you mean image?")),
    "one name too many": (
        {"image": images(), "labels": [1]},
        (IMAGE,),
        {},
        ("names", "image, labels", "image: float32", "image"),
    ),
    "a name that is no text": ({0: images()}, (IMAGE,), {}, ("names", "0", "image: float32", "one of: image")),
    "dtype": (
        {"image": images().astype(np.float64)},
        (IMAGE,),
        {},
        ("'image' has the wrong dtype", "float64", "float32", ".astype('float32')"),
    ),
    "foreign byte order": (
        {"image": images().astype(">f4")},
        (IMAGE,),
        {},
        ("'image' has the wrong dtype", ">f4", "float32", ".astype('float32')"),
    ),
    "object": ({"image": None}, (IMAGE,), {}, ("'image' has the wrong dtype", "object", "float32", ".astype")),
    "ragged list": (
        {"tokens": [[1, 2], [3]]},
        (TOKENS,),
        {},
        ("'tokens' is no array", "list: ", "a NumPy array", "same length"),
    ),
    "one sample without its batch": (
        {"image": images()[0]},
        (IMAGE,),
        {},
        ("'image' has the wrong shape", "[3, 4, 4]", "image: float32[batch, 3, 4, 4]", "array[None]"),
    ),
    "size of a dimension": (
        {"image": images()[:, :, :3]},
        (IMAGE,),
        {},
        ("'image' has the wrong shape", "[2, 3, 3, 4]", "image: float32[batch, 3, 4, 4]", "resize"),
    ),
    "rank of a fixed shape": (
        {"scale": np.float32(1)},
        (SCALE,),
        {},
        ("'scale' has the wrong shape", "[]", "scale: float32[1]", "resize"),
    ),
    "a dimension differs between inputs": (
        {"tokens": np.zeros((2, 5), np.int64), "mask": np.zeros((2, 6), np.int64)},
        (TOKENS, MASK),
        {},
        ("'length' differs between inputs", "6 in 'mask'", "5, as in", "same length"),
    ),
    "a batch beyond the bound": (
        {"image": images(9)},
        (IMAGE,),
        {"batch": DimBounds(1, 8)},
        ("'batch' is out of the bundle's bounds", "9", "1 to 8", "--dynamic batch=1:9"),
    ),
    "a batch below the bound": (
        {"image": images(1)},
        (IMAGE,),
        {"batch": DimBounds(2)},
        ("'batch' is out of the bundle's bounds", "1", "2 to any", "--dynamic batch"),
    ),
    "an empty batch": (
        {"image": images(0)},
        (IMAGE,),
        {"batch": DimBounds()},
        ("'batch' is out of the bundle's bounds", "0", "1 to any", "--dynamic batch"),
    ),
    "a tensor with grad": (
        {"image": torch.zeros(2, 3, 4, 4, requires_grad=True)},
        (IMAGE,),
        {},
        ("'image' cannot be read through DLPack", "requires_grad|require grad", "without grad", "tensor.detach()"),
    ),
    "a tensor on another device": (
        {"image": torch.zeros(2, 3, 4, 4, device="meta")},
        (IMAGE,),
        {},
        ("'image' cannot be read through DLPack", "meta", "in CPU memory", ".cpu()"),
    ),
    "a tensor of a dtype that NumPy lacks": (
        {"image": torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)},
        (IMAGE,),
        {},
        ("'image' cannot be read through DLPack", "Tensor: ", "a dtype that NumPy has", ".float()"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_feed_is_said_with_what_was_got_and_expected_and_the_next_step(case: str) -> None:
    feeds, specs, dims, parts = WRONG[case]
    error = refused(feeds, specs, **dims)
    found = (error.what, error.got, error.expected, error.next_step)
    for said, wanted in zip(found, parts, strict=True):
        assert said is not None
        assert any(w in said for w in wanted.split("|")), f"{wanted!r} is not in {said!r}"


def test_an_advised_step_does_help() -> None:
    """Where the error says what to call, calling it makes a feed that passes."""
    grad = torch.zeros(2, 3, 4, 4, requires_grad=True)
    brain_float = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    advised: Mapping[str, Any] = {
        "tensor.detach().cpu()": grad.detach().cpu(),
        ".float()": brain_float.detach().cpu().float(),
        ".astype('float32')": images().astype(np.float64).astype("float32"),
        "array[None]": images()[0][None],
    }
    for step, value in advised.items():
        assert check_one(value).dtype == np.float32, step


def test_a_spec_describes_itself_in_one_line() -> None:
    assert TOKENS.describe() == "tokens: int64[batch, length]"
    assert TensorSpec("s", "float32", ()).describe() == "s: float32[]"


# -- tensors in GPU memory -------------------------------------------------------------------------------------------


class OnGpu:
    """A tensor as torch shows one in GPU memory, to code that never touches its data."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


IMAGES = FeedChecker((TensorSpec("x", "float32", ("batch", 3, 8, 8)),), {"batch": DimBounds(1, 4)})


def test_a_tensor_on_the_gpu_passes_untouched_where_the_session_takes_it() -> None:
    tensor = OnGpu(2, 3, 8, 8)
    assert IMAGES.check({"x": tensor}, device=True)["x"] is tensor


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (OnGpu(2, 3, 8, 9), "wrong shape"),
        (OnGpu(3, 8, 8), "wrong shape"),
        (OnGpu(5, 3, 8, 8), "out of the bundle's bounds"),
        (OnGpu(2, 3, 8, 8, dtype=torch.float16), "wrong dtype"),
        (OnGpu(2, 3, 8, 8, dtype=torch.bfloat16), "wrong dtype|a dtype that NumPy lacks"),  # ml_dtypes brings it
    ],
)
def test_a_tensor_on_the_gpu_is_checked_like_any_other(tensor: OnGpu, message: str) -> None:
    with pytest.raises(FeedError, match=message):
        IMAGES.check({"x": tensor}, device=True)


def test_an_array_of_the_host_may_stand_beside_tensors_on_the_gpu() -> None:
    array = np.zeros((1, 3, 8, 8), np.float32)
    assert IMAGES.check({"x": array}, device=True)["x"] is array


def test_a_session_on_the_cpu_refuses_a_tensor_on_the_gpu_and_says_what_to_do() -> None:
    with pytest.raises(FeedError, match=r"detach\(\)\.cpu\(\)"):
        IMAGES.check({"x": OnGpuWithoutData(1, 3, 8, 8)})


class OnGpuWithoutData(OnGpu):
    def __dlpack__(self, **_request: Any) -> Any:
        raise BufferError("cannot export to the CPU")
