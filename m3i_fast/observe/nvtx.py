"""Named ranges of time that nsys records, on any device (NVTX)."""

from __future__ import annotations

try:
    from m3i_fast._nvtx import pop, push
except ImportError as error:
    raise ImportError(
        "m3i_fast._nvtx: expected the compiled module, got none; build it by: "
        "pip install --no-build-isolation --no-deps -e ."
    ) from error


class NvtxRange:
    """A context whose time a profiler records under a name; without a profiler it does nothing."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        push(self._name)

    def __exit__(self, *error: object) -> None:
        pop()
