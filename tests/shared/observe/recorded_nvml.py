"""NVML played back: the real module's constants, structures and errors, and cards of our own.

`Recorded` stands for the module `pynvml`. A function that a `Card` has no value for raises
NotSupported, as a driver does; an unknown name raises AttributeError, as an older module does.
"""

from __future__ import annotations

import ctypes
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

UUIDS = ("8d2f0a5e-0000-4000-8000-000000000001", "11c7b3aa-0000-4000-8000-000000000002")
BUS_IDS = ("00000000:17:00.0", "00000000:ca:00.0")


@dataclass
class Card:
    """The values that a driver gives, function by function; a callable is called at each read."""

    uuid: str
    bus_id: str
    name: str = "NVIDIA H100 80GB HBM3"
    values: dict[str, Any] = field(default_factory=dict)
    gpm: dict[int, float] | None = None
    """By metric; None: a card from before Hopper."""
    called: Counter[str] = field(default_factory=Counter)

    def answer(self, name: str) -> Any:
        self.called[name] += 1
        value = self.values.get(name, pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))
        value = value() if callable(value) else value
        if isinstance(value, Exception):
            raise value
        return value


def counting(values: Sequence[Any]) -> Callable[[], Any]:
    """One value after the other, and the last one for ever."""
    left = list(values)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def hopper(number: int, **values: Any) -> Card:
    """What an H100 answers, but for `values`; None takes a function away."""
    told = {
        "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,
        "nvmlDeviceGetPowerUsage": 650_000,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetClockInfo": {pynvml.NVML_CLOCK_SM: 1755, pynvml.NVML_CLOCK_MEM: 2619},
        "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonSwPowerCap,
        "nvmlDeviceGetTemperature": {pynvml.NVML_TEMPERATURE_GPU: 61},
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=40 * 2**30),
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=98, memory=55),
        "nvmlDeviceGetJpgUtilization": [12, 167000],
        "nvmlDeviceGetDecoderUtilization": [3, 167000],
        "nvmlDeviceGetTotalEccErrors": 0,
        "nvmlDeviceGetRemappedRows": (1, 0, 0, 0),
        "nvmlDeviceGetFieldValues": {
            pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: 1000,
            pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: 2000,
        },
        "nvmlDeviceGetPcieThroughput": {
            pynvml.NVML_PCIE_UTIL_TX_BYTES: 300,
            pynvml.NVML_PCIE_UTIL_RX_BYTES: 400,
        },
    } | values
    gpm = {
        pynvml.NVML_GPM_METRIC_SM_UTIL: 91.0,
        pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: 47.0,
        pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: 38.0,
        pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC: 5.0,
        pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC: 6.0,
        pynvml.NVML_GPM_METRIC_NVJPG_0_UTIL: 80.0,
        pynvml.NVML_GPM_METRIC_NVJPG_0_UTIL + 1: 40.0,
    }
    told = {name: value for name, value in told.items() if value is not None}
    return Card(UUIDS[number], BUS_IDS[number], values=told, gpm=gpm)


class Recorded:
    """In place of the module; `missing` are names that an older one had not."""

    def __init__(self, *cards: Card, missing: Sequence[str] = (), error: int = 0) -> None:
        self.cards, self._missing, self._error = cards, missing, error
        self.num_open = self.num_samples = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in self._missing:
            raise AttributeError(name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(name)
        real = getattr(pynvml, name)
        if not name.startswith("nvmlDeviceGet"):
            assert not inspect.isfunction(real), f"{name} is not played back"
            return real  # a constant, a structure or an error
        signature = inspect.signature(real)

        def call(*arguments: Any) -> Any:
            card, *rest = signature.bind(*arguments).args
            told = card.answer(name)
            return told[rest[0]] if isinstance(told, dict) else told

        return call

    def nvmlInit(self) -> None:
        if self._error:
            raise pynvml.NVMLError(self._error)
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def _find(self, **key: str) -> Card:
        ((name, value),) = key.items()
        for card in self.cards:
            if getattr(card, name) == value:
                return card
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        return self._find(uuid=uuid.removeprefix("GPU-"))

    def nvmlDeviceGetHandleByPciBusId(self, pciBusId: str) -> Card:
        return self._find(bus_id=pciBusId)

    def nvmlDeviceGetUUID(self, handle: Card) -> str:
        return "GPU-" + handle.uuid

    def nvmlDeviceGetName(self, handle: Card) -> str:
        return handle.name

    def nvmlDeviceGetFieldValues(self, handle: Card, fieldIds: Any) -> Any:
        told = handle.answer("nvmlDeviceGetFieldValues")
        values = (pynvml.c_nvmlFieldValue_t * len(fieldIds))()
        for each, (number, scope) in zip(values, fieldIds, strict=True):
            each.fieldId, each.scopeId = number, scope
            each.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
            each.nvmlReturn = pynvml.NVML_SUCCESS if number in told else 3
            each.value.ullVal = told.get(number, 0)
        return values

    # ---- GPM -------------------------------------------------------------------------------------

    def nvmlGpmQueryDeviceSupport(self, device: Card) -> Any:
        return SimpleNamespace(isSupportedDevice=int(device.gpm is not None))

    def nvmlGpmSampleAlloc(self) -> Any:
        self.num_samples += 1
        target = pynvml.struct_c_nvmlGpmSample_t()
        return ctypes.pointer(target)

    def nvmlGpmSampleFree(self, gpmSample: Any) -> None:
        self.num_samples -= 1

    def nvmlGpmSampleGet(self, device: Card, gpmSample: Any) -> Any:
        device.called["nvmlGpmSampleGet"] += 1
        self._asked = device
        return gpmSample

    def nvmlGpmMetricsGet(self, metricsGet: Any) -> Any:
        assert metricsGet.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        assert metricsGet.sample1 and metricsGet.sample2
        told = self._asked.gpm or {}
        for metric in metricsGet.metrics[: metricsGet.numMetrics]:
            metric.nvmlReturn = pynvml.NVML_SUCCESS if metric.metricId in told else 3
            metric.value = told.get(metric.metricId, float("nan"))
        return metricsGet
