"""M3I pre-training: `train` a config, `load` what was trained, and the fused `ops` by themselves.

Importing the package imports nothing else; each name is imported where it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3i_fast import ops
    from m3i_fast.config import TrainConfig
    from m3i_fast.engine.trainer import Outcome, train
    from m3i_fast.inference.loading import load
    from m3i_fast.inference.model import Model
    from m3i_fast.inference.transform import Transform

    __version__: str

__all__ = ["Model", "Outcome", "TrainConfig", "Transform", "load", "ops", "train"]

_MODULES = {
    "Model": "m3i_fast.inference.model",
    "Outcome": "m3i_fast.engine.trainer",
    "TrainConfig": "m3i_fast.config",
    "Transform": "m3i_fast.inference.transform",
    "load": "m3i_fast.inference.loading",
    "train": "m3i_fast.engine.trainer",
}


if not TYPE_CHECKING:  # a type checker names what is not there

    def __getattr__(name: str) -> Any:
        """Import and return a public name, which stays in the module from then on."""
        if name == "ops":
            return importlib.import_module("m3i_fast.ops")
        if name == "__version__":  # pyproject.toml's, as it was installed
            return importlib.import_module("importlib.metadata").version("m3i-fast")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    """Return the public names, and those of the submodules that were imported."""
    return sorted({*globals(), *__all__})
