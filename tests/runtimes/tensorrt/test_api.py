"""Every use of TensorRT in our source, checked against the real bindings of several versions on the CPU.

Names, keywords, numbers of arguments and declared types are checked; nothing of TensorRT runs.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for tensorrt_api

from tensorrt_api import bindings
from tensorrt_api.checker import Checker
from tensorrt_api.index import Index
from tensorrt_api.surface import Surface, read

ROOT = Path(__file__).parents[3]
FOLDERS = {"attn_deploy": "attn_deploy", "attn_deploy.export": "export", "attn_deploy.runtimes": "runtimes"}
VERSIONS = bindings.folders()
NEWEST = next(reversed(VERSIONS), "")
MISSING = "TensorRT's bindings are not here: pip install --no-deps tensorrt_cu13_bindings"

MINIMUM = {"class": 50, "method": 50, "property": 30, "enumerator": 10, "keyword": 4, "name": 35, "callback": 10}
"""Uses of each kind that are checked at the least: a checker that overlooks most of the source would pass it too."""


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Surface]:
    """Version -> what its bindings declare; they are imported, upon empty libraries, in processes of their own."""
    if not VERSIONS:
        pytest.skip(MISSING)
    folder = tmp_path_factory.mktemp("stand_ins")
    return {
        version: read(bindings.surface(path, bindings.stand_ins(folder, int(version.split(".")[0]))))
        for version, path in VERSIONS.items()
    }


def checked(root: Path, surface: Surface) -> Checker:
    index = Index(root, FOLDERS)
    checker = Checker(index, surface)
    checker.check(index.users())
    return checker


@pytest.mark.parametrize("version", VERSIONS or [pytest.param("", marks=pytest.mark.skip(reason=MISSING))])
def test_every_use_of_tensorrt_is_in_the_bindings(version: str, surfaces: dict[str, Surface]) -> None:
    surface = surfaces[version]
    assert surface.version.split(".")[:2] == version.split(".")[:2]
    checker = checked(ROOT, surface)
    assert not checker.problems, "\n".join(map(str, checker.problems))
    for kind, least in MINIMUM.items():
        assert checker.counts[kind] >= least, (kind, checker.counts)


def test_what_only_some_versions_have_is_in_one_of_them(surfaces: dict[str, Surface]) -> None:
    """A name that is asked for with getattr and a default may be misspelt without any version noticing."""
    found = [checked(ROOT, surface).optional for surface in surfaces.values()]
    assert found[0]
    assert not [name for name in found[0] if not any(one[name] for one in found)]


PLANTED = {
    "method": ("tensorrt_execution.py", "context.execute_async_v3(", "context.execute_async_v4(", "execute_async_v4"),
    "method of another class": ("tensorrt_network.py", "parser.clear_errors()", "parser.clear()", "no clear"),
    "keyword": ("tensorrt_build.py", "ignore_mismatch=", "ignore_missmatch=", "no keyword ignore_missmatch"),
    "enumerator": ("tensorrt_build.py", "ProfilingVerbosity.DETAILED", "ProfilingVerbosity.DETAILLED", "DETAILLED"),
    "class": ("tensorrt_network.py", "= trt.OnnxParser(", "= trt.OnnxParzer(", "tensorrt has no OnnxParzer"),
    "class in an annotation": ("tensorrt_build.py", "-> trt.Runtime:", "-> trt.RunTime:", "no class RunTime"),
    "property that is read": ("tensorrt_network.py", "layer.metadata", "layer.meta_data", "no meta_data"),
    "property that is set": ("tensorrt_build.py", "config.profiling_verbosity =", "config.profile_verbosity =",
                             "no property profile_verbosity"),
    "argument left out": ("tensorrt_execution.py", "context.set_tensor_address(name, address)",
                          "context.set_tensor_address(name)", "memory is missing"),
    "argument too many": ("tensorrt_network.py", "error.desc()", "error.desc(0)", "takes 0 arguments"),
    "argument of another type": ("tensorrt_build.py", "trt.MemoryPoolType.WORKSPACE,", "trt.BuilderFlag.TF32,",
                                 "is a MemoryPoolType, got BuilderFlag"),
    "callback": ("tensorrt_log.py", "def step_complete(", "def step_completed(", "not implement IProgressMonitor.step"),
    "callback with an argument less": ("tensorrt_log.py", "def phase_start(self, phase_name: str, ",
                                       "def phase_start(self, ", "has [3] arguments, not 2"),
    "annotation that TensorRT contradicts": ("tensorrt_build.py", "timing: trt.ITimingCache | None = config.get",
                                             "timing: trt.IHostMemory | None = config.get", "gives ITimingCache"),
    "flag of 10.x": ("tensorrt_build.py", "trt.BuilderFlag.TF32)", "trt.BuilderFlag.FP16)", "has no FP16"),
    "name known at run time": ("tensorrt_network.py", '"STRONGLY_TYPED", None', '"STRONG" + "LY", None',
                               "known only at run time"),
}  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The source, to be spoiled."""
    for folder in FOLDERS.values():
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.cc", "*.json", "__pycache__")
        )
    return tmp_path


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_mistake_is_found(kind: str, copy: Path, surfaces: dict[str, Surface]) -> None:
    file, right, wrong, said = PLANTED[kind]
    path = copy / "runtimes" / file
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1))
    problems = checked(copy, surfaces[NEWEST]).problems
    assert any(problem.path == file and said in problem.text for problem in problems), problems


