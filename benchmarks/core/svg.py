"""What drawn benchmarks share: a self-contained page, readable light and dark, axes and words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from xml.sax.saxutils import escape

# Not by variables: viewers other than browsers do not know them.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #66635c; }
.paper { fill: #fcfbf9; }
.title, .name { fill: #1f1e1b; }
.title { font-size: 15px; font-weight: 600; }
.grid { stroke: #e5e2db; }
.line { fill: none; stroke-width: 2; }
.dashed { stroke-dasharray: 6 4; }
.ours { stroke: #0b6f68; }
.others { stroke: #b0501a; }
circle.ours { fill: #0b6f68; stroke: none; }
circle.others { fill: #b0501a; stroke: none; }
circle.hollow { fill: #fcfbf9; stroke-width: 1.5; }
circle.ours.hollow { stroke: #0b6f68; }
circle.others.hollow { stroke: #b0501a; }
@media (prefers-color-scheme: dark) {
  text { fill: #a5a198; }
  .paper { fill: #171614; }
  .title, .name { fill: #e9e6df; }
  .grid { stroke: #35332f; }
  .ours { stroke: #57c4b8; }
  .others { stroke: #e9985c; }
  circle.ours { fill: #57c4b8; }
  circle.others { fill: #e9985c; }
  circle.hollow { fill: #171614; }
  circle.ours.hollow { stroke: #57c4b8; }
  circle.others.hollow { stroke: #e9985c; }
}
"""


@dataclass(frozen=True, slots=True)
class Axis:
    """From pixel `at` over `length` pixels, a negative length upwards; logarithmic or linear."""

    low: float
    high: float
    at: float
    length: float
    linear: bool = False

    def place(self, value: float) -> float:
        if self.linear:
            share = (value - self.low) / (self.high - self.low)
        else:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.at + self.length * share


def page(parts: Iterable[str], *, width: int, height: int, label: str) -> str:
    """The document; `label` is for those who do not see it."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(label)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
    )
    return "\n".join([*head, *parts, "</svg>", ""])


def text(x: float, y: float, words: str, kind: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def powers_of_ten(values: Iterable[float]) -> list[float]:
    """Around all values, at least two."""
    found = list(values)
    first = math.floor(math.log10(min(found)))
    last = max(first + 1, math.ceil(math.log10(max(found))))
    return [10.0**power for power in range(first, last + 1)]
