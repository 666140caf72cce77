"""What telemetry says of cards that it has sampled by a clock of the test's."""

from __future__ import annotations

import threading
from typing import Any

from m3i_fast.observe.telemetry.sampler import Device, TelemetrySampler
from tests.shared.observe.recorded_nvml import BUS_IDS, UUIDS

DEVICES = [Device(uuid, bus_id) for uuid, bus_id in zip(UUIDS, BUS_IDS, strict=True)]


class SteppedClock:
    """Clock that goes on by STEP_S whenever the sampler's thread reads it, up to `end_s`.

    A sampler at 10 Hz is then never early, so it samples without a pause up to the end. After it
    the clock goes on by microseconds: no two samples are of one time.
    """

    STEP_S = 0.125

    def __init__(self, end_s: float) -> None:
        self.now_s, self._end_s, self._at_end = 0.0, end_s, threading.Event()

    def __call__(self) -> float:
        if self.now_s < self._end_s:
            self.now_s += self.STEP_S
        else:
            self.now_s += 1e-6
            self._at_end.set()
        return self.now_s

    def wait(self) -> None:
        """Wait until all samples before the end were taken."""
        assert self._at_end.wait(60)


def sampled(nvml: Any, *, devices: list[Device] = DEVICES[:1], num_samples: int = 3) -> Any:
    """The summary of at least so many samples, and the telemetry that took them."""
    num_reads = len(devices) + 3  # of a sample: each card, the host twice, and the pause after it
    end_s = SteppedClock.STEP_S * num_reads * num_samples
    clock = SteppedClock(end_s + 1)
    with TelemetrySampler(10.0, nvml, devices=devices, clock=clock) as telemetry:
        clock.wait()
    return telemetry.summary(0.0, end_s), telemetry
