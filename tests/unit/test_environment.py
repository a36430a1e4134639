"""Host facts from file systems written for the test, and what is said about a machine that is not quiet."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from attn_deploy import environment
from attn_deploy.environment import (
    HostFacts,
    available_cores,
    host,
    instruction_sets,
    load_warning,
    quiet_note,
    runtime_conflict,
    throttling_note,
    versions,
)

CASCADE_LAKE = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Gold 6248
cpu MHz\t\t: 2501.000
flags\t\t: fpu sse2 avx avx2 avx512f avx512dq avx512_vnni

processor\t: 1
model name\t: Intel(R) Xeon(R) Gold 6248
cpu MHz\t\t: 2667.000
flags\t\t: fpu sse2 avx avx2 avx512f avx512dq avx512_vnni
"""

NEOVERSE = """\
processor\t: 0
Features\t: fp asimd evtstrm aes atomics fphp asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0c
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)


def test_the_facts_of_this_host_are_plain_values() -> None:
    facts = host()
    assert facts["logical_cores"] == available_cores()
    assert all(value is None or isinstance(value, str | int | float) for value in facts.values())


def test_an_x86_host_is_read_from_proc_and_sys(tmp_path: Path) -> None:
    cpufreq = "sys/devices/system/cpu/cpu{}/cpufreq/"
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": CASCADE_LAKE,
            "proc/meminfo": "MemTotal:       24684000 kB\nMemFree:        1 kB\n",
            "proc/loadavg": "0.31 0.20 0.10 1/89 4214\n",
            "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
            cpufreq.format(0) + "scaling_governor": "performance\n",
            cpufreq.format(0) + "scaling_cur_freq": "1200000\n",
            cpufreq.format(1) + "scaling_cur_freq": "2667000\n",
            cpufreq.format(0) + "cpuinfo_max_freq": "3900000\n",
        },
    )
    facts = host(root)
    assert facts["cpu"] == "Intel(R) Xeon(R) Gold 6248"
    assert facts["instruction_sets"] == "avx2 avx512f avx512_vnni"
    assert facts["memory_total_mb"] == 25276
    assert facts["load_average_1min"] == 0.31
    assert facts["cpu_governor"] == "performance"
    assert (facts["cpu_mhz"], facts["cpu_max_mhz"]) == (2667.0, 3900.0)
    assert facts["os"] == "Debian GNU/Linux 12 (bookworm)"


def test_without_cpufreq_the_clock_is_the_one_of_cpuinfo_and_its_maximum_is_unknown(tmp_path: Path) -> None:
    facts = host(write(tmp_path, {"proc/cpuinfo": CASCADE_LAKE}))
    assert (facts["cpu_mhz"], facts["cpu_max_mhz"], facts["cpu_governor"]) == (2667.0, None, None)


def test_an_arm_host_without_a_model_name_is_told_by_its_numbers(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": NEOVERSE})
    assert host(root)["cpu"] == "implementer 0x41 part 0xd0c"
    assert instruction_sets(root) == ("neon", "neon_dotprod")


def test_a_host_without_proc_and_sys_still_gives_facts(tmp_path: Path, eight_cores: None) -> None:
    facts = host(tmp_path)
    assert facts["logical_cores"] == 8
    assert facts["architecture"] == platform.machine()
    assert facts["cpu_mhz"] is facts["cpu_max_mhz"] is facts["cpu_governor"] is facts["cpu_quota"] is None


def test_macos_is_read_through_sysctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "machdep.cpu.brand_string": "Apple M2",
        "hw.memsize": "17179869184",
        "hw.optional.AdvSIMD": "1",
        "hw.optional.arm.FEAT_DotProd": "1",
        "hw.optional.avx2_0": "0",
    }
    monkeypatch.setattr(environment, "_sysctl", answers.get)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    facts = host(tmp_path)
    assert facts["cpu"] == "Apple M2"
    assert facts["memory_total_mb"] == 17180
    assert facts["instruction_sets"] == "neon neon_dotprod"
    assert facts["os"] == "macOS 15.1"
    assert facts["logical_cores"] == os.cpu_count()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "0::/user/app\n",
                "sys/fs/cgroup/user/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/user/app/cpu.max": "max 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:cpu,cpuacct:/docker/ab\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
    ids=["no-groups", "v2-max", "v2", "v2-part-of-a-core", "v2-above-affinity", "v2-of-a-parent", "v1", "v1-unlimited"],
)
def test_the_cores_are_those_of_affinity_within_the_containers_quota(
    tmp_path: Path, eight_cores: None, files: dict[str, str], cores: int
) -> None:
    assert available_cores(write(tmp_path, files)) == cores


def test_versions_leave_out_what_is_absent_and_import_nothing() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["numpy"] == importlib.metadata.version("numpy")
    code = (
        "import sys; from attn_deploy import environment as e; e.host(); e.versions(); e.runtime_conflict(); "
        "print({'torch', 'onnx', 'onnxruntime', 'openvino', 'timm', 'transformers'} & set(sys.modules))"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("installed", "conflict"),
    [
        ({"onnxruntime": "1.32.0"}, False),
        ({"onnxruntime-gpu": "1.32.0"}, False),
        ({}, False),
        ({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}, True),
    ],
    ids=["cpu", "gpu", "none", "both"],
)
def test_both_flavours_of_onnx_runtime_are_a_conflict(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], conflict: bool
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    message = runtime_conflict()
    assert (message is not None) == conflict
    if message is not None:
        assert "1.32.0" in message
        assert "1.31.1" in message
        assert "pip uninstall" in message
    assert set(versions()) == {"python", *installed}


def facts_with(**facts: str | int | float | None) -> HostFacts:
    return {"load_average_1min": 0.1, "machine_cores": 2, "cpu_mhz": None, "cpu_max_mhz": None, **facts}


@pytest.mark.parametrize(
    ("load", "warned"),
    [(0.1, False), (2.0, False), (2.1, True), (None, False)],
    ids=["idle", "full", "over", "unknown"],
)
def test_a_load_average_over_the_cores_is_warned_about(load: float | None, warned: bool) -> None:
    message = load_warning(facts_with(load_average_1min=load))
    assert (message is not None) == warned
    if message is not None:
        assert "2.10 on 2 cores" in message


@pytest.mark.parametrize(
    ("current", "highest", "noted"),
    [(3900.0, 3900.0, False), (2667.0, 3900.0, False), (1200.0, 3900.0, True), (1200.0, None, False)],
    ids=["full", "avx512", "throttled", "maximum-unknown"],
)
def test_a_clock_far_under_its_maximum_is_noted(current: float, highest: float | None, noted: bool) -> None:
    message = throttling_note(facts_with(cpu_mhz=current, cpu_max_mhz=highest, cpu_governor="powersave"))
    assert (message is not None) == noted
    if message is not None:
        assert "1200 of 3900 MHz" in message
        assert "'powersave'" in message


def test_the_note_says_every_disturbance_or_the_load_without_one() -> None:
    disturbed = quiet_note(facts_with(load_average_1min=5.0, cpu_mhz=800.0, cpu_max_mhz=3900.0))
    assert "load average 5.00" in disturbed
    assert "800 of 3900 MHz" in disturbed
    assert quiet_note(facts_with()) == "nothing disturbed the machine: load average 0.10 on 2 cores"
    assert "could not be read" in quiet_note(facts_with(load_average_1min=None))