UNRESOLVED = {
    "an argument without a type": "def late(engine):\n    return engine.serialize()\n",
    "an argument of any type": "def late(engine: Any) -> None:\n    engine.serialize()\n",
    "what Any gives": "def late(engine: Any) -> None:\n    engine.create_engine_inspector().get()\n",
    "an item of any type": "def late(engines: list[Any]) -> None:\n    engines[0].serialize()\n",
    "a value of a table": "def late(engines: dict[str, Any]) -> None:\n    [e.serialize() for e in engines.values()]\n",
    "one of two": "def late(a: trt.Runtime, b: trt.Builder, c: bool) -> None:\n    (a if c else b).reset()\n",
    "a name of nowhere": "def late() -> None:\n    nowhere.serialize()\n",
    "an attribute that is not there": "def late(device: Device) -> None:\n    device.engine.serialize()\n",
    "a property that is set": "def late(engine: Any) -> None:\n    engine.error_recorder = None\n",
}


@pytest.mark.parametrize("kind", UNRESOLVED)
def test_a_receiver_that_is_not_resolved_is_a_fault(kind: str, copy: Path, surfaces: dict[str, Surface]) -> None:
    path = copy / "runtimes" / "tensorrt_build.py"
    path.write_text(path.read_text() + "\n\n" + UNRESOLVED[kind].replace("Any", "typing.Any") + "\nimport typing\n")
    problems = [str(p) for p in checked(copy, surfaces[NEWEST]).problems]
    assert any("resolved" in problem for problem in problems), problems


def test_a_new_file_that_uses_tensorrt_is_checked(copy: Path, surfaces: dict[str, Surface]) -> None:
    (copy / "attn_deploy" / "new.py").write_text(
        "def late() -> None:\n    from tensorrt import Logger\n    Logger().warn('x')\n"
    )
    problems = [str(p) for p in checked(copy, surfaces[NEWEST]).problems]
    assert problems == ["new.py:3: TensorRT's Logger has no warn"]


def test_objects_are_followed_through_our_own_classes(copy: Path, surfaces: dict[str, Surface]) -> None:
    """A file that never names TensorRT, but gets an engine from one that does."""
    (copy / "attn_deploy" / "new.py").write_text(
        "from attn_deploy.runtimes.tensorrt_session import TensorRTSession\n\n\n"
        "def late(sessions: list[TensorRTSession]) -> None:\n"
        "    for session in sessions:\n        session.engine.engine.layers()\n"
    )
    problems = [str(p) for p in checked(copy, surfaces[NEWEST]).problems]
    assert problems == ["new.py:6: TensorRT's ICudaEngine has no layers"]
