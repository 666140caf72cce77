"""python -m m3i_fast.benchmarks NAME ...: a subject without the packages that m3i-fast needs."""

from __future__ import annotations

import sys

from m3i_fast.backward_threads import release_last_backward
from m3i_fast.benchmarks.subjects import SUBJECTS, load

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SUBJECTS:
        sys.exit(f"expected one of {', '.join(SUBJECTS)}, got {' '.join(sys.argv[1:2]) or 'none'}")
    code = load(sys.argv[1])(sys.argv[2:])
    release_last_backward()
    sys.exit(code)
