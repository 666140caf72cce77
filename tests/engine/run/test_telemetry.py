"""What a run's rows tell of its efficiency and of its node."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.benchmarks.faults.held_port import hold_port
from m3i_fast.config import TrainConfig
from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import Arithmetic, Capabilities, resolve_precision
from m3i_fast.engine.run import telemetry as run_telemetry
from m3i_fast.engine.run.telemetry import LogInterval, RunTelemetry, flatten
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.observe.sinks.prometheus import exported
from m3i_fast.observe.telemetry.sampler import Device
from m3i_fast.recipes import recipes
from tests.shared.engine.small_run import small_run
from tests.shared.observe.recorded_nvml import BUS_IDS, UUIDS, Recorded, hopper
from tests.shared.observe.sampled import SteppedClock
from tests.shared.observe.scraped import ROW, scrape

H100 = Capabilities(device="cuda", capability=(9, 0), cuda=(13, 0), te=True, torchao=True)
GPU = torch.device("cuda", 0)


def interval(seconds: float, num_images: float) -> LogInterval:
    return LogInterval(begin_s=1.0, end_s=1.0 + seconds, num_images=num_images, progress=0.5)


def choice(cfg: TrainConfig) -> Arithmetic:
    return resolve_precision(H100, gemm_shapes(cfg), cfg.precision, "auto")


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock(end_s=10.0)


@pytest.fixture
def node(clock: SteppedClock, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Two H100s of 300 W and 500 W, as torch and NVML tell of them."""

    def meter(watts: float) -> Callable[[], int]:
        return lambda: int(1000 * watts * clock.now_s)

    cards = [
        hopper(n, nvmlDeviceGetTotalEnergyConsumption=meter(w), nvmlDeviceGetTemperature={0: t})
        for n, w, t in ((0, 300, 50), (1, 500, 70))
    ]
    nvml = Recorded(*cards)
    found = [Device(*each) for each in zip(UUIDS, BUS_IDS, strict=True)]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(run_telemetry, "cuda_devices", lambda count: found[:count])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return nvml


def test_a_row_of_two_gpus(node: Recorded, clock: SteppedClock) -> None:
    before = set(threading.enumerate())
    cfg = replace(recipes()["m3i_vit_b"](), telemetry=TelemetryConfig(hz=10))
    told = RunTelemetry(cfg, World(GPU, size=2), choice(cfg), clock=clock)
    told.start()
    told.start()  # as after a rollback
    try:
        clock.wait()
        row = told.values(interval(7.0, num_images=1000))
    finally:
        told.stop()
    flops = without_sampling(step_flops(cfg, num_ranks=2, progress=0.5))
    tflop_s = flops.model / 512 * 1000 / 2 / 7.0 / 1e12
    assert row["efficiency/tflop_s"] == pytest.approx(tflop_s, rel=1e-3)
    assert row["efficiency/mfu"] == pytest.approx(tflop_s / 989, rel=1e-3)
    assert row["efficiency/hfu"] > row["efficiency/mfu"]
    assert row["efficiency/joule_per_image"] == pytest.approx(800 * 7.0 / 1000)
    assert row["gpu/power_w"] == 650 and row["gpu/temperature_c"] == 70
    assert row["gpu/memory_used_gib"] == 40 and row["gpu/tensor_percent"] == 47
    assert row["gpu/pcie_sent_gib_s"] == 5 / 1024 and row["gpu/nvlink_sent_gib_s"] == 0
    assert row["gpu/throttled"] == 0 and row["gpu/ecc_uncorrected"] == 0
    assert row["host/rss_gib"] > 0.05 and 0 <= row["host/cpu_percent"] <= 100
    assert {name for name in ROW if name.startswith("gpu/")} <= row.keys()  # the dashboard's
    assert all(isinstance(value, float | int) for value in row.values())
    left = set(threading.enumerate()) - before
    assert node.num_open == 0 and "telemetry" not in [thread.name for thread in left]


@pytest.mark.usefixtures("node")
def test_energy_and_rates_are_those_of_the_steps_alone(clock: SteppedClock) -> None:
    """Half of the interval was an evaluation."""
    cfg = replace(recipes()["m3i_vit_b"](), telemetry=TelemetryConfig(hz=10))
    told = RunTelemetry(cfg, World(GPU, size=2), choice(cfg), clock=clock)
    told.start()
    try:
        clock.wait()
        whole = interval(6.0, num_images=1000)
        part = replace(whole, left_out=((2.5, 5.5),))
        row, without = told.values(part), told.values(whole)
    finally:
        told.stop()
    assert row["efficiency/joule_per_image"] == pytest.approx(800 * 3.0 / 1000)
    assert row["efficiency/tflop_s"] == pytest.approx(2 * without["efficiency/tflop_s"], rel=1e-6)
    assert row["gpu/nvlink_sent_gib_s"] == without["gpu/nvlink_sent_gib_s"]


@pytest.mark.usefixtures("node")
def test_a_run_in_fp8_names_its_peaks() -> None:
    cfg = replace(recipes()["m3i_vit_h"](), precision="fp8_current")
    row = RunTelemetry(cfg, World(GPU), choice(cfg)).values(interval(2.0, 1000))
    assert row.keys() == {
        "efficiency/tflop_s",
        "efficiency/mfu_of_bf16_peak",
        "efficiency/hfu_of_bf16_peak",
        "efficiency/mfu_weighted",
    }
    assert row["efficiency/mfu_weighted"] < row["efficiency/mfu_of_bf16_peak"]


