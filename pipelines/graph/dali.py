"""The only import of DALI, with the operators of this package."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from m3i_fast.pipelines.optional_imports import require

require("nvidia.dali")

from nvidia.dali import Pipeline, __version__, fn, pipeline_def, types  # noqa: E402
from nvidia.dali.backend import RegisteredGPUOps  # noqa: E402
from nvidia.dali.data_node import DataNode  # noqa: E402
from nvidia.dali.plugin_manager import load_library  # noqa: E402

__all__ = [
    "DataNode",
    "Pipeline",
    "expect_gpu_operators",
    "fn",
    "load_operators",
    "pipeline_def",
    "types",
]

_BUILD = (
    "`make install` in a checkout, otherwise `pip install --no-build-isolation --no-deps "
    "--force-reinstall m3i-fast`"
)


@cache
def load_operators() -> None:
    """Load the operators of cuda/dali: fn.m3i_read, fn.m3i_draw_views and those of views.

    Raises ImportError, with the command that builds them, where they are not there for this DALI
    or do not load.
    """
    module = find_spec("m3i_fast._C")
    assert module is not None and module.origin is not None
    folder = Path(module.origin).parent
    file = folder / f"_dali-{__version__}.so"
    if not file.is_file():
        found = sorted(other.name for other in folder.glob("_dali-*.so"))
        raise ImportError(
            f"{file}: expected this package's operators for DALI {__version__}, got "
            f"{', '.join(found) or 'none'}; they are built where DALI and CUDA's headers are "
            f"installed before the package is: {_BUILD}"
        )
    try:
        load_library(str(file))
    except RuntimeError as error:
        raise ImportError(
            f"{file}: expected this package's operators for DALI {__version__}, got a library that "
            f"does not load ({error}); build them again: {_BUILD}"
        ) from error


def expect_gpu_operators() -> None:
    """Raise ImportError where fn.m3i_views was built without CUDA, which a GPU's loader needs."""
    if "M3iViews" not in RegisteredGPUOps():
        raise ImportError(
            "fn.m3i_views: expected a build with CUDA, for a loader on a GPU, got one without: "
            "`M3I_CUDA=ON make install` in a checkout builds it"
        )
