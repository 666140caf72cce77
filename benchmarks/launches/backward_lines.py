"""Which Python line a backward pass computes the gradient of.

Autograd's thread of a device runs no Python, so that what it launches has no line. Here each node
of the graph writes, before it runs, a mark with the line that made it in the forward pass.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from m3i_fast.benchmarks.launches.trace import BACKWARD

FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@contextlib.contextmanager
def marked_backward(mark: Callable[[bytes], object], root: Path) -> Iterator[None]:
    """Mark every node of the backward passes inside with the innermost line below `root`.

    Forward passes have to be inside, too: there autograd keeps the stack of each operator.
    """
    run = torch.autograd._engine_run_backward

    def run_marked(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for node in _nodes(output.grad_fn for output in outputs):
            node.register_prehook(_marking(mark, f"{BACKWARD}{_line_of(node, root) or '?'}"))
        return run(outputs, *args, **kwargs)

    torch.autograd._engine_run_backward = run_marked  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
            with torch.autograd.set_detect_anomaly(True, check_nan=False):
                yield
    finally:
        torch.autograd._engine_run_backward = run


def _marking(mark: Callable[[bytes], object], text: str) -> Callable[[Any], None]:
    """Return a hook that writes the mark and leaves the gradients alone."""

    def hook(gradients: Any) -> None:
        mark(text.encode())

    return hook


def _nodes(roots: Iterable[Any]) -> list[Any]:
    """Return the nodes of a graph, each once."""
    found: dict[Any, None] = {}
    left = [node for node in roots if node is not None]
    while left:
        node = left.pop()
        if node not in found:
            found[node] = None
            left += [other for other, _ in node.next_functions if other is not None]
    return list(found)


def _line_of(node: Any, root: Path) -> str:
    """Return FILE:LINE of the forward pass, "" for a node without a line below the root."""
    for entry in reversed(node.metadata.get("traceback_", ())):
        frame = FRAME.search(entry)
        if frame and frame[1].startswith(f"{root}/") and "/site-packages/" not in frame[1]:
            return f"{frame[1]}:{frame[2]}"
    return ""
