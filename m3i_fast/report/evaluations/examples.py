"""Measured pictures on the page: what retrieval finds, and patches as colour."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_fast.report.inputs import DataEvaluation
from m3i_fast.report.pictures import inline, photo
from m3i_fast.report.sample_card import printable

BEST, WORST = "Answered best", "Answered worst"
TITLES = {
    "caption to picture": "Captions and the pictures they find",
    "picture to caption": "Pictures and the captions they find",
}


def short_names(encoders: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of encoders with absolute paths cut to their last part, where these differ.

    The full names stand among the settings.
    """
    full = [encoder["name"] for encoder in encoders]
    short = [re.sub(r"(^|[:=,])/[^,]*/(?=[^/,])", r"\1", name) for name in full]
    return [printable(name) for name in (short if len(set(short)) == len(short) else full)]


# ---- Retrieval -----------------------------------------------------------------------------------


def retrieval_sides(evaluation: DataEvaluation) -> list[dict[str, Any]]:
    """Return the first encoder's examples of both ways, the best answered and the worst."""
    measured = evaluation.results["encoders"][0]["measures"].get("retrieval")
    if measured is None:
        return []
    examples = measured["details"].get("examples", {})
    sides = []
    for side, title in TITLES.items():
        total = measured["settings"]["pictures" if side.endswith("picture") else "captions"]
        cards = [
            _card(example, evaluation, is_caption=side.startswith("caption"), total=total)
            for example in examples.get(side, ())
            if {example["row"], *example["found_rows"]} <= evaluation.pictures.keys()
        ]
        half = (len(cards) + 1) // 2
        groups = [{"title": BEST, "cards": cards[:half]}, {"title": WORST, "cards": cards[half:]}]
        if cards:
            sides.append({"title": title, "groups": [group for group in groups if group["cards"]]})
    return sides


def _card(
    example: Mapping[str, Any], evaluation: DataEvaluation, *, is_caption: bool, total: int
) -> dict[str, Any]:
    row = example["row"]
    query = printable(example["query"] if is_caption else evaluation.picture_names[row])
    return {
        "query": query,
        "is_caption": is_caption,
        "picture": photo(evaluation.pictures[row], f"The picture of {query}"),
        "rank": example["rank"] + 1,
        "total": total,
        "found": [
            _found(place, name, found_row, example["row"], evaluation)
            for place, (name, found_row) in enumerate(
                zip(example["found"], example["found_rows"], strict=True), start=1
            )
        ],
    }


def _found(
    place: int, name: str, row: int, right: int, evaluation: DataEvaluation
) -> dict[str, Any]:
    alt = f"{place}: {printable(evaluation.picture_names[row])}"
    if row == right:
        alt += " (the right one)"
    return {
        "name": printable(name),
        "is_right": row == right,
        "picture": photo(evaluation.pictures[row], alt),
    }


# ---- Patches -------------------------------------------------------------------------------------


def patch_cards(evaluation: DataEvaluation) -> list[dict[str, Any]]:
    """Return pictures with their patches as colour, by each encoder that has patches."""
    names = short_names(evaluation.results["encoders"])
    encoders = [*zip(names, map(_by_row, evaluation.arrays), strict=True)]
    rows: Sequence[int] = sorted({row for _, colours in encoders for row in colours})
    cards = []
    for row in (row for row in rows if row in evaluation.pictures):
        name = printable(evaluation.picture_names[row])
        cards.append(
            {
                "name": name,
                "picture": photo(evaluation.pictures[row], name),
                "colours": [
                    (who, inline(colours[row], f"Patch features of {name}, {who}"))
                    for who, colours in encoders
                    if row in colours
                ],
            }
        )
    return cards


def _by_row(arrays: Mapping[str, Any]) -> dict[int, Any]:
    if "patches.rows" not in arrays:
        return {}
    return dict(zip(arrays["patches.rows"].tolist(), arrays["patches.colours"], strict=True))
