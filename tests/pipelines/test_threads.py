"""A loader's threads are found by their names."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from m3i_fast.pipelines.threads import start_pool


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_threads_of_a_pool_have_its_name_for_the_system_too() -> None:
    def names() -> tuple[str, str]:
        task = Path(f"/proc/self/task/{threading.get_native_id()}")
        return threading.current_thread().name, (task / "comm").read_text().strip()

    with start_pool(1, "m3i-read") as pool:
        assert pool.submit(names).result() == ("m3i-read_0", "m3i-read")
