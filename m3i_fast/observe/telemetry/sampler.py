"""Samples power, clocks and use of a node's GPUs and processor, in a thread of one rank."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from m3i_fast.observe.telemetry import host
from m3i_fast.observe.telemetry import nvml as gpu
from m3i_fast.observe.telemetry.host import Host
from m3i_fast.observe.telemetry.nvml import Gpu, Values, reason_names
from m3i_fast.observe.telemetry.series import Point, gauge_statistics, growth, integral

logger = logging.getLogger(__name__)

INSTALL = 'pip install "m3i-fast[telemetry]"'
KEPT_S = 3600.0  # samples older than this are dropped
UUID_PREFIXES = ("GPU", "MIG")


@dataclass(frozen=True, slots=True)
class Device:
    """Identity of a CUDA device's card: CUDA_VISIBLE_DEVICES changes numbers and their order."""

    uuid: str
    """UUID without its prefix."""
    bus_id: str | None
    """PCI address, domain:bus:device.function; None where torch does not report it."""


def cuda_devices(count: int | None = None) -> list[Device]:
    """Return the first `count` of torch's CUDA devices, or all; none without CUDA."""
    num_there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = []
    for index in range(min(num_there, num_there if count is None else count)):
        p: Any = torch.cuda.get_device_properties(index)
        address: list[Any] = [
            getattr(p, f"pci_{part}_id", None) for part in ("domain", "bus", "device")
        ]
        domain, bus, slot = address
        bus_id = None if None in address else f"{domain:08x}:{bus:02x}:{slot:02x}.0"
        devices.append(Device(str(p.uuid), bus_id))
    return devices


