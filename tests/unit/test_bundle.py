"""Bundles: whole or not at all when they are written, checked when they are read."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from attn_deploy.bundle import (
    MANIFEST,
    RECEIPT,
    check_free,
    encode,
    open_bundle,
    storage_errors,
    write_manifest,
    writing,
)
from attn_deploy.errors import BundleError, StorageError, UsageError
from attn_deploy.manifest import SCHEMA_VERSION, FileEntry, Graph, Manifest, Variant
from attn_deploy.receipt import DataEntry, Receipt
from attn_deploy.session import DimBounds, TensorSpec

MODEL = "variants/onnxruntime-cpu-fp32.onnx"
WEIGHTS = "variants/onnxruntime-cpu-fp32.onnx.data"
FILES = (MODEL, WEIGHTS, RECEIPT)


def manifest(model: str = MODEL) -> Manifest:
    x = TensorSpec("x", "float32", ("batch", 4))
    variants = {"fp32": Variant("onnxruntime-cpu", "fp32", (model, WEIGHTS))}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name="net",
        source="demo",
        graphs={"main": Graph((x,), (x,), {"batch": DimBounds()}, variants)},
        preprocess=None,
        labels=("cat", "dog"),
        chosen={"onnxruntime-cpu": "fp32"},
        requirements={},
        files={},
    )


def receipt(source: str = "demo") -> Receipt:
    return Receipt(1, source, "its own", "2026-01-01", "", {}, {}, DataEntry(), (), (), (), {})


def fill(folder: Path, content: bytes = b"model", model: str = MODEL) -> None:
    (folder / "variants").mkdir(exist_ok=True)
    (folder / MODEL).write_bytes(content)
    (folder / WEIGHTS).write_bytes(np.arange(1000, dtype=np.float32).tobytes())
    (folder / RECEIPT).write_bytes(encode(receipt()))
    write_manifest(folder, manifest(model))


def make_bundle(out: Path, content: bytes = b"model", *, force: bool = False) -> Path:
    with writing(out, force=force) as folder:
        fill(folder, content)
    return out


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "net.attn")


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def edit_manifest(root: Path, old: str, new: str) -> None:
    path = root / MANIFEST
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# -- reading ---------------------------------------------------------------------------------------------------------


def test_what_was_written_reads_back(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest == msgspec.structs.replace(manifest(), files=opened.manifest.files)
    assert set(opened.manifest.files) == set(FILES)
    assert opened.read(MODEL) == b"model"
    assert opened.check(WEIGHTS).read_bytes() == np.arange(1000, dtype=np.float32).tobytes()
    assert opened.receipt() == receipt()
    opened.check_all()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_in_every_file(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    opened = open_bundle(bundle)
    for check in (opened.read, opened.check):
        with pytest.raises(BundleError, match="was changed") as caught:
            check(name)
        assert caught.value.where == str(bundle / name)
        assert str(caught.value.got) != str(caught.value.expected)
    with pytest.raises(BundleError):
        opened.check_all()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match="missing") as caught:
        open_bundle(bundle).check_all()
    assert caught.value.where == str(bundle / name)


def test_a_truncated_file_is_told_by_its_size(bundle: Path) -> None:
    (bundle / WEIGHTS).write_bytes((bundle / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(BundleError, match="wrong size") as caught:
        open_bundle(bundle).path(WEIGHTS)
    assert (caught.value.got, caught.value.expected) == ("3999", "4000")


def test_a_file_that_the_manifest_does_not_list_is_answered_with_the_nearest(bundle: Path) -> None:
    with pytest.raises(BundleError, match="does not list") as caught:
        open_bundle(bundle).read("recipt.json")
    assert str(caught.value.expected).startswith("did you mean receipt.json")


def test_a_newer_bundle_says_that_it_is_newer_whatever_else_it_holds(bundle: Path) -> None:
    newer = {"schema_version": SCHEMA_VERSION + 1, "graphs": "are something else now"}
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(newer))
    with pytest.raises(BundleError, match="newer than this attn-deploy") as caught:
        open_bundle(bundle)
    assert caught.value.got == f"schema_version {SCHEMA_VERSION + 1}"
    assert "newer attn-deploy" in str(caught.value.next_step)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": "one"}', b'{"schema_version": 1}', b'{"name": "net"}'],
    ids=["empty", "cut", "a list", "no UTF-8", "version as text", "fields missing", "no version"],
)
def test_a_damaged_manifest_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match="manifest is not understood") as caught:
        open_bundle(bundle)
    assert caught.value.where == str(bundle / MANIFEST)
    assert caught.value.got


def test_a_damaged_receipt_is_refused(tmp_path: Path) -> None:
    with writing(tmp_path / "net.attn", force=False) as folder:
        fill(folder)
        (folder / RECEIPT).write_bytes(b"{}")
        write_manifest(folder, manifest())
    with pytest.raises(BundleError, match="receipt is not understood"):
        open_bundle(tmp_path / "net.attn").receipt()


@pytest.mark.parametrize(
    "name", ["../secret", "variants/../../secret", "/etc/passwd", "..\\\\secret", "C:secret", "//host/share"]
)
@pytest.mark.parametrize("place", ["files", "a variant's files"])
def test_a_name_that_climbs_out_is_refused_at_once(bundle: Path, place: str, name: str) -> None:
    (bundle.parent / "secret").write_bytes(b"secret")
    if place == "files":
        edit_manifest(bundle, f'"{RECEIPT}": {{', f'"{name}": {{')
    else:
        edit_manifest(bundle, f'"{MODEL}",', f'"{name}",')
    with pytest.raises(BundleError, match="leaves the bundle") as caught:
        open_bundle(bundle)
    assert caught.value.got == name.replace("\\\\", "\\")


@pytest.mark.parametrize("link", [MODEL, "variants"], ids=["a file", "a folder"])
def test_a_link_that_leads_out_is_refused_even_if_the_content_is_right(bundle: Path, link: str) -> None:
    outside = bundle.parent / "outside"
    shutil.move(bundle / link, outside)
    (bundle / link).symlink_to(outside)
    opened = open_bundle(bundle)
    assert (bundle / MODEL).read_bytes() == b"model"
    with pytest.raises(BundleError, match="leads out of it") as caught:
        opened.read(MODEL)
    assert str(outside) in str(caught.value.got)


def test_a_bundle_behind_a_link_is_read(bundle: Path) -> None:
    link = bundle.with_name("link.attn")
    link.symlink_to(bundle)
    open_bundle(link).check_all()


@pytest.mark.parametrize("kind", ["nothing", "a file", "an empty folder"])
def test_what_is_no_bundle_is_said_to_be_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.attn"
    if kind == "a file":
        path.write_bytes(b"onnx")
    elif kind == "an empty folder":
        path.mkdir()
    with pytest.raises(BundleError, match="not a bundle") as caught:
        open_bundle(path)
    assert caught.value.got == str(path)
    assert "attn-deploy export" in str(caught.value.next_step)


def test_a_misspelt_path_is_answered_with_the_bundle_beside_it(bundle: Path) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle.with_name("nett.attn"))
    assert caught.value.next_step == "did you mean net.attn?"


# -- writing ---------------------------------------------------------------------------------------------------------


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    open_bundle(make_bundle(tmp_path / "a" / "b" / "net.attn")).check_all()
    assert names(tmp_path / "a" / "b") == {"net.attn"}


def test_a_bundle_that_exists_is_kept_without_force(bundle: Path) -> None:
    with pytest.raises(UsageError, match="exists already") as caught:
        make_bundle(bundle, b"other")
    assert "--force" in str(caught.value.next_step)
    assert open_bundle(bundle).read(MODEL) == b"model"
    assert names(bundle.parent) == {"net.attn"}


def test_force_replaces_the_whole_bundle_and_leaves_nothing_beside_it(bundle: Path) -> None:
    (bundle / "left_from_before").write_bytes(b"")
    make_bundle(bundle, b"other", force=True)
    assert open_bundle(bundle).read(MODEL) == b"other"
    assert names(bundle) == {MANIFEST, RECEIPT, "variants"}
    assert names(bundle.parent) == {"net.attn"}


def test_with_force_the_old_bundle_is_there_until_the_new_one_is_whole(bundle: Path) -> None:
    with writing(bundle, force=True) as folder:
        fill(folder, b"other")
        assert open_bundle(bundle).read(MODEL) == b"model"
    assert open_bundle(bundle).read(MODEL) == b"other"


def test_a_reader_never_finds_the_name_without_a_bundle(bundle: Path) -> None:
    """Another process opens the bundle all the while it is replaced."""
    reader = start(
        "import sys\n"
        "from attn_deploy.bundle import open_bundle\n"
        "print('ready', flush=True)\n"
        "rounds = 0\n"
        "while not open_bundle(sys.argv[1]).path(sys.argv[2]).with_name('stop').exists():\n"
        "    rounds += 1\n"
        "print(rounds)\n",
        bundle,
        "variants/onnxruntime-cpu-fp32.onnx",
    )
    if not exchanges(bundle.parent):
        reader.kill()
        pytest.skip("this file system cannot swap two names")
    for _ in range(50):
        make_bundle(bundle, b"model", force=True)
    with writing(bundle, force=True) as folder:
        fill(folder)
        (folder / "variants" / "stop").touch()
    output, errors = finish(reader)
    assert reader.returncode == 0, errors
    assert int(output) > 0


def test_replacing_works_where_names_cannot_be_swapped(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_deploy.bundle._exchange", lambda first, second: False)
    make_bundle(bundle, b"other", force=True)
    assert open_bundle(bundle).read(MODEL) == b"other"
    assert names(bundle.parent) == {"net.attn"}


@pytest.mark.parametrize("kind", ["a folder of the user's", "an empty folder", "a file"])
def test_what_is_no_bundle_is_never_replaced_even_with_force(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "thesis"
    if kind == "a file":
        out.write_text("ten years of work")
    else:
        out.mkdir()
    if kind == "a folder of the user's":
        (out / "chapter1.tex").write_text("ten years of work")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="not a bundle"):
        make_bundle(out, force=True)
    with pytest.raises(UsageError, match="not a bundle"):
        check_free(out, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_force_writes_through_a_link_to_a_bundle(bundle: Path) -> None:
    """The link stays a link, and nothing is left beside either."""
    links = bundle.parent / "links"
    links.mkdir()
    link = links / "latest.attn"
    link.symlink_to(bundle)
    make_bundle(link, b"other", force=True)
    assert link.is_symlink()
    assert open_bundle(bundle).read(MODEL) == b"other"
    assert names(links) == {"latest.attn"}
    assert names(bundle.parent) == {"net.attn", "links"}


def test_the_current_folder_can_be_the_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    make_bundle(Path("."), b"other", force=True)
    assert open_bundle(bundle).read(MODEL) == b"other"


def fail_while_writing(out: Path, error: BaseException) -> None:
    with writing(out, force=True) as folder:
        fill(folder, b"other")
        raise error


@pytest.mark.parametrize("error", [ValueError("parity failed"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_exception_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail_while_writing(tmp_path / "net.attn", error)
    assert names(tmp_path) == set()


def test_an_exception_keeps_the_old_bundle(bundle: Path) -> None:
    with pytest.raises(ValueError, match="parity failed"):
        fail_while_writing(bundle, ValueError("parity failed"))
    open_bundle(bundle).check_all()
    assert open_bundle(bundle).read(MODEL) == b"model"
    assert names(bundle.parent) == {"net.attn"}


WRITER = """
import pathlib, sys, time
from attn_deploy.bundle import writing
with writing(pathlib.Path(sys.argv[1]), force=True) as folder:
    (folder / "half.onnx").write_bytes(b"half a model")
    print("ready", flush=True)
    time.sleep(60)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A fresh Python that can import what this one can; it has printed `ready`."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it still prints. Not `communicate`, which passes over what `readline` has read ahead."""
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = process.stdout.read(), process.stderr.read()
    process.wait(timeout=60)
    return output, errors


