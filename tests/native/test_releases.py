"""The same library in several releases of ONNX Runtime, the oldest that is supported and the newest among them: every
operator out of it, each release in a process of its own."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from attn_deploy.ops import FORMS
from attn_deploy.runtimes import native

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # for the cases of every form

import test_block_ops
import test_ops

RELEASES = ("1.20.1", "1.21.1", "1.24.4", "1.28.0", "1.31.1", "1.32.0")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn-deploy-tests"
SCRIPT = Path(__file__).with_name("run_on_release.py")


def install(release: str) -> Path:
    """Into a folder of its own that is kept; skips where the package registry cannot be reached."""
    folder = CACHE / f"onnxruntime-{release}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{release}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".done").is_file():
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--upgrade",
                "--target",
                str(folder),
            ]
            done = subprocess.run(
                [*command, f"onnxruntime=={release}"], capture_output=True, text=True, timeout=300, check=False
            )
            if done.returncode != 0:
                pytest.skip(f"pip cannot install onnxruntime {release}: {done.stderr.strip().splitlines()[-1]}")
            (folder / ".done").touch()
    return folder


def cases() -> Iterator[tuple[str, list[np.ndarray], dict[str, float | int], np.ndarray]]:
    """(form, operands, attributes, expected) of each form, of a case with sizes that are no multiples of a vector."""
    for name in FORMS:
        if name in test_block_ops.BLOCK_FORMS:
            made = test_block_ops.call(name)
            yield name, list(made.operands.values()), made.attributes, made.expected()
        else:
            of_form = [case for case in test_ops.CASES if case.form == name]
            case = next((c for c in of_form if c.about == "primes"), of_form[-1])
            yield name, case.arrays(), dict(case.attributes), case.expected()[0]


def is_weight(form: str, name: str) -> bool:
    """What kernels of coarse operators want as constants, to pack it once."""
    operator = FORMS[form].operator
    varying = {"Linear": ("x", "residual"), "FeedForward": ("x",), "AttentionBlock": ("x", "bias", "mask")}
    return operator in varying and name not in varying[operator]


@pytest.fixture(scope="module")
def one_node_models(library: Path, make_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for each form that the library has a kernel for, and its inputs and expected output beside it."""
    folder = tmp_path_factory.mktemp("releases")
    kernels = native.library_operators(library)
    for form, operands, attributes, expected in cases():
        if form not in kernels:
            continue
        named = dict(zip((i.name for i in FORMS[form].inputs), operands, strict=True))
        constants = {name: value for name, value in named.items() if is_weight(form, name)}
        model = make_model(form, attributes=attributes, constants=constants, with_body=False)
        (folder / f"{form}.onnx").write_bytes(model)
        feeds = {name: value for name, value in named.items() if name not in constants}
        np.savez(folder / f"{form}.npz", expected=expected, **feeds)
    return folder


def run_all(library: Path, models: Path, *, release: Path | None) -> str:
    environment = dict(os.environ)
    if release is not None:
        environment["PYTHONPATH"] = str(release)
    command = [sys.executable, str(SCRIPT), str(library), str(models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_every_operator_runs_on_any_number_of_threads(library: Path, one_node_models: Path) -> None:
    """Upon the installed release: 1, 2, 3 and 8 threads."""
    said = run_all(library, one_node_models, release=None)
    count = len(list(one_node_models.glob("*.onnx")))
    assert count > 0
    assert said.split()[-1] == str(count)


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_every_operator_runs_upon_each_release(library: Path, one_node_models: Path, release: str) -> None:
    assert run_all(library, one_node_models, release=install(release)).split()[0] == release


@pytest.mark.slow
def test_another_process_on_one_core_changes_no_bit(library: Path, one_node_models: Path) -> None:
    """Threads that lose their core claim fewer blocks; the outputs are those of one thread all the same."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        run_all(library, one_node_models, release=None)
    finally:
        busy.kill()
        busy.wait()
