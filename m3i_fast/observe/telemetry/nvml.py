"""Readers of one GPU through NVML; the module `pynvml` is passed in, since sampler.py imports it.

A reader queries one thing and returns values by name. What a card, a driver or the library does not
support is left out and not queried again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

Values = dict[str, float]
Reader = Callable[[Any, Any], Values]  # takes the module and a handle

# Bits of the clocks' event reasons, called throttle reasons until driver 535.
REASONS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
# The other reasons are normal operation: idle, clocks that were set, the power limit.
THROTTLING = frozenset(
    {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}
)

ALL_LINKS = 0xFFFFFFFF


def uuid_hash(uuid: str) -> str:
    """Return a hash that tells a card from others in published rows, without its serial number."""
    return hashlib.sha256(uuid.encode()).hexdigest()[:12]


def reason_names(bits: int) -> list[str]:
    """Return the names of the reasons whose bits are set."""
    return [name for bit, name in REASONS.items() if bits & bit]


def _energy(nvml: Any, handle: Any) -> Values:
    return {"energy_j": nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3}


def _power(nvml: Any, handle: Any) -> Values:
    return {"power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3}


def _power_limit(nvml: Any, handle: Any) -> Values:
    return {"power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3}


def _sm_clock(nvml: Any, handle: Any) -> Values:
    return {"sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)}


def _memory_clock(nvml: Any, handle: Any) -> Values:
    return {"memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)}


def _reasons(nvml: Any, handle: Any) -> Values:
    """Read the clocks' event reasons, by their old name where library or driver is too old."""
    try:
        return {"reasons": nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)}
    except AttributeError:
        return {"reasons": nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)}
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        return {"reasons": nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)}


def _temperature(nvml: Any, handle: Any) -> Values:
    return {"temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)}


def _memory(nvml: Any, handle: Any) -> Values:
    return {"memory_used_bytes": nvml.nvmlDeviceGetMemoryInfo(handle).used}


def _utilisation(nvml: Any, handle: Any) -> Values:
    """Read the share of time in which any kernel ran, and in which memory was read or written."""
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    return {"gpu_percent": rates.gpu, "memory_percent": rates.memory}


def _jpeg(nvml: Any, handle: Any) -> Values:
    return {"jpeg_percent": nvml.nvmlDeviceGetJpgUtilization(handle)[0]}


def _decoder(nvml: Any, handle: Any) -> Values:
    return {"decoder_percent": nvml.nvmlDeviceGetDecoderUtilization(handle)[0]}


def _ecc_corrected(nvml: Any, handle: Any) -> Values:
    kind = nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
    return {"ecc_corrected": _ecc(nvml, handle, kind)}


def _ecc_uncorrected(nvml: Any, handle: Any) -> Values:
    kind = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    return {"ecc_uncorrected": _ecc(nvml, handle, kind)}


def _ecc(nvml: Any, handle: Any, kind: int) -> int:
    return int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC))


def _remapped_rows(nvml: Any, handle: Any) -> Values:
    corrected, uncorrected, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
    return {
        "remapped_rows": corrected + uncorrected,
        "remapping_pending": pending,
        "remapping_failed": failed,
    }


def _nvlink(nvml: Any, handle: Any) -> Values:
    """Read the counters of all links together, which are in KiB."""
    fields = {
        "nvlink_sent_bytes": nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
        "nvlink_received_bytes": nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
    }
    ids = [(field, ALL_LINKS) for field in fields.values()]
    values = nvml.nvmlDeviceGetFieldValues(handle, ids)
    for each in values:
        if each.nvmlReturn != nvml.NVML_SUCCESS:
            raise nvml.NVMLError(each.nvmlReturn)
    return {name: 1024 * each.value.ullVal for name, each in zip(fields, values, strict=True)}


def _pcie(nvml: Any, handle: Any) -> Values:
    """Read the traffic over 20 ms, for which each of the two calls waits."""
    sent = nvml.nvmlDeviceGetPcieThroughput(handle, nvml.NVML_PCIE_UTIL_TX_BYTES)
    received = nvml.nvmlDeviceGetPcieThroughput(handle, nvml.NVML_PCIE_UTIL_RX_BYTES)
    return {"pcie_sent_byte_s": 1e3 * sent, "pcie_received_byte_s": 1e3 * received}


READERS: tuple[Reader, ...] = (
    _energy, _power, _power_limit, _sm_clock, _memory_clock, _reasons, _temperature, _memory,
    _utilisation, _jpeg, _decoder, _ecc_corrected, _ecc_uncorrected, _remapped_rows, _nvlink,
)  # fmt: skip
COUNTERS = (
    "energy_j",
    "nvlink_sent_bytes",
    "nvlink_received_bytes",
    "ecc_corrected",
    "ecc_uncorrected",
)
STATES = ("power_limit_w", "remapped_rows", "remapping_pending", "remapping_failed")
"""States, which are summarised by their last value."""


