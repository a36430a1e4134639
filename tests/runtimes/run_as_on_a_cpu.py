"""run_as_on_a_cpu.py MODEL...: each model on the feeds beside it, as our runtime for ONNX Runtime's CPU opens it
(`ours`) and as ONNX Runtime does by itself (`stock`); what they give is written beside it. To be run under an emulated
CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from attn_deploy.runtimes.onnxruntime import cpu_settings, create_session, session_settings


def main(models: list[Path]) -> None:
    settings = {"ours": cpu_settings(1, library=False), "stock": session_settings(1, None)}
    for model in models:
        feeds = dict(np.load(model.with_suffix(".npz")))
        found = {name: create_session(model, options).run(None, feeds)[0] for name, options in settings.items()}
        np.savez(model.with_suffix(".out.npz"), **found)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
