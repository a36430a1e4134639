"""`--data`: what is accepted, how it is split, and that it streams."""

from __future__ import annotations

import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attn_deploy.data import Dataset, Part, open_data, require_labels
from attn_deploy.errors import UsageError
from attn_deploy.preprocess import Preprocess, prepare
from attn_deploy.session import TensorSpec

IMAGE = (TensorSpec("x", "float32", ("batch", 3, 8, 8)),)
VECTOR = (TensorSpec("x", "float32", ("batch", 4)),)
CONFIG = Preprocess("x", (8, 8), resize=9)
NAMES = ("cat", "crane", "dog", "crane")


def write_images(root: Path, *keys: str, size: int = 10) -> None:
    for seed, key in enumerate(keys):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(root / key)


def open_images(root: Path, labels: tuple[str, ...] | None = None) -> Dataset:
    return open_data(str(root), inputs=IMAGE, preprocess=CONFIG, labels=labels)


def open_arrays(
    spec: object, inputs: tuple[TensorSpec, ...] = VECTOR, labels: tuple[str, ...] | None = None
) -> Dataset:
    return open_data(str(spec), inputs=inputs, preprocess=None, labels=labels)


def keys_of(part: Part, batch_size: int = 4) -> list[str]:
    return [key for batch in part.batches(batch_size) for key in batch.keys]


def write_npz(path: Path, samples: int = 20, **members: Any) -> Path:
    arrays = {"x": np.arange(samples * 4, dtype=np.float32).reshape(samples, 4)} | members
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module with this body after the imports; returns the spec of its function `samples`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(body: str) -> str:
        name = f"data_{abs(hash((body, str(tmp_path))))}"
        (tmp_path / f"{name}.py").write_text(f"import numpy as np\n{body}\n")
        return f"{name}:samples"

    return write


COUNTING = """
def samples():
    for i in range({count}):
        yield {{"x": np.full(4, i, np.float32)}}, {label}
"""


def test_class_folders_give_images_prepared_as_described_and_their_index(tmp_path: Path) -> None:
    write_images(tmp_path, "0001/a.png", "0001/b.JPEG", "7/c.png")
    (tmp_path / "CREDITS.csv").write_text("a,b")
    (tmp_path / ".hidden").mkdir()
    data = open_images(tmp_path)
    assert data.labelled
    assert data.description == f"3 images in {tmp_path} (2 class folders)"
    assert sorted(data.keys()) == ["0001/a.png", "0001/b.JPEG", "7/c.png"]
    (batch,) = data.split(0, 3, 0).judgement.batches(8)
    assert batch.labels is not None
    assert batch.labels.dtype == np.int64
    assert dict(zip(batch.keys, batch.labels.tolist(), strict=True)) == {
        "0001/a.png": 1,
        "0001/b.JPEG": 1,
        "7/c.png": 7,
    }
    for key, pixels in zip(batch.keys, batch.feeds["x"], strict=True):
        np.testing.assert_array_equal(pixels, prepare(tmp_path / key, CONFIG))


def test_class_folders_may_carry_names_of_the_label_list(tmp_path: Path) -> None:
    write_images(tmp_path, "dog/a.png", "cat/b.png", "1/c.png")
    (batch,) = open_images(tmp_path, NAMES).split(0, 3, 0).judgement.batches(8)
    assert batch.labels is not None
    assert dict(zip(batch.keys, batch.labels.tolist(), strict=True)) == {"dog/a.png": 2, "cat/b.png": 0, "1/c.png": 1}


