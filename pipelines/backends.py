"""The choice of a backend: DALI, or torch and Pillow, which make the same bits on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

from m3i_fast.config.data import BackendName
from m3i_fast.pipelines.batch_rows import BatchRows
from m3i_fast.pipelines.samples_to_views import Backend, SampleWork
from m3i_fast.pipelines.torch_backend import TorchBackend

logger = logging.getLogger(__name__)


def start_backend(name: BackendName, rows: Iterator[BatchRows], work: SampleWork) -> Backend:
    """Start a backend on rows.

    auto: DALI where it works, otherwise torch, with a warning that says why. Raises ImportError,
    with the command that installs what is missing, where `dali` cannot be had. The log says once
    which one it is.
    """
    if name == "auto":
        name = "torch" if _told_why_not_dali(work.device_id is not None) else "dali"
    _tell(name, work.device_id is not None)
    if name == "torch":
        return TorchBackend(rows, work)
    from m3i_fast.pipelines.graph.dali_backend import DaliBackend

    return DaliBackend(rows, work)


@cache
def _tell(name: BackendName, on_gpu: bool) -> None:
    how = {"torch": "torch with Pillow", "dali": f"DALI on the {'GPU' if on_gpu else 'CPU'}"}
    logger.info("data.backend: %s", how[name])


@cache
def _told_why_not_dali(on_gpu: bool) -> str | None:
    """Return why DALI cannot be had, and warn of it once; None where it can."""
    try:
        from m3i_fast.pipelines.graph.dali import expect_gpu_operators, load_operators

        load_operators()
        if on_gpu:
            expect_gpu_operators()
    except ImportError as error:
        logger.warning("data.backend auto takes torch, which is slower: %s", error)
        return str(error)
    return None
