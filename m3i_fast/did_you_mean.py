"""What a wrong name was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.4) -> str:
    """Return the known name closest to a misspelt one, as a hint; empty when none is close.

    cutoff: how alike they have to be, 0 to 1.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]}?" if close else ""