def test_digits_are_names_where_every_folder_is_in_the_label_list(tmp_path: Path) -> None:
    write_images(tmp_path, "7/a.png")
    (batch,) = open_images(tmp_path, ("9", "8", "7")).split(0, 1, 0).judgement.batches(8)
    assert batch.labels is not None
    assert batch.labels.tolist() == [2]


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    data = open_images(tmp_path)
    assert not data.labelled
    assert all(batch.labels is None for batch in data.split(1, 1, 0).judgement.batches(1))
    with pytest.raises(UsageError, match="data without labels where accuracy was asked") as caught:
        require_labels(data, "--max-drop")
    assert "--max-drop" in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_rows_are_samples_whether_compressed_or_in_fortran_order(tmp_path: Path, save: Any, order: Any) -> None:
    values = np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)
    save(tmp_path / "a.npz", x=np.asarray(values, order=order), tokens=np.arange(6), labels=np.arange(6) * 2)
    inputs = (TensorSpec("x", "float32", ("batch", 3, "w")), TensorSpec("tokens", "int64", ("batch",)))
    data = open_arrays(tmp_path / "a.npz", inputs)
    assert data.keys() == ["0", "1", "2", "3", "4", "5"]
    seen = {key: batch for batch in data.split(2, 4, 0).judgement.batches(1) for key in batch.keys}
    assert len(seen) == 4
    for key, batch in seen.items():
        np.testing.assert_array_equal(batch.feeds["x"], values[int(key)][None])
        assert batch.feeds["tokens"].tolist() == [int(key)]
        assert batch.labels is not None
        assert batch.labels.tolist() == [2 * int(key)]


def test_npz_without_labels_is_unlabelled_unless_labels_is_an_input(tmp_path: Path) -> None:
    assert not open_arrays(write_npz(tmp_path / "a.npz")).labelled
    spec = (*VECTOR, TensorSpec("labels", "int64", ("batch",)))
    data = open_arrays(write_npz(tmp_path / "b.npz", labels=np.zeros(20, np.int64)), spec)
    assert not data.labelled
    assert set(next(data.split(0, 4, 0).judgement.batches(2)).feeds) == {"x", "labels"}


def test_function_is_streamed_anew_for_each_pass(function: Callable[[str], str]) -> None:
    split = open_arrays(function(COUNTING.format(count=100, label="i"))).split(8, 30, seed=1)
    first, second = keys_of(split.judgement), keys_of(split.judgement)
    assert first == second == sorted(first, key=int)
    assert len(first) == 30
    assert len(keys_of(split.calibration)) == 8
    assert not set(first) & set(keys_of(split.calibration))
    for batch in split.judgement.batches(7):
        assert batch.feeds["x"][:, 0].tolist() == [int(key) for key in batch.keys]


def test_endless_function_ends_with_the_samples_asked_for(function: Callable[[str], str]) -> None:
    spec = function(
        "import itertools\ndef samples():\n  for i in itertools.count(): yield {'x': np.ones(4, 'f')}, None"
    )
    data = open_arrays(spec)
    assert not data.labelled
    assert data.keys() == []
    assert len(keys_of(data.split(5, 9, 0).judgement)) == 9


def test_a_function_that_yields_too_few_is_told_with_what_was_seen_and_asked(function: Callable[[str], str]) -> None:
    data = open_arrays(function(COUNTING.format(count=20, label="i")))
    split = data.split(64, 4, 0)
    assert len(keys_of(split.judgement)) == 4
    assert data.short == ()
    seen = len(keys_of(split.calibration))
    assert 0 < seen < 20
    (note,) = data.short
    assert note.startswith(f"{seen} samples of ")
    assert note.endswith("for calibration where 64 were asked for")


def test_samples_of_different_shapes_never_share_a_batch(function: Callable[[str], str]) -> None:
    spec = function("def samples():\n  for i in range(40): yield {'x': np.ones((i % 10 // 5) + 2, 'f')}, None")
    part = open_arrays(spec, (TensorSpec("x", "float32", ("batch", "tokens")),)).split(0, 20, 0).judgement
    shapes = [batch.feeds["x"].shape for batch in part.batches(4)]
    assert sum(shape[0] for shape in shapes) == 20
    assert {shape[1] for shape in shapes} == {2, 3}


