"""Write predicted beside measured for the rows of this hour, and print them, the worst first.

    python predicted.py FOLDER [--unmeasured]

Reads <op>.jsonl in the folder and writes predicted.md and predicted.json there. --unmeasured: no
row of it is a measurement of a card, so that the page has predictions alone. Prints `check ` and
JSON for each, as scripts/gpu/reading.py reads it: a prediction is neither right nor wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SHOWN = 12  # of the predictions, the worst first; predicted.md has all


def main() -> None:
    """Write the page, and print what it begins with."""
    from m3i_fast.ops import tiles

    tiles.CUDA = ROOT / "cuda"  # an installed package comes without the kernels' sources
    from m3i_fast.benchmarks.roofline.measured import PAGE, markdown, write_compared

    folder = Path(sys.argv[1])
    if "--unmeasured" in sys.argv:
        (folder / PAGE).write_text(markdown([], {}))
        check = {
            "what": "predicted beside measured",
            "expected": "rows of a card",
            "got": f"none here: {PAGE} has the predictions, to be compared",
        }
        print(f"check {json.dumps(check | {'holds': None})}")
        return
    compared, left = write_compared(folder)
    for each in compared[:SHOWN]:
        check = {
            "what": f"{each.op}: {each.name}",
            "expected": f"{each.predicted_ms:.3g} ms, bound by {each.binds}",
            "got": f"{each.measured_ms:.3g} ms; predicted / measured {each.ratio:.2f}",
            "source": "m3i-fast bench roofline",
        }
        print(f"check {json.dumps(check | {'holds': None})}")
    for reason, count in sorted(left.items()):
        print(f"without a prediction: {reason} ({count} rows)")
    print(f"written: {folder / PAGE}")


if __name__ == "__main__":
    main()
