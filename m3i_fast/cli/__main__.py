"""Run `m3i-fast` as `python -m m3i_fast.cli`."""

import sys

from m3i_fast.cli import main

sys.exit(main())
