"""Images become the same numbers as under torchvision's and timm's own transforms."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from attn_deploy.errors import UsageError
from attn_deploy.preprocess import (
    CHANNELS,
    Preprocess,
    is_image_like,
    load_image,
    prepare,
    prepare_batch,
    read_preprocess,
    validate_preprocess,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ODD_SIZES = [(33, 47), (47, 33), (64, 64), (31, 200), (200, 31), (5, 7), (1, 9), (301, 299), (225, 224), (17, 16)]


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise, so that a resampling filter or an offset that is off by one shows in every pixel."""
    channels = CHANNELS[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    # `fromarray` takes no HSV or YCbCr, `frombytes` takes every mode.
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def torchvision_numbers(image: Image.Image, config: Preprocess) -> np.ndarray[Any, Any]:
    transforms = pytest.importorskip("torchvision.transforms")
    resize: Any = config.resize if isinstance(config.resize, int) else list(config.resize or ())
    steps = [
        transforms.Resize(resize, transforms.InterpolationMode(config.interpolation)),
        transforms.CenterCrop(config.crop),
        transforms.ToTensor(),
        transforms.Normalize(config.mean, config.std),
    ]
    return transforms.Compose(steps)(image.convert(config.mode)).numpy()


@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
@pytest.mark.parametrize("resize", [37, 224, (40, 29)], ids=str)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_numbers_are_torchvisions_bit_for_bit(size: tuple[int, int], resize: Any, interpolation: str) -> None:
    config = Preprocess("x", (32, 35), resize=resize, interpolation=interpolation, mean=MEAN, std=STD)
    image = picture(*size)
    np.testing.assert_array_equal(prepare(image, config), torchvision_numbers(image, config))


@pytest.mark.parametrize("mode", sorted(CHANNELS))
def test_every_mode_is_converted_resized_and_padded_as_torchvision_does(mode: str) -> None:
    channels = CHANNELS[mode]
    config = Preprocess("x", (30, 50), resize=28, mode=mode, mean=(0.5,) * channels, std=(0.25,) * channels)
    image = picture(41, 53)
    np.testing.assert_array_equal(prepare(image, config), torchvision_numbers(image, config))


@pytest.mark.parametrize("size", [size for size in ODD_SIZES if min(size) > 4], ids=str)
@pytest.mark.parametrize(
    ("crop_mode", "img_size", "crop_pct"),
    [
        ("center", 224, 0.9),
        ("center", 64, 1.0),
        ("center", (48, 64), 0.875),
        ("squash", 96, 1.0),
        ("squash", (48, 64), 0.95),
        ("border", (48, 64), 0.95),
        ("border", 96, 0.9),
    ],
    ids=str,
)
def test_numbers_are_timms_bit_for_bit(size: tuple[int, int], crop_mode: str, img_size: Any, crop_pct: float) -> None:
    data = pytest.importorskip("timm.data")
    crop = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    scaled = (int(crop[0] / crop_pct), int(crop[1] / crop_pct))
    square_centre = crop_mode == "center" and scaled[0] == scaled[1]
    config = Preprocess(
        "x",
        crop,
        resize=scaled[0] if square_centre else scaled,
        fit={"center": "cover", "squash": "exact", "border": "contain"}[crop_mode],
        fill=tuple(round(255 * value) for value in MEAN) if crop_mode == "border" else (0,),
        mean=MEAN,
        std=STD,
    )
    transform = data.create_transform(
        (3, *crop), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=crop_pct, crop_mode=crop_mode
    )
    image = picture(*size)
    np.testing.assert_array_equal(prepare(image, config), transform(image).numpy())


@pytest.mark.real_data
@pytest.mark.skipif("ATTN_DEPLOY_DATA" not in os.environ, reason="ATTN_DEPLOY_DATA is not set")
def test_photographs_become_the_numbers_of_vit_tinys_own_transform() -> None:
    data = pytest.importorskip("timm.data")
    config = Preprocess("x", (224, 224), resize=248, mean=(0.5,) * 3, std=(0.5,) * 3)
    transform = data.create_transform((3, 224, 224), interpolation="bicubic", mean=config.mean, std=config.std,
                                      crop_pct=0.9)  # fmt: skip
    photographs = sorted(Path(os.environ["ATTN_DEPLOY_DATA"], "imagenet_compatible_500").glob("*/*.jpg"))[::25]
    assert len(photographs) == 20
    for path in photographs:
        reference = transform(Image.open(path).convert("RGB")).numpy()
        np.testing.assert_array_equal(prepare(path, config), reference, err_msg=str(path))


def test_crop_smaller_than_the_image_is_padded_with_black_before_normalizing() -> None:
    config = Preprocess("x", (4, 4), mode="L", mean=(0.5,), std=(0.5,))
    made = prepare(np.full((1, 2), 255, np.uint8), config)
    assert made[0].tolist() == [[-1, -1, -1, -1], [-1, 1, 1, -1], [-1, -1, -1, -1], [-1, -1, -1, -1]]


def test_rescale_of_one_keeps_the_pixel_values() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    made = prepare(pixels, Preprocess("x", (2, 2), rescale=1.0))
    assert made.dtype == np.float32
    assert made.flags.c_contiguous
    np.testing.assert_array_equal(made, pixels.transpose(2, 0, 1))


def test_path_bytes_pil_and_array_of_one_picture_give_the_same_numbers(tmp_path: Path) -> None:
    image = picture(20, 30)
    path = tmp_path / "a.png"
    image.save(path)
    config = Preprocess("x", (16, 16), resize=18)
    made = prepare_batch([str(path), path, path.read_bytes(), image, np.asarray(image)], config)
    assert made.shape == (5, 3, 16, 16)
    assert (made == made[0]).all()


def test_exif_orientation_is_not_applied_as_the_reference_stacks_do_not(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    picture(20, 30).save(path, exif=exif)
    assert load_image(path).size == (30, 20)
    as_stored = np.asarray(Image.open(path)).transpose(2, 0, 1)
    np.testing.assert_array_equal(prepare(path, Preprocess("x", (20, 30), rescale=1.0)), as_stored)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_files_in_other_modes_are_converted_as_pil_does(tmp_path: Path, mode: str) -> None:
    image = picture(9, 9).convert("L" if mode == "I;16" else mode).convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    image.save(path)
    expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(prepare(path, Preprocess("x", (9, 9), rescale=1.0)), expected)


@pytest.mark.parametrize("content", [b"", b"no image", "cut"], ids=["empty", "text", "truncated"])
def test_damaged_file_is_an_error_with_its_name(tmp_path: Path, content: bytes | str) -> None:
    stream = io.BytesIO()
    picture(50, 50).save(stream, "JPEG")
    path = tmp_path / "damaged.jpg"
    path.write_bytes(stream.getvalue()[:900] if isinstance(content, str) else content)
    with pytest.raises(UsageError, match="cannot be decoded") as caught:
        load_image(path)
    assert caught.value.where == str(path)


def test_missing_file_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    picture(5, 5).save(tmp_path / "tiger.png")
    with pytest.raises(UsageError, match="no such image") as caught:
        load_image(tmp_path / "tigre.png")
    assert "did you mean tiger.png?" in str(caught.value)


def test_strip_that_would_be_resized_to_gigabytes_is_refused() -> None:
    with pytest.raises(UsageError, match="too elongated"):
        prepare(np.zeros((1, 60000), np.uint8), Preprocess("x", (224, 224), resize=248))


@pytest.mark.parametrize(
    "value", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 7), np.uint8), np.zeros((0, 4), np.uint8), 3, None]
)
def test_what_is_no_image_is_an_error_that_says_what_it_was(value: object) -> None:
    with pytest.raises(UsageError, match="not an image") as caught:
        load_image(value)
    assert caught.value.got in ("float32[4, 4, 3]", "uint8[4, 4, 7]", "uint8[0, 4]", "int", "NoneType")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.jpg", True),
        (Path("a.jpg"), True),
        (b"..", True),
        (picture(2, 2), True),
        (np.zeros((2, 2, 3), np.uint8), True),
        (np.zeros((2, 2), np.uint8), True),
        (["a.jpg", Path("b.jpg")], True),
        ([], False),
        (["a.jpg", 3], False),
        (np.zeros((1, 2, 2, 3), np.uint8), False),
        (np.zeros((2, 2, 3), np.float32), False),
        ({"x": 1}, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_image_like_values_are_told_from_feeds(value: object, expected: bool) -> None:
    assert is_image_like(value) is expected


def test_pillow_is_not_imported_before_an_image_is_decoded() -> None:
    use = "p.is_image_like([1]); p.Preprocess('x', (2, 2))"
    code = f"import sys, attn_deploy.preprocess as p; {use}; print('PIL' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mode": "RBG"}, "mode"),
        ({"mode": "L"}, "mean"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"fit": "squash"}, "fit"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"mean": (0.5,)}, "mean"),
        ({"resize": 0}, "resize"),
        ({"crop": (0, 224)}, "crop"),
        ({"rescale": 0.0}, "rescale"),
        ({"fill": (300,)}, "fill"),
    ],
    ids=str,
)
def test_description_that_contradicts_itself_cannot_be_made_or_read(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(UsageError, match=f"`{field}`"):
        Preprocess(**{"input": "x", "crop": (224, 224)} | change)
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"input": "x", "crop": [224, 224]} | change))
    with pytest.raises(UsageError, match=f"`{field}`") as caught:
        read_preprocess(path)
    assert caught.value.where == str(path)