def test_split_is_disjoint_repeatable_and_depends_on_the_seed(tmp_path: Path) -> None:
    data = open_arrays(write_npz(tmp_path / "a.npz", samples=100))
    split = data.split(20, 50, seed=3)
    judged, calibrating = set(keys_of(split.judgement)), set(keys_of(split.calibration))
    assert (len(judged), len(calibrating), len(judged & calibrating), split.note) == (50, 20, 0, None)
    assert keys_of(data.split(20, 50, seed=3).judgement) == keys_of(split.judgement) == keys_of(split.judgement)
    assert set(keys_of(data.split(20, 50, seed=4).judgement)) != judged
    assert set(keys_of(data.split(50, 50, seed=3).judgement)) == judged


def test_split_of_a_known_folder_never_changes(tmp_path: Path) -> None:
    """Receipts of earlier versions name these samples; a changed hash rule would mix them up."""
    write_images(tmp_path, *(f"{index}/i.png" for index in range(8)))
    split = open_images(tmp_path).split(3, 3, seed=0)
    assert keys_of(split.judgement) == ["3/i.png", "0/i.png", "4/i.png"]
    assert keys_of(split.calibration) == ["2/i.png", "6/i.png", "7/i.png"]


@pytest.mark.parametrize(
    ("asked", "got"),
    [((64, 500), (10, 10)), ((4, 500), (4, 16)), ((500, 4), (16, 4)), ((0, 500), (0, 20)), ((30, 0), (20, 0))],
)
def test_too_few_samples_leave_at_least_half_to_judgement(
    tmp_path: Path, asked: tuple[int, int], got: tuple[int, int]
) -> None:
    split = open_arrays(write_npz(tmp_path / "a.npz")).split(*asked, seed=0)
    assert (split.calibration.size, split.judgement.size) == got
    assert (len(keys_of(split.calibration)), len(keys_of(split.judgement))) == got
    expected = f"20 samples where {asked[0]} + {asked[1]} were asked for: {got[0]} calibrate, {got[1]} judge"
    assert split.note == expected


def test_one_sample_cannot_both_calibrate_and_judge(tmp_path: Path) -> None:
    data = open_arrays(write_npz(tmp_path / "a.npz", samples=1))
    assert keys_of(data.split(0, 5, 0).judgement) == ["0"]
    with pytest.raises(UsageError, match="too few samples"):
        data.split(1, 1, 0)


def test_unreadable_images_are_passed_over_and_recorded_once(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{index}.png" for index in range(12)))
    for index in (2, 5, 9):
        (tmp_path / f"{index}.png").write_bytes(b"damaged")
    data = open_images(tmp_path)
    part = data.split(0, 12, 0).judgement
    assert len(keys_of(part)) == len(keys_of(part)) == 9
    assert sorted(data.unreadable) == ["2.png", "5.png", "9.png"]


@pytest.mark.parametrize(("total", "damaged", "fails"), [(20, 4, True), (100, 5, False), (100, 6, True), (2, 2, True)])
def test_too_many_unreadable_images_are_an_error_that_names_some(
    tmp_path: Path, total: int, damaged: int, fails: bool
) -> None:
    write_images(tmp_path, *(f"{index}.png" for index in range(total)))
    for index in range(damaged):
        (tmp_path / f"{index}.png").write_bytes(b"damaged")
    part = open_images(tmp_path).split(0, total, 0).judgement
    if not fails:
        assert len(keys_of(part)) == total - damaged
        return
    with pytest.raises(UsageError, match="too many samples of the judgement part are unreadable") as caught:
        keys_of(part)
    assert ".png (the image cannot be decoded" in str(caught.value.got)


FOLDER_ERRORS: dict[str, tuple[list[str], str, str]] = {
    "empty": ([], "holds no images", "an empty folder"),
    "deeper": (["train/3/a.png"], "holds no images", "images lie deeper: pass"),
    "mixed": (["a.png", "1/b.png"], "in class folders and beside them", "1 images (a.png"),
    "misspelt": (["dgo/a.png"], "neither a class index nor a name", "did you mean dog?"),
    "twice": (["crane/a.png"], "more than once in the label list", "1, 3"),
    "beyond": (["4/a.png"], "label is out of range", "0 to 3"),
}


@pytest.mark.parametrize("case", FOLDER_ERRORS)
def test_folder_that_cannot_be_data_says_why(tmp_path: Path, case: str) -> None:
    keys, what, detail = FOLDER_ERRORS[case]
    write_images(tmp_path, *keys)
    with pytest.raises(UsageError, match=what) as caught:
        open_images(tmp_path, NAMES)
    assert detail in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "preprocess", "what"),
    [
        (IMAGE, None, "preprocess is not known"),
        ((*IMAGE, *VECTOR), CONFIG, "images feed one input only"),
        (IMAGE, Preprocess("y", (8, 8)), "an input that the model does not have"),
        (IMAGE, Preprocess("x", (9, 9)), "another height"),
        (VECTOR, CONFIG, "input is not an image"),
        ((TensorSpec("x", "float32", ()),), CONFIG, "no batch dimension"),
    ],
)
def test_images_for_a_model_they_cannot_feed_are_an_error(
    tmp_path: Path, inputs: Any, preprocess: Preprocess | None, what: str
) -> None:
    write_images(tmp_path, "a.png")
    with pytest.raises(UsageError, match=what) as caught:
        open_data(str(tmp_path), inputs=inputs, preprocess=preprocess, labels=None)
    assert preprocess is not None or "--preprocess" in str(caught.value.next_step)


