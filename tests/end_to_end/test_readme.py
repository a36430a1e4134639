"""The application that README shows runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from attn_deploy.demo import SAMPLE_IMAGES

README = Path(__file__).resolve().parents[2] / "README.md"


def application() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def test_the_application_is_fifteen_lines_at_most() -> None:
    assert len([line for line in application().splitlines() if line.strip()]) <= 15


def test_the_application_names_every_sample_digit_without_torch(demo_bundle: Path, tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text(application() + "\nassert 'torch' not in sys.modules and 'onnx' not in sys.modules\n")
    done = subprocess.run(
        [sys.executable, str(app), str(demo_bundle), str(SAMPLE_IMAGES)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    for line in lines:
        name, _, labels = line.partition(": ")
        assert labels.split()[0] == name.split("_")[0]
