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
        is_there = (error.name or module).partition(".")[0] != module.partition(".")[0]
        what = f"does not import here ({error})" if is_there else "is not installed"
        raise ImportError(f'{module} {what}: pip install "m3i-fast[{extra}]"') from error