def test_a_card_that_is_not_known_is_said_once(
    node: Recorded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H20")
    cfg = recipes()["m3i_vit_b"]()
    told = RunTelemetry(cfg, World(GPU), choice(cfg))
    rows = [told.values(interval(2.0, 1000)) for _ in range(2)]
    assert all(row.keys() == {"efficiency/tflop_s"} for row in rows)
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "NVIDIA H20" in caplog.records[0].message


def test_a_teacher_of_unknown_size_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    cfg = recipes()["demo_milan"]()
    told = RunTelemetry(cfg, World(torch.device("cpu")), choice(cfg))
    assert told.values(interval(2.0, 100)) == told.values(interval(2.0, 100)) == {}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "frozen" in record.message


def test_other_ranks_sample_nothing(node: Recorded) -> None:
    cfg = recipes()["m3i_vit_b"]()
    told = RunTelemetry(cfg, World(GPU, rank=1, size=2), choice(cfg))
    told.start()
    assert node.num_open == 0
    told.stop()


def test_rates_and_units() -> None:
    def gauge(mean: float) -> dict[str, float]:
        return {"mean": mean, "min": 0, "max": 9e99, "p95": 9e99}

    card = {"uuid_hash": "x", "name": "y", "power_limit_w": 700, "throttle_reasons": ["gpu_idle"]}
    summary = {
        "gpus": [
            card | {"power_w": gauge(100), "nvlink_sent_bytes": 8 * 2**30, "ecc_corrected": 1},
            card | {"power_w": gauge(300), "nvlink_sent_bytes": 4 * 2**30, "ecc_corrected": 2},
        ],
        "host": {"rss_bytes": gauge(2**31), "disk_read_bytes": 2**30},
        "throttled": True,
        "num_samples": 3,
    }
    assert flatten(summary, 2.0) == {
        "gpu/power_w": 200,
        "gpu/nvlink_sent_gib_s": 3,
        "gpu/ecc_corrected": 3,
        "gpu/throttled": 1,
        "host/rss_gib": 2,
        "host/disk_read_gib_s": 0.5,
    }


def test_a_run_logs_them(dataset: Path, tmp_path: Path) -> None:
    cfg = small_run(dataset, num_steps=10, telemetry=TelemetryConfig(hz=10), device="cpu")
    threads = threading.active_count()
    Trainer(cfg, tmp_path / "run").train()
    assert threading.active_count() == threads
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    flops = without_sampling(step_flops(cfg)).model / cfg.data.batch_size
    for row in rows:
        expected = flops * row["throughput/img_s"] / 1e12
        assert row["efficiency/tflop_s"] == pytest.approx(expected)
        assert "efficiency/mfu" not in row  # no peak is published of a CPU
    assert any("host/rss_gib" in row for row in rows)


def test_a_resume_may_tell_something_else(dataset: Path, tmp_path: Path) -> None:
    cfg = small_run(dataset, num_steps=5, device="cpu", telemetry=TelemetryConfig(hz=0))
    Trainer(cfg, tmp_path / "run").train()
    assert not any(k.startswith("host/") for k in read_jsonl(tmp_path / "run/metrics.jsonl")[0])
    other = replace(cfg, telemetry=TelemetryConfig(hz=2))
    again = Trainer(other, tmp_path / "run", resume=True)
    assert again.step == 5
    again.train()


@pytest.fixture
def port() -> Iterator[int]:
    with hold_port() as held:
        yield held.getsockname()[1]


def test_a_run_is_scraped_while_it_lasts(dataset: Path, tmp_path: Path, port: int) -> None:
    telemetry = TelemetryConfig(hz=10, prometheus_port=port)
    cfg = small_run(dataset, num_steps=10, telemetry=telemetry, device="cpu")
    seen = []
    trainer = Trainer(cfg, tmp_path / "run", recipe="demo")
    trainer.train(lambda step, values: seen.append((step, values, scrape(port))))
    for step, values, found in seen:
        (sample,) = found["m3i_step"]
        assert sample.value == step
        assert sample.labels == {"run": "run", "recipe": "demo", "rank": "0"}
        (images,) = found["m3i_throughput_images_per_second"]
        assert images.value == pytest.approx(values["throughput/img_s"])
        of_a_gpu = ("gpu/", "memory/", "efficiency/mfu", "efficiency/hfu", "efficiency/joule")
        names = [name for name in ROW if not name.startswith((*of_a_gpu, "host/"))]
        assert {exported(name)[0] for name in names} <= found.keys()
    assert len(seen) == 2
    with pytest.raises(OSError):
        scrape(port)  # closed with the run


def test_a_port_in_use_is_told_before_the_run_begins(dataset: Path, tmp_path: Path) -> None:
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        telemetry = TelemetryConfig(prometheus_port=other.getsockname()[1])
        cfg = small_run(dataset, telemetry=telemetry, device="cpu")
        with pytest.raises(OSError, match=r"telemetry\.prometheus_port: expected a free port"):
            Trainer(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rate_that_is_none() -> None:
    with pytest.raises(ValueError, match="telemetry.hz: expected 0, or 0.1 to 10, got 20"):
        TelemetryConfig(hz=20)
