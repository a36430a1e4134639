"""The receipt for people: tables on a terminal, a page in a browser."""

from __future__ import annotations

from pathlib import Path

from attn_deploy.receipt import Receipt


def write_html(receipt: Receipt, path: Path) -> None:
    path.write_text("<html></html>")
