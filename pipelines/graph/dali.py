"""The only import of DALI, and the digest of a graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from m3i_fast.pipelines.optional_imports import require

require("nvidia.dali")

from nvidia.dali import Pipeline, __version__, fn, pipeline_def, types  # noqa: E402
from nvidia.dali import math as dali_math  # noqa: E402
from nvidia.dali._utils import dali_trace  # noqa: E402
from nvidia.dali.data_node import DataNode  # noqa: E402

__all__ = [
    "DataNode",
    "Pipeline",
    "__version__",
    "dali_math",
    "fn",
    "graph_digest",
    "pipeline_def",
    "types",
]


def graph_digest(make_pipeline: Callable[[], Pipeline]) -> str:
    """Hash the serialised graph (sha256): its operators, their arguments and connections.

    The origin of every operator (file and line, kept for error messages) is left out, so that a
    moved checkout or a new comment does not change the digest.
    """
    was_enabled = dali_trace.is_tracing_enabled()
    dali_trace.set_tracing(enabled=False)
    try:
        return hashlib.sha256(make_pipeline().serialize()).hexdigest()
    finally:
        dali_trace.set_tracing(enabled=was_enabled)
