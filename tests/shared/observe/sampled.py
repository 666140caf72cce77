"""What telemetry says of cards that it has sampled for a moment."""

from __future__ import annotations

import time
from typing import Any

from m3i_fast.observe.telemetry.sampler import Device, TelemetrySampler
from tests.shared.observe.recorded_nvml import BUS_IDS, UUIDS

DEVICES = [Device(uuid, bus_id) for uuid, bus_id in zip(UUIDS, BUS_IDS, strict=True)]


def sampled(nvml: Any, *, devices: list[Device] = DEVICES[:1], num_samples: int = 3) -> Any:
    """The summary of at least so many samples, and the telemetry that took them."""
    begin_s = time.monotonic()
    with TelemetrySampler(10.0, nvml, devices=devices) as telemetry:
        deadline = begin_s + 10
        while telemetry.summary(begin_s, time.monotonic())["num_samples"] < num_samples:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        end_s = time.monotonic()
    return telemetry.summary(begin_s, end_s), telemetry
