"""The order in which the site's navigation shows its pages; each page stands in it once."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
# By folder of docs/, whose name in the navigation is its own with a capital.
CONTENTS = {
    "start": (
        *("install", "tutorial", "adapt", "use_model", "deploy", "search"),
        *("data", "pack", "data_at_scale", "first_hour"),
    ),
    "train": (
        *("training", "start_from_weights", "watching", "precision", "any_shape", "teachers"),
        *("distributed", "clusters", "buckets"),
    ),
    "measure": (
        *("planning", "profile", "performance", "roofline", "launches", "comparing"),
        *("evaluate", "results", "one_stage", "first_h100s", "methods", "faults"),
    ),
    "extend": (
        *("new_method", "new_op", "machine_code", "new_source", "loader", "ops", "emulator"),
    ),
    "reference": (
        *("config", "commands", "dataset_format", "glossary"),
        *("architecture", "contributing", "releasing", "changelog"),
    ),
}
# Pages that the navigation names by less than their title.
SHORT = {"results": "Results", "methods": "Methods"}


def contents() -> str:
    """Return a hidden table of contents for each folder, which the side bar then shows."""
    return "\n".join(
        f"```{{toctree}}\n:hidden:\n:caption: {folder.capitalize()}\n\n"
        + "\n".join(_entry(folder, page) for page in pages)
        + "\n```\n"
        for folder, pages in CONTENTS.items()
    )


def _entry(folder: str, page: str) -> str:
    place = f"{folder}/{page}"
    return f"{SHORT[page]} <{place}>" if page in SHORT else place


def limits() -> str:
    """Return the README's section on limits, without its heading."""
    return README.read_text().partition("\n## Limits\n")[2].partition("\nApache-2.0.")[0]