@pytest.mark.parametrize(
    ("name", "detail"),
    [("photoz", "did you mean photos?"), ("a.zip", "unpack it"), ("photos/a.png", "give the folder that holds it")],
)
def test_path_that_is_no_data_says_what_to_give(tmp_path: Path, name: str, detail: str) -> None:
    write_images(tmp_path, "photos/a.png")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        open_images(tmp_path / name)
    assert detail in str(caught.value)
    assert "package.module:function" in str(caught.value.expected)


NPZ_ERRORS: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"xx": np.zeros(20)}, "keys of the .npz are not the model's inputs", "did you mean x?"),
    "missing": ({"x": None, "labels": np.zeros(20)}, "keys of the .npz are not the model's inputs", "add x"),
    "lengths": ({"labels": np.zeros(19, np.int64)}, "different numbers of samples", "x: 20, labels: 19"),
    "scalar": ({"x": np.float32(1)}, "no samples along its first dimension", "float32[]"),
    "pickled": ({"x": np.array([{}] * 20, dtype=object)}, "no samples along", "unpickling"),
    "dtype": ({"x": np.zeros((20, 4))}, "wrong dtype", "float64"),
    "shape": ({"x": np.zeros((20, 5), np.float32)}, "wrong shape", "x: float32[4]"),
    "nan": ({"x": np.full((20, 4), np.nan, np.float32)}, "holds NaN in input 'x'", "4 of 4 values"),
    "float labels": ({"labels": np.zeros(20)}, "not a class index", "array(0.)"),
    "label range": ({"labels": np.full(20, 4)}, "label is out of range", "0 to 3"),
    "negative label": ({"labels": np.full(20, -1)}, "label is out of range", "-1"),
}


@pytest.mark.parametrize("case", NPZ_ERRORS)
def test_npz_that_cannot_be_data_says_why(tmp_path: Path, case: str) -> None:
    members, what, detail = NPZ_ERRORS[case]
    path = write_npz(tmp_path / "a.npz", **members)
    with pytest.raises(UsageError, match=what) as caught:
        keys_of(open_arrays(path, labels=NAMES).split(0, 20, 0).judgement)
    assert detail in str(caught.value)
    assert str(path) in str(caught.value.where)


def test_damaged_npz_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz")
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        keys_of(open_arrays(path).split(0, 20, 0).judgement)
    path.write_bytes(content[:100])
    with pytest.raises(UsageError, match="cannot be read"):
        open_arrays(path)


