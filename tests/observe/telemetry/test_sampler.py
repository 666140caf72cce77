"""TelemetrySampler of recorded cards, of this machine, and of machines that have neither."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import math
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil
import pynvml
import pytest

from m3i_fast.observe.telemetry import nvml as gpu
from m3i_fast.observe.telemetry.host import Host
from m3i_fast.observe.telemetry.nvml import Gpu, reason_names, uuid_hash
from m3i_fast.observe.telemetry.sampler import Device, TelemetrySampler, cuda_devices
from tests.shared.observe.recorded_nvml import BUS_IDS, UUIDS, Card, Recorded, counting, hopper
from tests.shared.observe.sampled import DEVICES, SteppedClock, sampled

TOLD = "nvmlDeviceGet"


def test_a_hopper() -> None:
    nvml = Recorded(hopper(0))
    found, _ = sampled(nvml)
    (card,) = found["gpus"]
    assert card["uuid_hash"] == uuid_hash("GPU-" + UUIDS[0]) and UUIDS[0] not in json.dumps(found)
    assert card["name"] == "NVIDIA H100 80GB HBM3"
    assert card["power_w"] == {"mean": 650, "min": 650, "max": 650, "p95": 650}
    assert card["power_limit_w"] == 700 and card["sm_clock_mhz"]["mean"] == 1755
    assert card["memory_clock_mhz"]["max"] == 2619 and card["temperature_c"]["max"] == 61
    assert card["memory_used_bytes"]["max"] == 40 * 2**30
    assert card["gpu_percent"]["mean"] == 98 and card["memory_percent"]["mean"] == 55
    assert card["tensor_percent"]["mean"] == 47 and card["sm_percent"]["mean"] == 91
    assert card["dram_percent"]["mean"] == 38 and "sm_occupancy_percent" not in card
    assert card["pcie_sent_byte_s"]["mean"] == 5 * 2**20  # GPM's, which waits for nothing
    assert "nvmlDeviceGetPcieThroughput" not in nvml.cards[0].called
    # The first sample has but the driver's figure of the JPEG engines, then GPM's two tell.
    assert card["num_jpeg_engines"] == 2 and card["jpeg_percent"]["max"] == 60
    assert card["jpeg_percent"]["min"] == 12 and card["decoder_percent"]["mean"] == 3
    assert card["remapped_rows"] == 1 and card["remapping_pending"] == 0
    assert card["ecc_corrected"] == card["nvlink_sent_bytes"] == card["energy_j"] == 0
    assert card["throttle_reasons"] == ["sw_power_cap"] and not found["throttled"]
    assert nvml.num_open == 0 and nvml.num_samples == 0  # all that was opened is closed


@cache
def fields_of_a_hopper() -> frozenset[str]:
    found, _ = sampled(Recorded(hopper(0)), num_samples=2)
    return frozenset(found["gpus"][0])


@pytest.mark.parametrize("name", [n for n in hopper(0).values if n.startswith(TOLD)])
def test_a_field_is_missing_by_itself_and_not_asked_for_again(name: str) -> None:
    nvml = Recorded(hopper(0, **{name: None}))
    found, _ = sampled(nvml)
    ours = found["gpus"][0]
    gone = fields_of_a_hopper() - set(ours)
    at_most = 2 if "Clock" in name or "Ecc" in name else 1  # asked for two of each
    assert nvml.cards[0].called[name] <= at_most
    if name in ("nvmlDeviceGetPcieThroughput", "nvmlDeviceGetJpgUtilization"):
        assert not gone  # GPM tells
    elif name == "nvmlDeviceGetTotalEnergyConsumption":
        assert not gone and ours["energy_j"] > 0  # of the power
    else:
        assert gone and len(gone) <= 3


def test_a_library_older_than_its_functions() -> None:
    older = [n for n in dir(pynvml) if "Gpm" in n or n.endswith(("EventReasons", "RemappedRows"))]
    told = pynvml.nvmlClocksEventReasonHwSlowdown
    card = hopper(0, nvmlDeviceGetCurrentClocksThrottleReasons=told)
    found, _ = sampled(Recorded(card, missing=older))
    (card_,) = found["gpus"]
    assert card_["throttle_reasons"] == ["hw_slowdown"] and found["throttled"]
    assert card_["pcie_sent_byte_s"]["mean"] == 300e3  # asked for, as there is no GPM
    assert "tensor_percent" not in card_ and "remapped_rows" not in card_
    assert card_["jpeg_percent"]["max"] == 12


def test_a_driver_older_than_the_new_name_of_the_reasons() -> None:
    missing = pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    card = hopper(
        0,
        nvmlDeviceGetCurrentClocksEventReasons=missing,
        nvmlDeviceGetCurrentClocksThrottleReasons=pynvml.nvmlClocksThrottleReasonGpuIdle,
    )
    found, _ = sampled(Recorded(card), num_samples=2)
    assert found["gpus"][0]["throttle_reasons"] == ["gpu_idle"] and not found["throttled"]


def test_an_error_of_a_moment_leaves_out_one_sample() -> None:
    lost = pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
    card = hopper(0, nvmlDeviceGetPowerUsage=counting([100_000, lost, 300_000]))
    found, _ = sampled(Recorded(card), num_samples=4)
    assert found["gpus"][0]["power_w"]["min"] == 100 and found["gpus"][0]["power_w"]["max"] == 300


@pytest.mark.parametrize("reason", sorted(gpu.THROTTLING))
def test_reasons_that_throttle(reason: str) -> None:
    (bit,) = (bit for bit, name in gpu.REASONS.items() if name == reason)
    card = hopper(0, nvmlDeviceGetCurrentClocksEventReasons=counting([0x4, 0x4 | bit, 0x1]))
    found, _ = sampled(Recorded(card), num_samples=3)
    assert found["throttled"]  # though it was seen but once
    assert set(found["gpus"][0]["throttle_reasons"]) == {"gpu_idle", "sw_power_cap", reason}


def test_cards_are_told_by_uuid_or_bus_and_not_by_number() -> None:
    """CUDA's order is the other way round, and its second card's UUID is not NVML's."""
    cards = hopper(0, nvmlDeviceGetPowerUsage=100_000), hopper(1, nvmlDeviceGetPowerUsage=200_000)
    of_other_kind = Device("33c7b3aa-0000-4000-8000-000000000003", BUS_IDS[0])
    found, _ = sampled(Recorded(*cards), devices=[DEVICES[1], of_other_kind], num_samples=2)
    assert [card["power_w"]["mean"] for card in found["gpus"]] == [200, 100]
    hidden, _ = sampled(Recorded(*cards), devices=[DEVICES[1]], num_samples=2)
    assert [card["power_w"]["mean"] for card in hidden["gpus"]] == [200]


