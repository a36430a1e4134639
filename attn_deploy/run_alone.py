"""Opens a model and runs it in a process of its own, for `memory.measure_peak`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from attn_deploy import runtimes
from attn_deploy.memory import serve
from attn_deploy.target import Target

CALLS = 3


def _run(payload: dict[str, Any]) -> None:
    session = runtimes.open_session(
        Target(payload["target"]),
        Path(payload["model"]),
        threads=payload["threads"],
        library=payload["library"],
        options=payload["options"],
    )
    feeds = {name: np.ones(shape, dtype) for name, (dtype, shape) in payload["feeds"].items()}
    for _ in range(CALLS):
        session.run(feeds)


if __name__ == "__main__":
    serve(_run)
