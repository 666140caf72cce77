"""m3i-fast faults: break runs in every way, and check that each recovers with equal weights."""

from __future__ import annotations

from m3i_fast.benchmarks.faults.main import main

__all__ = ["main"]
