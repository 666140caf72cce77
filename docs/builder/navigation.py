"""The order in which the site's navigation shows its pages; each page stands in it once.

A page is named by its own title unless one stands here.
"""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
CONTENTS = {
    "Start": ("install", "tutorial"),
    "Use": (
        "data",
        "training",
        "watching",
        "precision",
        "distributed",
        "clusters",
        "planning",
        "profile",
    ),
    "Measured": (
        "performance",
        "Results <results>",
        "Methods <methods>",
        "faults",
        "comparing",
    ),
    "Extend": ("ops", "new_method", "new_op", "new_source", "emulator"),
    "Reference": ("config", "commands", "architecture", "glossary", "contributing", "changelog"),
}


def contents() -> str:
    """Return a hidden table of contents for each group, which the side bar then shows."""
    return "\n".join(
        f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```\n"
        for title, pages in CONTENTS.items()
    )


def limits() -> str:
    """Return the README's section on limits, without its heading."""
    return README.read_text().partition("\n## Limits\n")[2].partition("\nApache-2.0.")[0]
