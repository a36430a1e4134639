"""What the command line prints of documents, receipts and errors."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import msgspec
from rich.console import Console

from attn_deploy.errors import AttnDeployError


def print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def print_receipt(receipt: Any, console: Console) -> None:
    from attn_deploy.report.terminal import receipt_tables

    console.print(receipt_tables(receipt))


def show_error(error: AttnDeployError, as_json: bool) -> None:
    if as_json:
        details = {"what": error.what, **dict(error.details()), "exit_code": error.exit_code}
        proof = {name: getattr(error, name) for name in ("receipt", "validation") if hasattr(error, name)}
        print_json({"error": details, **proof})
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("error:", error.what, style="bold red", markup=False)
    for label, text in error.details():
        console.print(f"  {label}:".ljust(12) + text, markup=False)


def unexpected(error: Exception, as_json: bool) -> int:
    """typer's own errors carry an exit code and show themselves; anything else is a fault of ours."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        message = getattr(error, "format_message", None)
        if as_json and message is not None:
            print_json({"error": {"what": message(), "exit_code": code}})
        elif hasattr(error, "show"):
            error.show()
        return code
    fault = AttnDeployError(
        "internal error, a fault of attn-deploy", got=f"{type(error).__name__}: {error}",
        next_step="report it with the lines above, or those shown with ATTN_DEPLOY_DEBUG=1",
    )  # fmt: skip
    if os.environ.get("ATTN_DEPLOY_DEBUG"):
        traceback.print_exception(error)
    show_error(fault, as_json)
    return fault.exit_code
