"""SKIPPED.md has a section for every reason, with its own words, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from attn_deploy.export.recognize.site import Reason

PAGE = Path(__file__).parents[2] / "SKIPPED.md"


def test_every_reason_has_its_section() -> None:
    sections = re.findall(r"^## (\w+)\n\*(.+)\*\n\n(.+)", PAGE.read_text(), re.MULTILINE)
    assert {name: words.replace("\\", "") for name, words, _ in sections} == {r.name: str(r) for r in Reason}