class TelemetrySampler:
    """Samples while its context lasts, `hz` times a second; `summary` covers a part of that time.

    There is one sampler a node: the rank that enters it samples all GPUs. What a card or this
    machine does not report is missing in the summary. An error in the thread is logged and ends the
    sampling alone.

    nvml: a module with the names of pynvml; None imports it. devices: torch's where it is None.
    clock: seconds, of the samples and of the windows of `summary`. Raises ValueError for a rate
    outside 0.1 to 10.
    """

    def __init__(
        self,
        hz: float = 2.0,
        nvml: Any = None,
        *,
        devices: Sequence[Device] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0.1 <= hz <= 10:
            raise ValueError(f"hz: expected 0.1 to 10 samples a second, got {hz}")
        self.hz, self.cpu_s = hz, 0.0
        """cpu_s: processor time that the thread has used."""
        self._nvml, self._devices, self._clock = nvml, devices, clock
        self._gpus: list[Gpu] = []
        self._host: Host | None = None
        length = math.ceil(KEPT_S * hz)
        self._of_gpus: list[deque[tuple[float, Values]]] = []
        self._of_host: deque[tuple[float, Values]] = deque(maxlen=length)
        self._length = length
        self._ended = threading.Event()
        self._sampled = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- The thread ------------------------------------------------------------------------------

    def __enter__(self) -> TelemetrySampler:
        """Start the thread and wait for the first sample."""
        self._open()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()
        self._sampled.wait(timeout=10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the thread and release NVML."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for each in self._gpus:
            each.close()
        if self._gpus:
            self._nvml.nvmlShutdown()

    def _open(self) -> None:
        try:
            self._host = Host(self._clock)
        except ImportError:
            logger.warning("telemetry: no figures of the host: pip install psutil")
        devices = cuda_devices() if self._devices is None else self._devices
        if not devices:
            logger.info("telemetry: no GPU, figures of the host alone")
            return
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
        except ImportError:
            logger.warning("telemetry: no figures of the GPUs: pynvml is missing; %s", INSTALL)
            return
        except self._nvml.NVMLError as error:
            logger.warning("telemetry: no figures of the GPUs: NVML: %s", error)
            return
        self._gpus = [card for each in devices if (card := self._find(each)) is not None]
        self._of_gpus = [deque(maxlen=self._length) for _ in self._gpus]
        if not self._gpus:
            self._nvml.nvmlShutdown()

    def _find(self, device: Device) -> Gpu | None:
        """Return the card with the UUID (of a card or of its MIG part) or the bus address."""
        nvml = self._nvml
        tried = [
            (nvml.nvmlDeviceGetHandleByUUID, f"{kind}-{device.uuid}") for kind in UUID_PREFIXES
        ]
        if device.bus_id is not None:
            tried.append((nvml.nvmlDeviceGetHandleByPciBusId, device.bus_id))
        reason: Exception | None = None
        for find, name in tried:
            try:
                handle = find(name)
                return Gpu(nvml, handle, nvml.nvmlDeviceGetUUID(handle))
            except nvml.NVMLError as error:
                reason = error
        logger.warning("telemetry: no figures of the GPU %s: NVML: %s", device.uuid, reason)
        return None

    def _run(self) -> None:
        began, number = self._clock(), 0
        try:
            while not self._ended.is_set():
                self._sample(number)
                self.cpu_s = time.thread_time()
                self._sampled.set()
                now = self._clock()
                due = math.ceil((now - began) * self.hz)  # samples that are late are skipped
                number = max(number + 1, due)
                self._ended.wait(began + number / self.hz - now)
        except Exception:
            logger.warning("telemetry: ended by an error; the run goes on", exc_info=True)
        finally:
            self._sampled.set()

    def _sample(self, number: int) -> None:
        for index, (card, kept) in enumerate(zip(self._gpus, self._of_gpus, strict=True)):
            slow = number % len(self._gpus) == index
            now = self._clock()
            kept.append((now, card.read(slow=slow)))
        if self._host is not None:
            now = self._clock()
            self._of_host.append((now, self._host.read()))

    # ---- Summaries -------------------------------------------------------------------------------

    def summary(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """Return the summary of a window of the clock within the last hour; JSON-able.

        energy_j is the growth of the cards' counters, or the integral of power for a card without
        one; None where less than half of the window was sampled or a card reports neither.
        """
        cards = []
        for card, kept in zip(self._gpus, self._of_gpus, strict=True):
            identity = {"uuid_hash": card.uuid_hash, "name": card.name}
            cards.append(identity | _gpu_summary(list(kept), begin_s, end_s))
        energies = [card.get("energy_j") for card in cards]
        known = [energy for energy in energies if energy is not None]
        samples = self._of_gpus[0] if self._of_gpus else self._of_host
        return {
            "gpus": cards,
            "host": _host_summary(list(self._of_host), begin_s, end_s),
            "throttled": any(gpu.THROTTLING & set(c.get("throttle_reasons", ())) for c in cards),
            "energy_j": sum(known) if known and len(known) == len(energies) else None,
            "num_samples": len(_inside(list(samples), begin_s, end_s)),
            "hz": self.hz,
        }


def _inside(samples: list[tuple[float, Values]], begin_s: float, end_s: float) -> list[Values]:
    return [values for now, values in samples if begin_s <= now <= end_s]


def _gauges(inside: list[Values], *, but: Sequence[str]) -> dict[str, Any]:
    names = dict.fromkeys(name for values in inside for name in values)
    return {
        name: gauge_statistics([values[name] for values in inside if name in values])
        for name in names
        if name not in but
    }


def _points(samples: list[tuple[float, Values]], name: str) -> list[Point]:
    return [(now, values[name]) for now, values in samples if name in values]


def _counters(
    samples: list[tuple[float, Values]], names: Sequence[str], begin_s: float, end_s: float
) -> dict[str, float]:
    grown = {}
    for name in names:
        points = _points(samples, name)
        if points and (amount := growth(points, begin_s, end_s)) is not None:
            grown[name] = amount
    return grown


def _gpu_summary(
    samples: list[tuple[float, Values]], begin_s: float, end_s: float
) -> dict[str, Any]:
    inside = _inside(samples, begin_s, end_s)
    summary = _gauges(inside, but=(*gpu.COUNTERS, *gpu.STATES, "reasons", "num_jpeg_engines"))
    summary |= _counters(samples, gpu.COUNTERS, begin_s, end_s)
    if not any("energy_j" in values for _, values in samples):
        power = _points(samples, "power_w")
        joules = growth(integral(power), begin_s, end_s) if power else None
        if joules is not None:
            summary["energy_j"] = joules
    for name in (*gpu.STATES, "num_jpeg_engines"):
        if states := [values[name] for values in inside if name in values]:
            summary[name] = states[-1]
    if reasons := [int(values["reasons"]) for values in inside if "reasons" in values]:
        any_bits = 0
        for bits in reasons:
            any_bits |= bits
        summary["throttle_reasons"] = reason_names(any_bits)
    return summary


def _host_summary(
    samples: list[tuple[float, Values]], begin_s: float, end_s: float
) -> dict[str, Any]:
    gauges = _gauges(_inside(samples, begin_s, end_s), but=host.COUNTERS)
    return gauges | _counters(samples, host.COUNTERS, begin_s, end_s)
