"""Peak memory of children that are known to take much, little, too long, or to fail."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attn_deploy.errors import AttnDeployError, UnavailableError
from attn_deploy.memory import measure_peak, peak_rss_mb

MakeChild = Callable[[str, str], str]

SERVED = """\
from attn_deploy.memory import serve

def run(payload):
{body}

if __name__ == "__main__":
    serve(run)
"""


@pytest.fixture
def make_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeChild:
    """Write a module that this process, and so its children, can import."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, code: str) -> str:
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return make


def served(body: str) -> str:
    return SERVED.format(body="\n".join("    " + line for line in body.splitlines()))


ALLOCATE = 'import numpy as np\nheld = np.ones(payload["bytes"], np.uint8)\ndel held'


def test_200_mb_in_a_child_are_200_mb_more_though_its_parent_holds_500(make_child: MakeChild) -> None:
    parent_holds = np.ones(500_000_000, np.uint8)
    child = make_child("allocating_child", served(ALLOCATE))
    small_mb = measure_peak(child, {"bytes": 1})
    large_mb = measure_peak(child, {"bytes": 200_000_000})
    assert peak_rss_mb() > parent_holds.nbytes / 1e6
    assert 5.0 < small_mb < 200.0
    assert large_mb - small_mb == pytest.approx(200.0, abs=20.0)


def test_the_payload_reaches_the_child_as_it_was(make_child: MakeChild) -> None:
    body = 'assert payload == {"bundle": "größe.attn", "batch": 8, "threads": None, "sizes": [1, 2.5]}, payload'
    payload = {"bundle": "größe.attn", "batch": 8, "threads": None, "sizes": [1, 2.5]}
    assert measure_peak(make_child("payload_child", served(body)), payload) > 0.0


def test_what_libraries_print_around_the_report_does_not_matter(make_child: MakeChild) -> None:
    body = (
        "import atexit, sys\n"
        'sys.stdout.write("a line without its end")\n'
        'atexit.register(print, \'{"peak_rss_mb": "many"}\\n[1]\\nbye\')'
    )
    assert measure_peak(make_child("noisy_child", served(body)), {}) > 0.0


def test_a_failing_child_is_an_error_with_the_end_of_its_stderr(make_child: MakeChild) -> None:
    noise = 'import sys\nfor line in range(100): print("noise", line, file=sys.stderr)\n'
    body = noise + 'raise ValueError("no such provider")'
    with pytest.raises(AttnDeployError, match="no such provider") as caught:
        measure_peak(make_child("failing_child", served(body)), {})
    assert caught.value.where == "failing_child"
    assert "exit code 1" in str(caught.value)
    assert "noise 0\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_a_killed_child_is_an_error_that_thinks_of_memory(make_child: MakeChild) -> None:
    body = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(AttnDeployError, match=r"SIGKILL.*memory"):
        measure_peak(make_child("killed_child", served(body)), {})


def test_a_child_that_does_not_end_is_killed_and_an_error(make_child: MakeChild) -> None:
    child = make_child("hanging_child", "import time; time.sleep(3600)")
    with pytest.raises(AttnDeployError, match=re.escape("more than 0.2 s")):
        measure_peak(child, {}, timeout_s=0.2)


def test_a_child_that_reports_nothing_is_an_error(make_child: MakeChild) -> None:
    with pytest.raises(AttnDeployError, match="reported no figure"):
        measure_peak(make_child("silent_child", "print('done')"), {})


def test_a_module_in_the_current_folder_does_not_stand_in_for_an_installed_one(
    make_child: MakeChild, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = make_child("importing_child", served("import numpy"))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "numpy.py").write_text("raise RuntimeError('not numpy')")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(elsewhere)
    assert measure_peak(child, {}) > 0.0


def test_without_an_interpreter_to_start_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(UnavailableError):
        measure_peak("any", {})
