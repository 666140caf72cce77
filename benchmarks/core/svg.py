"""What all drawn benchmarks share: a self-contained page, readable light and dark, axes and words.

A mark is of class ours, others or neutral: a line, a point, a square, or words in that colour.
"""

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
.neutral { stroke: #8d897f; }
circle.ours, rect.ours, text.ours { fill: #0b6f68; stroke: none; }
circle.others, rect.others { fill: #b0501a; stroke: none; }
circle.neutral { fill: #8d897f; stroke: none; }
text.ours { font-weight: 600; }
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
  circle.ours, rect.ours, text.ours { fill: #57c4b8; }
  circle.others, rect.others { fill: #e9985c; }
  circle.hollow { fill: #171614; }
  circle.ours.hollow { stroke: #57c4b8; }
  circle.others.hollow { stroke: #e9985c; }
}
"""


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis from pixel `at` over `length` pixels, negative upwards; logarithmic or linear."""

    low: float
    high: float
    at: float
    length: float
    linear: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        if self.linear:
            share = (value - self.low) / (self.high - self.low)
        else:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.at + self.length * share


def page(elements: Iterable[str], *, width: int, height: int, label: str) -> str:
    """Return the document; screen readers say its `label`."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(label)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
    )
    return "\n".join([*head, *elements, "</svg>", ""])


def text(x: float, y: float, words: str, kind: str, anchor: str) -> str:
    """Return words of the class `kind`; `anchor` says what of them is at x: start, middle, end."""
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def round_values(low: float, high: float) -> list[float]:
    """Return about five round values, evenly spaced, of which the first and last enclose both."""
    rough = max(high - low, 1e-9) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]


def powers_of_ten(values: Iterable[float]) -> list[float]:
    """Return the powers of ten that enclose all values, at least two."""
    numbers = list(values)
    first = math.floor(math.log10(min(numbers)))
    last = max(first + 1, math.ceil(math.log10(max(numbers))))
    return [10.0**power for power in range(first, last + 1)]
