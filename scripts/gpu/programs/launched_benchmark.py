"""Run a benchmark whose results are neither compared nor worth anything: what it launches is.

    python launched_benchmark.py NAME [ARGUMENTS]

For `make gpu --launch-only`. Rows go where M3I_RESULTS says, which must not be the ledger.
"""

from __future__ import annotations

import os
import sys

import torch

from m3i_fast.backward_threads import release_last_backward
from m3i_fast.benchmarks.subjects import load


def main() -> None:
    """Run the benchmark with torch's own kernels in place of cuDNN's, and without comparisons."""
    if not os.environ.get("M3I_RESULTS"):
        sys.exit("M3I_RESULTS: expected a folder for rows that are no measurements, got none")
    torch.backends.cudnn.enabled = False  # the null cuDNN has no engines that it could offer
    torch.testing.assert_close = lambda *_args, **_options: None
    load(sys.argv[1])(sys.argv[2:])
    release_last_backward()


if __name__ == "__main__":
    main()