def test_energy_is_the_sum_of_the_cards() -> None:
    rates = 300.0, 500.0
    clock = SteppedClock(end_s=10.0)

    def meter(watts: float) -> Any:
        return lambda: int(1000 * watts * clock.now_s)

    cards = [hopper(n, nvmlDeviceGetTotalEnergyConsumption=meter(w)) for n, w in enumerate(rates)]
    with TelemetrySampler(10.0, Recorded(*cards), devices=DEVICES, clock=clock) as telemetry:
        clock.wait()
    found = telemetry.summary(1.3, 8.3)
    energies = [card["energy_j"] for card in found["gpus"]]
    assert energies == pytest.approx([7 * w for w in rates])
    assert found["energy_j"] == pytest.approx(sum(energies))


def test_energy_is_not_told_where_a_card_hides_it() -> None:
    silent = hopper(1, nvmlDeviceGetTotalEnergyConsumption=None, nvmlDeviceGetPowerUsage=None)
    found, _ = sampled(Recorded(hopper(0), silent), devices=DEVICES, num_samples=3)
    assert found["energy_j"] is None and found["gpus"][0]["energy_j"] == 0


def test_a_window_has_its_own_samples() -> None:
    found, telemetry = sampled(Recorded(hopper(0)))
    nothing = telemetry.summary(1000.0, 1001.0)
    assert found["num_samples"] >= 3 and nothing["num_samples"] == 0
    assert nothing["gpus"][0].keys() == {"uuid_hash", "name"} and nothing["host"] == {}
    assert nothing["energy_j"] is None and not nothing["throttled"]


def test_without_a_gpu_the_host_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found, _ = sampled(None, devices=[])
    assert found["gpus"] == [] and found["energy_j"] is None
    assert "cpu_percent" in found["host"] and found["host"]["rss_bytes"]["min"] > 50 * 2**20
    assert [r.message for r in caplog.records if "no GPU" in r.message] and len(caplog.records) == 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_host_counts_this_process_and_its_children() -> None:
    """A child that holds 200 MiB, and uses half a second of a core when told to."""
    program = """
import time
x = bytearray(200 * 2**20)
print(1, flush=True)
input()
ends = time.process_time() + 0.5
while time.process_time() < ends: pass
print(2, flush=True)
input()
"""
    child, now_s = subprocess.Popen([sys.executable, "-c", program], stdin=PIPE, stdout=PIPE), 0.0
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == b"1\n"
    both = psutil.Process(), psutil.Process(child.pid)

    def used_s() -> float:
        return sum(t.user + t.system for t in (process.cpu_times() for process in both))

    try:
        used = [used_s()]
        host = Host(lambda: now_s)
        host.read()
        used.append(used_s())
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"2\n"
        used.append(used_s())
        now_s = 10.0
        found = host.read()
        used.append(used_s())
    finally:
        child.kill()
        child.communicate()
    assert found["rss_bytes"] - Host().read()["rss_bytes"] > 190 * 2**20
    least, most = 10 * (used[2] - used[1]), 10 * (used[3] - used[0])  # percent of the clock's 10 s
    assert least > 4.5  # the kernel counts hundredths of a second
    assert least - 1e-6 <= found["process_cpu_percent"] <= most + 1e-6


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, 9, 999])
def test_nvml_that_does_not_start(error: int, caplog: pytest.LogCaptureFixture) -> None:
    found, _ = sampled(Recorded(error=error), num_samples=2)
    assert found["gpus"] == [] and found["host"]["rss_bytes"]["mean"] > 0
    (warning,) = (r.message for r in caplog.records if r.levelno == logging.WARNING)
    assert "no figures of the GPUs" in warning