def test_written_description_is_read_back(tmp_path: Path) -> None:
    config = Preprocess("pixels", (224, 192), resize=(240, 200), fit="cover", fill=(1, 2, 3), mean=MEAN, std=STD)
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(config))
    assert read_preprocess(tmp_path / "p.json") == config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"crop": [224, 224]}', "`input`"),
        ('{"input": "x", "crop": 224}', "$.crop"),
        ('{"input": "x", "crop": [224, 224], "resise": 248}', "`resise`"),
        ("{", "truncated"),
    ],
)
def test_wrong_description_names_the_file_the_field_and_the_keys(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_preprocess(path)
    assert caught.value.where == str(path)
    assert named in str(caught.value.got)
    assert "interpolation" in str(caught.value.expected)


def test_missing_description_names_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "preprocess.json").write_text("{}")
    with pytest.raises(UsageError, match=r"did you mean preprocess\.json\?"):
        read_preprocess(tmp_path / "preproces.json")


@pytest.mark.parametrize(
    ("sizes", "axis"),
    [
        ((1, 224, 224), "channels"),
        ((3, 256, 224), "height"),
        ((3, 224, "width"), None),
        ((3, "height", 64), "width"),
    ],
)
def test_description_is_held_against_the_models_input(sizes: tuple[Any, Any, Any], axis: str | None) -> None:
    config = Preprocess("x", (224, 224))
    if axis is None:
        validate_preprocess(config, *sizes)
        return
    with pytest.raises(UsageError, match=f"another {axis} than input 'x' takes"):
        validate_preprocess(config, *sizes)
