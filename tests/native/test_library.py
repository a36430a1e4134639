"""The library as a file: what it exports, where it is found, and what is said when it is missing."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attn_deploy.errors import UnavailableError
from attn_deploy.ops import FORMS
from attn_deploy.runtimes import native


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads ELF symbols with nm")
def test_nothing_but_five_functions_is_exported(library: Path) -> None:
    command = ["nm", "-D", "--defined-only", "--format=just-symbols", str(library)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    ours = ("error", "instruction_set", "operators", "version")
    assert sorted(symbols) == ["RegisterCustomOps", *(f"attn_deploy_native_{name}" for name in ours)]


def test_every_kernel_is_a_form_or_of_the_blocked_layout(library: Path) -> None:
    """Blocked operators stand in graphs that ONNX Runtime has optimized for one machine, and in no model."""
    operators = native.library_operators(library)
    assert len(set(operators)) == len(operators)
    assert {name for name in operators if not name.startswith("Blocked")} <= set(FORMS)
    assert not [name for name in FORMS if name.startswith("Blocked")]


@pytest.mark.parametrize("operator", ["Gate", "ChannelPool", "SpatialPool"])
def test_every_form_has_a_kernel(library: Path, operator: str) -> None:
    assert {name for name, form in FORMS.items() if form.operator == operator} <= set(native.library_operators(library))


def test_the_version_is_that_of_the_package(library: Path, source: Path) -> None:
    pyproject = (source.parents[1] / "pyproject.toml").read_text()
    expected = re.search(r'^version = "(.*)"$', pyproject, flags=re.MULTILINE)
    assert expected is not None
    assert native.library_version(library) == expected[1]


def look_only_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_folders", lambda: iter([folder]))


def test_status_with_the_library(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look_only_in(library.parent, monkeypatch)
    status = native.status()
    assert status.available
    assert status.path == library
    assert status.reason is None
    assert status.operators == native.kernel_names() == native.library_operators(library)
    assert status.instruction_set == native.library_instruction_set(library) != "none"
    assert native.session_library() == library


@pytest.mark.parametrize(
    ("compiler", "said"), [("/usr/bin/c++", "was not installed"), (None, "no C++ compiler at install time; next: apt")]
)
def test_status_says_why_there_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None, said: str
) -> None:
    look_only_in(tmp_path, monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    status = native.status()
    assert (status.available, status.path, status.version, status.operators) == (False, None, None, ())
    assert status.reason is not None
    assert said in status.reason
    assert native.kernel_names() == ()


def test_status_says_that_a_library_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / native._FILE_NAME
    broken.write_text("not a library")
    look_only_in(tmp_path, monkeypatch)
    status = native.status()
    assert not status.available
    assert status.path == broken
    assert status.reason is not None
    assert "does not load" in status.reason
    assert "pip install" in status.reason
    with pytest.raises(UnavailableError, match="does not load"):
        native.library_version(broken)
    assert native.session_library() is None  # function bodies run


def test_a_library_is_found_where_an_editable_install_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python files stay in the source tree; RECORD in site-packages names the library."""
    file = tmp_path / "attn_deploy" / "runtimes" / "native" / native._FILE_NAME
    file.parent.mkdir(parents=True)
    file.touch()
    record = tmp_path / "attn_deploy-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: attn-deploy\nVersion: 0.1.0\n")
    (record / "RECORD").write_text(f"attn_deploy/runtimes/native/{file.name},,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert file.parent in list(native.library_folders())


def test_a_runtime_that_is_too_old_is_told_so(library: Path) -> None:
    """A stand-in for ONNX Runtime 1.16: no API version 17, CreateStatus first in the table of version 1."""
    told: list[tuple[int, bytes]] = []
    some_status = 0x1234

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code: int, message: bytes) -> int:
        told.append((code, message))
        return some_status

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version: int) -> int | None:
        return ctypes.addressof(table) if version <= 16 else None

    @ctypes.CFUNCTYPE(ctypes.c_void_p)
    def get_version_string() -> int | None:
        return ctypes.cast(version_text, ctypes.c_void_p).value

    version_text = ctypes.create_string_buffer(b"1.16.3")
    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version_string, ctypes.c_void_p)
    )
    register = ctypes.CDLL(str(library)).RegisterCustomOps
    register.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    register.restype = ctypes.c_void_p

    assert register(None, ctypes.addressof(base)) == some_status
    assert told == [(1, b"attn_deploy native library: got ONNX Runtime 1.16.3; expected 1.17 or later")]