def test_a_card_that_nvml_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    unknown = Device("77c7b3aa-0000-4000-8000-000000000007", None)
    found, _ = sampled(Recorded(hopper(0)), devices=[unknown, DEVICES[0]], num_samples=2)
    assert len(found["gpus"]) == 1 and "77c7b3aa" in caplog.text


def test_an_error_in_the_thread_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def spoil() -> None:
        raise RuntimeError("spoilt")

    card = hopper(0, nvmlDeviceGetPowerUsage=counting([100_000, spoil]))
    card.values["nvmlDeviceGetTemperature"] = counting([{0: 50}, {}])  # KeyError, no NVMLError
    with TelemetrySampler(10.0, Recorded(card), devices=DEVICES[:1]) as telemetry:
        assert telemetry._thread is not None
        telemetry._thread.join(60)
        assert not telemetry._thread.is_alive()
    found = telemetry.summary(0.0, math.inf)
    assert found["num_samples"] == 1 and found["gpus"][0]["power_w"]["mean"] == 100
    assert len([r for r in caplog.records if "ended by an error" in r.message]) == 1


def test_the_thread_ends_with_its_context() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), TelemetrySampler(2.0, devices=[]) as telemetry:
        assert threading.active_count() == before + 1
        raise KeyError
    assert threading.active_count() == before and telemetry.cpu_s > 0


@pytest.mark.parametrize("hz", [0.0, 0.01, 11.0, float("nan")])
def test_a_rate_that_is_none(hz: float) -> None:
    with pytest.raises(ValueError, match="hz: expected 0.1 to 10"):
        TelemetrySampler(hz)


def test_no_cuda_has_no_devices() -> None:
    assert cuda_devices() == []


# ---- Against the real module ---------------------------------------------------------------------


def test_all_that_is_asked_of_nvml_is_in_the_real_module() -> None:
    names = set()
    for file in ("nvml.py", "sampler.py"):
        source = Path(inspect.getsourcefile(gpu) or "").with_name(file).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
                "nvml",
                "self._nvml",
            ):
                names.add(node.attr)
    assert len(names) > 40
    for name in names:
        assert hasattr(pynvml, name), name


def test_functions_of_the_recording_take_what_the_real_ones_take() -> None:
    ours = {name: f for name, f in vars(Recorded).items() if name.startswith("nvml")}
    assert len(ours) > 10
    for name, function in ours.items():
        _, *taken = inspect.signature(function).parameters
        assert taken == list(inspect.signature(getattr(pynvml, name)).parameters), name


def test_reasons_are_the_real_module_s() -> None:
    def snake(name: str) -> str:
        return "".join("_" + c.lower() if c.isupper() else c for c in name).removeprefix("_")

    prefix = "nvmlClocksEventReason"
    real = {
        getattr(pynvml, name): snake(name.removeprefix(prefix))
        for name in dir(pynvml)
        if name.startswith(prefix) and not name.endswith(("None", "All", "UserDefinedClocks"))
    }
    assert real == gpu.REASONS
    assert reason_names(0x8 | 0x1) == ["gpu_idle", "hw_slowdown"]


def test_the_real_module_without_a_driver(caplog: pytest.LogCaptureFixture) -> None:
    """Here there is none; where there is, the card of the recording is none of its."""
    found, _ = sampled(pynvml, num_samples=2)
    assert found["gpus"] == [] and "no figures of the GPU" in caplog.text


def test_a_card_that_tells_nothing() -> None:
    card = Card(UUIDS[0], BUS_IDS[0])
    found = Gpu(Recorded(card), card, "GPU-" + UUIDS[0])
    assert found.read(slow=True) == {}
    asked = sum(card.called.values())
    assert found.read(slow=True) == {} and sum(card.called.values()) == asked


def _kernels_counters() -> tuple[int, int]:
    """Bytes that the devices read, by sectors of 512, and that the interfaces received."""
    lines = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    sectors = [int(w[5]) for w in lines if Path("/sys/block", w[2], "device").exists()]
    interfaces = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    received = [int(rest.split()[0]) for name, rest in interfaces if name.strip() != "lo"]
    return 512 * sum(sectors), sum(received)


def test_disks_and_interfaces_count_once() -> None:
    """A volume's reads are its disks'; what a process sends itself comes from no network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as sender:
            taker, _ = server.accept()
            with taker:
                before, host = _kernels_counters(), Host()
                for _ in range(64):
                    sender.sendall(bytes(2**16))
                    taker.recv(2**16, socket.MSG_WAITALL)
                found, after = host.read(), _kernels_counters()
    for name, first, last in zip(
        ("disk_read_bytes", "network_received_bytes"), before, after, strict=True
    ):
        assert first <= found[name] <= last, name
