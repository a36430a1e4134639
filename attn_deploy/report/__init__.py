"""The receipt for people: tables on a terminal (`terminal`), a page in a browser (`html`).

Nothing is imported here but the receipt: rich belongs to the command line, jinja2 to the extra `report`.
"""

from __future__ import annotations

from pathlib import Path

from attn_deploy.receipt import Receipt


def write_html(receipt: Receipt, path: Path) -> bool:
    """Writes the page to `path`. False, and nothing written, where jinja2 is not installed (`attn-deploy[report]`)."""
    page = html_page(receipt)
    if page is None:
        return False
    path.write_text(page, encoding="utf-8")
    return True


def html_page(receipt: Receipt) -> str | None:
    """The page; None where jinja2 is not installed."""
    try:
        from attn_deploy.report.html import render_html
    except ModuleNotFoundError as missing:
        if missing.name != "jinja2":
            raise
        return None
    return render_html(receipt)
