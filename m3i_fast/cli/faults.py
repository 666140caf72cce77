"""m3i-fast faults: spoil runs in every way and see that each ends as if nothing had happened."""

from __future__ import annotations

from m3i_fast.benchmarks.faults.main import main

__all__ = ["main"]
