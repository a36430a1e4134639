"""The `--data` argument: where samples come from, which calibrate and which judge, as streams of batches.

A pass holds one batch at a time, so memory does not grow with the number of samples.
"""

from __future__ import annotations

from attn_deploy.data.dataset import Batch, Dataset, Part, Split, require_labels
from attn_deploy.data.opening import open_data

__all__ = ["Batch", "Dataset", "Part", "Split", "open_data", "require_labels"]
