"""Fills in what the site builds from the code: the contents, every config field, every command.

In a page, `<!-- built:NAME -->` is replaced by the Markdown that PAGES[NAME] returns, which GitHub
does not show, and {where}`NAME` becomes the file that defines NAME in the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from builder import commands_page, config_page, definitions, navigation

PAGES: dict[str, Callable[[], str]] = {
    "contents": navigation.contents,
    "limits": navigation.limits,
    "config": config_page.page,
    "recipes": config_page.recipe_tables,
    "commands": commands_page.page,
}
MARK = re.compile(r"<!-- built:(\w+) -->")
# Files beside docs/ that pages link to, and the page that shows each on the site.
ELSEWHERE = {
    "CONTRIBUTING.md": "/reference/contributing.md",
    "CHANGELOG.md": "/reference/changelog.md",
    "README.md": "/index.md",
    "cuda/emulator/README.md": "/extend/emulator.md",
}
LINK = re.compile(rf"\]\((?:\.\./)+({'|'.join(map(re.escape, ELSEWHERE))})")


def fill(text: str) -> str:
    """Return the text with every mark replaced. ExtensionError for an unknown name."""

    def built(found: re.Match[str]) -> str:
        if found[1] not in PAGES:
            raise ExtensionError(f"built:{found[1]}: expected one of {', '.join(PAGES)}")
        return PAGES[found[1]]()

    return MARK.sub(built, text)


def on_source_read(app: Sphinx, docname: str, content: list[str]) -> None:
    """Fill a page that is about to be parsed, and have its links stay on the site."""
    content[0] = LINK.sub(lambda found: f"]({ELSEWHERE[found[1]]}", fill(content[0]))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect all of it to Sphinx."""
    app.connect("source-read", on_source_read)
    app.add_role("where", definitions.where)
    return {"version": "1", "parallel_read_safe": True}
