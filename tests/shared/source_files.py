"""The Python files of the package, by their path in the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = [p for top in ("m3i_fast", "pipelines", "benchmarks") for p in (ROOT / top).rglob("*.py")]
FILES = {path.relative_to(ROOT).as_posix(): path for path in PATHS}
