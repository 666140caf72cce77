"""A row of a run, and what Prometheus reads of it over HTTP."""

from __future__ import annotations

from typing import Any
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

GPU = [
    "power_w", "sm_clock_mhz", "temperature_c", "memory_used_gib", "throttled", "sm_percent",
    "tensor_percent", "dram_percent", "jpeg_percent", "nvlink_sent_gib_s", "pcie_received_gib_s",
]  # fmt: skip
# tests/engine/run/test_telemetry.py has a run log these.
ROW = {
    "loss/intra": 2.5,
    "loss/total": 4.0,
    "monitor/target_rank": 17.0,
    "time/data_ms": 12.0,
    "time/backward_ms": 250.0,
    "optim/grad_norm": 0.5,
    "guard/skipped": 0.0,
    "throughput/img_s": 900.0,
    "memory/peak_gib": 2.0,
    "efficiency/tflop_s": 300.0,
    "efficiency/mfu": 0.3,
    "efficiency/hfu": 0.4,
    "efficiency/mfu_of_bf16_peak": 0.5,
    "efficiency/mfu_weighted": 0.35,
    "efficiency/joule_per_image": 0.25,
    "host/cpu_percent": 50.0,
    "host/process_cpu_percent": 150.0,
    "host/rss_gib": 1.5,
    **{f"gpu/{name}": 1.0 for name in GPU},
}
LOOPBACK = "127.0.0.1"


def scrape(port: int, host: str = LOOPBACK) -> dict[str, list[Any]]:
    with urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {f.name: list(f.samples) for f in text_string_to_metric_families(text)}
