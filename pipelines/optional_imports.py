"""The import of optional libraries, with the command that installs them."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, *, extra: str = "data") -> Any:
    """Import and return a module; ImportError names the command that installs it.

    extra: that of this package which holds it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'{module} is not installed: pip install "m3i-fast[{extra}]"') from error
