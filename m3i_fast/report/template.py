"""The template of the project's pages: one file each, everything inline, no request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

_HERE = Path(__file__).parent


def render(
    template: Path, *, styles: Sequence[Path] = (), scripts: Sequence[Path] = (), **values: object
) -> str:
    """Render a template that extends base.html as HTML text.

    styles: files that follow base.css. scripts: files. The text of both goes into the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(
        style=_text([_HERE / "base.css", *styles]), script=_text(scripts), **values
    )


def _text(paths: Sequence[Path]) -> Markup:
    return Markup("\n".join(path.read_text(encoding="utf-8") for path in paths))