@contextlib.contextmanager
def live_writer(out: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(WRITER, out)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def exchanges(folder: Path) -> bool:
    from attn_deploy.bundle import _exchange

    first, second = folder / "swap1", folder / "swap2"
    first.mkdir()
    second.mkdir()
    try:
        return _exchange(first, second)
    finally:
        first.rmdir()
        second.rmdir()


@pytest.mark.parametrize("name", ["net.attn", "net[1].attn"])
def test_a_killed_writer_leaves_no_half_bundle_and_the_next_one_clears_up(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    with live_writer(out) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert len(names(tmp_path)) == 1  # what it had so far
    make_bundle(out)
    open_bundle(out).check_all()
    assert names(tmp_path) == {name}


def test_a_killed_writer_keeps_the_old_bundle(bundle: Path) -> None:
    with live_writer(bundle) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    open_bundle(bundle).check_all()
    make_bundle(bundle, force=True)
    assert names(bundle.parent) == {"net.attn"}


def test_what_another_writer_is_still_writing_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "net.attn"
    with live_writer(out):
        make_bundle(out)
        (unfinished,) = names(tmp_path) - {"net.attn"}
        assert (tmp_path / unfinished / "half.onnx").read_bytes() == b"half a model"


def test_a_second_writer_of_the_same_process_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "net.attn"
    with writing(out, force=False) as folder:
        fill(folder)
        with pytest.raises(StorageError):
            make_bundle(out, b"other")
        assert (folder / MODEL).read_bytes() == b"model"
    assert open_bundle(out).read(MODEL) == b"model"


def test_what_a_killed_process_of_the_same_id_left_is_no_obstacle(tmp_path: Path) -> None:
    """In a container an export has the same process id every time."""
    out = tmp_path / "net.attn"
    with writing(out, force=False) as folder:
        fill(folder)
        place = folder
    place.mkdir()
    (place / "half.onnx").write_bytes(b"half a model")
    make_bundle(out, b"other", force=True)
    assert open_bundle(out).read(MODEL) == b"other"
    assert names(tmp_path) == {"net.attn"}


FULL_DISK = """
import pathlib, resource, sys
from attn_deploy.bundle import writing
from attn_deploy.errors import AttnDeployError
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
print("ready", flush=True)
try:
    with writing(pathlib.Path(sys.argv[1]), force=True) as folder:
        (folder / "variants").mkdir()
        (folder / "variants" / "small.onnx").write_bytes(bytes(60000))
        (folder / "variants" / "big.onnx").write_bytes(bytes(1_000_000))
except AttnDeployError as error:
    print(type(error).__name__, error.what, error.next_step, sep="|")
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
@pytest.mark.parametrize("old", [True, False], ids=["over an old bundle", "at a free name"])
def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path, old: bool) -> None:
    out = tmp_path / "net.attn"
    if old:
        make_bundle(out)
    process = start(FULL_DISK, out)
    output, errors = finish(process)
    assert process.returncode == StorageError.exit_code == 1, errors
    kind, what, next_step = output.strip().split("|")
    assert (kind, what) == ("StorageError", "the disk is full")
    assert "nothing was written" in next_step
    assert names(tmp_path) == ({"net.attn"} if old else set())
    if old:
        assert open_bundle(out).read(MODEL) == b"model"


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        make_bundle(tmp_path / "file" / "net.attn")
    assert str(tmp_path / "file") in str(caught.value.where)
    assert caught.value.got


def test_an_error_that_is_not_the_file_system_s_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="as it was"), storage_errors(tmp_path):
        raise ValueError("as it was")


# -- a new receipt in an old bundle ----------------------------------------------------------------------------------


def test_a_rewritten_receipt_reads_back_and_the_bundle_stays_whole(bundle: Path) -> None:
    opened = open_bundle(bundle)
    opened.rewrite(receipt("measured again"), {"onnxruntime-cpu": "int8"})
    for each in (opened, open_bundle(bundle)):
        each.check_all()
        assert each.receipt().source == "measured again"
        assert each.manifest.chosen == {"onnxruntime-cpu": "int8"}
    assert names(bundle) == {MANIFEST, RECEIPT, "variants"}


def adopted(bundle: Path, new: Path, fail: type[BaseException] | None = None) -> None:
    """The one variant of the bundle is replaced by one of the file `new`."""
    opened = open_bundle(bundle)
    with opened.adopting() as adopt:
        files = adopt("main", [new])
        if fail is not None:
            raise fail
        variants = {"tuned": Variant("onnxruntime-cpu", "fp32", files)}
        opened.rewrite(receipt("tuned"), {"onnxruntime-cpu": "tuned"}, variants={"main": variants})


def test_a_variant_is_replaced_by_another_and_its_files_with_it(bundle: Path, tmp_path: Path) -> None:
    new = tmp_path / "onnxruntime-cpu-fp32.onnx"
    for content in (b"another model", b"a third one"):
        new.write_bytes(content)
        adopted(bundle, new)
        opened = open_bundle(bundle)
        opened.check_all()
        (variant,) = opened.manifest.graphs["main"].variants.values()
        assert opened.read(variant.files[0]) == content
        listed = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
        assert listed == {*opened.manifest.files, MANIFEST}
    assert names(bundle) == {MANIFEST, RECEIPT, "variants"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_adopted_goes_where_the_rewriting_fails(
    bundle: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    new = tmp_path / "onnxruntime-cpu-fp32.onnx"
    new.write_bytes(b"another model")
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    with pytest.raises(error):
        adopted(bundle, new, error)
    assert {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()} == before
    open_bundle(bundle).check_all()


REWRITER = """
import resource, sys
from attn_deploy.bundle import MANIFEST, RECEIPT, encode, open_bundle
from attn_deploy.errors import AttnDeployError
bundle = open_bundle(sys.argv[1])
receipt = bundle.receipt()
room = max(len(encode(receipt)), len(encode(bundle.manifest))) - 1
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
print("ready", flush=True)
try:
    bundle.rewrite(receipt, {"onnxruntime-cpu": "another"})
except AttnDeployError as error:
    print(type(error).__name__, bundle.manifest.chosen)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_receipt_that_does_not_fit_on_the_disk_keeps_the_old_one_and_the_old_manifest(bundle: Path) -> None:
    """The manifest is the longer of the two here: the receipt alone would fit."""
    before = {name: (bundle / name).read_bytes() for name in (MANIFEST, RECEIPT)}
    assert len(before[MANIFEST]) > len(before[RECEIPT])
    process = start(REWRITER, bundle)
    output, errors = finish(process)
    assert process.returncode == StorageError.exit_code, errors
    assert output == "StorageError {'onnxruntime-cpu': 'fp32'}\n"
    assert {name: (bundle / name).read_bytes() for name in before} == before
    assert names(bundle) == {MANIFEST, RECEIPT, "variants"}


def test_the_manifest_lists_sizes_and_hashes(bundle: Path) -> None:
    # the first is the SHA-256 of b"model", as sha256sum gives it
    assert open_bundle(bundle).manifest.files[MODEL] == FileEntry(
        "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4", 5
    )