class PerformanceMonitor:
    """Utilisation of a chip's units between two calls, by NVML's GPM, on Hopper and newer cards."""

    _MIB = 2.0**20
    NUM_JPEG = 8

    def __init__(self, nvml: Any, handle: Any) -> None:
        if not nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
        first = nvml.NVML_GPM_METRIC_NVJPG_0_UTIL
        self._scales = {
            nvml.NVML_GPM_METRIC_SM_UTIL: ("sm_percent", 1.0),
            nvml.NVML_GPM_METRIC_SM_OCCUPANCY: ("sm_occupancy_percent", 1.0),
            nvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: ("tensor_percent", 1.0),
            nvml.NVML_GPM_METRIC_DRAM_BW_UTIL: ("dram_percent", 1.0),
            nvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC: ("pcie_sent_byte_s", self._MIB),
            nvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC: ("pcie_received_byte_s", self._MIB),
        }
        self._jpegs = range(first, first + self.NUM_JPEG)
        self._samples: list[Any] = []
        for _ in range(2):
            self._samples.append(nvml.nvmlGpmSampleAlloc())
        self._is_first = True

    def read(self, nvml: Any, handle: Any) -> Values:
        """Return the values since the previous call; none at the first call.

        `jpeg_percent` is the mean over the engines that the card has.
        """
        before, now = self._samples
        nvml.nvmlGpmSampleGet(handle, now)
        self._samples = [now, before]
        if self._is_first:
            self._is_first = False
            return {}
        request = nvml.c_nvmlGpmMetricsGet_t()
        request.version = nvml.NVML_GPM_METRICS_GET_VERSION
        ids = [*self._scales, *self._jpegs]
        request.numMetrics = len(ids)
        request.sample1, request.sample2 = before, now
        for metric, number in zip(request.metrics, ids, strict=False):
            metric.metricId = number
        nvml.nvmlGpmMetricsGet(request)
        by_id = {}
        for metric in request.metrics[: len(ids)]:
            if metric.nvmlReturn == nvml.NVML_SUCCESS and math.isfinite(metric.value):
                by_id[metric.metricId] = metric.value
        values = {
            name: by_id[number] * scale
            for number, (name, scale) in self._scales.items()
            if number in by_id
        }
        if jpegs := [by_id[number] for number in self._jpegs if number in by_id]:
            values["num_jpeg_engines"] = len(jpegs)
            values["jpeg_percent"] = sum(jpegs) / len(jpegs)
        return values

    def close(self, nvml: Any) -> None:
        """Free the samples."""
        for sample in self._samples:
            nvml.nvmlGpmSampleFree(sample)
        self._samples = []


class Gpu:
    """One card; one thread calls `read` repeatedly."""

    def __init__(self, nvml: Any, handle: Any, uuid: str) -> None:
        self._nvml, self._handle = nvml, handle
        self.uuid_hash = uuid_hash(uuid)
        self._readers = list(READERS)
        self._slow: list[Reader] = [_pcie]
        self._monitor: PerformanceMonitor | None = None
        try:
            self._monitor = PerformanceMonitor(nvml, handle)
        except (nvml.NVMLError, AttributeError):
            pass
        else:  # it reads PCIe's traffic without a wait
            self._readers.append(self._monitor.read)
            self._slow = []
        try:
            name = nvml.nvmlDeviceGetName(handle)
            self.name: str | None = name.decode() if isinstance(name, bytes) else name
        except nvml.NVMLError:
            self.name = None

    def read(self, *, slow: bool = False) -> Values:
        """Return the present values. slow: also those that take the driver tens of milliseconds."""
        values: Values = {}
        for readers in (self._readers, self._slow if slow else []):
            for reader in list(readers):
                try:
                    values |= reader(self._nvml, self._handle)
                except AttributeError:  # a library that is older than the function
                    readers.remove(reader)
                except self._nvml.NVMLError as error:
                    if error.value in self._permanent_errors():
                        readers.remove(reader)
        return values

    def close(self) -> None:
        """Free what NVML holds for this card."""
        if self._monitor is not None:
            self._monitor.close(self._nvml)

    def _permanent_errors(self) -> set[int]:
        """Return the errors that drop a reader; others leave its value out once."""
        nvml = self._nvml
        return {
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_NO_PERMISSION,
            nvml.NVML_ERROR_INVALID_ARGUMENT,
        }