FUNCTION_ERRORS: dict[str, tuple[str, str, str]] = {
    "import": ("import not_there", "cannot be imported", "not_there"),
    "name": ("def sample(): pass", "has no 'samples'", "did you mean sample?"),
    "no function": ("samples = 3", "not a function", "int"),
    "nothing": ("samples = list", "yields nothing", "(feeds, label)"),
    "bare": ("def samples(): yield np.ones(4)", "yields something else", "ndarray at sample 0"),
    "not iterable": ("def samples(): return 3", "failed after 0 samples", "not iterable"),
    "raises": ("def samples():\n  yield {'x': np.ones(4, 'f')}, 1\n  1 / 0", "failed after 1 samples", "ZeroDivision"),
    "batched": ("def samples(): yield {'x': np.ones((1, 4), 'f')}, 1", "without the batch dimension", "[1, 4]"),
    "names": ("def samples(): yield {'xs': np.ones(4, 'f')}, 1", "names are not the model's inputs", "did you mean x?"),
    "label": ("def samples(): yield {'x': np.ones(4, 'f')}, 'cat'", "not a class index", "'cat' (str)"),
    "some labels": ("def samples():\n  for i in (None, 1): yield {'x': np.ones(4, 'f')}, i", "some", "at sample 1"),
    "random": ("def samples():\n  while True: yield {'x': np.random.rand(4).astype('f')}, 1", "other samples", "seed"),
}  # fmt: skip


@pytest.mark.parametrize("case", FUNCTION_ERRORS)
def test_function_that_cannot_be_data_says_why(function: Callable[[str], str], case: str) -> None:
    body, what, detail = FUNCTION_ERRORS[case]
    spec = function(body)
    with pytest.raises(UsageError, match=what) as caught:
        keys_of(open_arrays(spec).split(0, 20, 0).judgement)
    assert detail in str(caught.value)
    assert spec in str(caught.value.where)


def peak_bytes(read: Callable[[], Iterator[Any]]) -> int:
    tracemalloc.start()
    for _ in read():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    inputs = (TensorSpec("x", "float32", ("batch", 3, 96, 96)),)
    peaks = []
    for count in (20, 200):
        write_images(tmp_path / str(count), *(f"{index}.png" for index in range(count)), size=32)
        data = open_data(tmp_path / str(count), inputs=inputs, preprocess=Preprocess("x", (96, 96), 96), labels=None)
        part = data.split(0, count, 0).judgement
        peaks.append(peak_bytes(lambda part=part: part.batches(4)))  # type: ignore[misc]
    assert peaks[0] > 4 * 3 * 96 * 96 * 4
    assert abs(peaks[1] - peaks[0]) < 1e6


def test_memory_does_not_grow_with_the_size_of_an_npz(tmp_path: Path) -> None:
    inputs = (TensorSpec("x", "float32", ("batch", 10_000)),)
    peaks = []
    for count in (20, 500):
        write_npz(tmp_path / f"{count}.npz", x=np.ones((count, 10_000), np.float32))
        part = open_arrays(tmp_path / f"{count}.npz", inputs).split(0, count, 0).judgement
        peaks.append(peak_bytes(lambda part=part: part.batches(4)))  # type: ignore[misc]
    assert abs(peaks[1] - peaks[0]) < 1e6


@pytest.mark.real_data
@pytest.mark.skipif("ATTN_DEPLOY_DATA" not in os.environ, reason="ATTN_DEPLOY_DATA is not set")
def test_500_photographs_are_split_and_labelled_by_their_folder() -> None:
    root = Path(os.environ["ATTN_DEPLOY_DATA"], "imagenet_compatible_500")
    inputs = (TensorSpec("x", "float32", ("batch", 3, 224, 224)),)
    data = open_data(root, inputs=inputs, preprocess=Preprocess("x", (224, 224), resize=248), labels=None)
    assert len(data.keys()) == 500
    split = data.split(63, 500, seed=0)
    assert (split.calibration.size, split.judgement.size) == (63, 437)
    for batch in split.calibration.batches(16):
        assert batch.labels is not None
        assert batch.labels.tolist() == [int(key.split("/")[0]) for key in batch.keys]
    assert data.unreadable == ()
