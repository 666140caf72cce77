"""Processor, memory, disk and network of this machine, and of this process and its children."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = Path("/sys/block")
REFRESH_S = 10.0  # between two searches for children, which read /proc of every process


class Host:
    """Reads the host's counters; one thread calls `read` repeatedly. ImportError without psutil.

    Shares of the processor are those since the previous call; the first call returns none.
    clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        import psutil

        self._psutil: Any = psutil
        self._clock = clock
        self._me = psutil.Process()
        self._tree: list[Any] = []
        self._searched_s = -REFRESH_S
        self._busy: dict[int, float] = {}
        self._read_s: float | None = None

    def read(self) -> dict[str, float]:
        """Return cpu_percent of all cores, process_cpu_percent of one core, memory and counters.

        Byte counters count from boot, of physical disks and of all network interfaces but loopback:
        what a volume or an array reads is its disks'. process_cpu_percent and rss_bytes sum over
        the process tree, in which memory that processes share counts for each of them.
        """
        psutil, now = self._psutil, self._clock()
        if now - self._searched_s >= REFRESH_S:
            self._tree = [self._me, *self._me.children(recursive=True)]
            self._searched_s = now
        values: dict[str, float] = {"rss_bytes": 0.0}
        busy: dict[int, float] = {}
        for process in self._tree:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    values["rss_bytes"] += process.memory_info().rss
                busy[process.pid] = times.user + times.system
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it has ended, or became another user's
        share = psutil.cpu_percent(None)
        if self._read_s is not None:
            grown = sum(s - self._busy[pid] for pid, s in busy.items() if pid in self._busy)
            values["process_cpu_percent"] = 100 * grown / (now - self._read_s)
            values["cpu_percent"] = share
        self._busy, self._read_s = busy, now
        values["memory_used_bytes"] = psutil.virtual_memory().used
        if disks := self._disks():
            values["disk_read_bytes"] = sum(disk.read_bytes for disk in disks)
        if networks := psutil.net_io_counters(pernic=True):
            others = (of for name, of in networks.items() if name != "lo")
            values["network_received_bytes"] = sum(of.bytes_recv for of in others)
        return values

    def _disks(self) -> list[Any]:
        """Return the counters of each disk that is a device, all of them as one where none is."""
        counters = self._psutil.disk_io_counters(perdisk=True) or {}
        devices = [of for name, of in counters.items() if (_BLOCK / name / "device").exists()]
        whole = self._psutil.disk_io_counters()
        return devices or ([] if whole is None else [whole])


COUNTERS = ("disk_read_bytes", "network_received_bytes")
