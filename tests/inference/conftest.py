"""What tests of folders for transformers share."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, no file in the user's cache, and no code of a folder of another module's."""

    def refuse(*_: object) -> None:
        raise AssertionError("nothing here may connect")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE",
            str(tmp_path_factory.mktemp("modules")),
        )
        patch.setattr(sys, "path", [*sys.path])
        yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
