"""Consoles that show text as it is: paths, names and errors may hold what rich takes for markup.

rich reads [b] as a style, [/b] as its end and :bug: as a picture. Nothing is read so here, and what
has a style is a `rich.text.Text`.
"""

from __future__ import annotations

from rich.console import Console


def make_console(*, stderr: bool = False) -> Console:
    """Make a console on standard output or standard error."""
    return Console(stderr=stderr, markup=False, emoji=False)
