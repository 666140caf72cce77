"""A run's rows over HTTP, read by Prometheus's own parser; the dashboard asks for what is there."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from m3i_fast.benchmarks.faults.held_port import hold_port
from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.observe.sinks.live import LiveSinks, expect_live_sinks, open_live_sinks
from m3i_fast.observe.sinks.prometheus import PrometheusSink, expect_free, exported
from tests.shared.observe.scraped import LOOPBACK, ROW, scrape

ROOT = Path(__file__).resolve().parents[3]
LABELS = {"run": "demo", "recipe": "demo_clip", "rank": "0"}


@pytest.fixture
def port() -> Iterator[int]:
    with hold_port() as held:
        yield held.getsockname()[1]


@pytest.fixture
def sink(port: int) -> Iterator[PrometheusSink]:
    sink = PrometheusSink(LOOPBACK, port, **{**LABELS, "rank": 0})  # type: ignore[arg-type]
    yield sink
    sink.close()


def test_rows_are_scraped_in_base_units(sink: PrometheusSink, port: int) -> None:
    assert scrape(port) == {}
    sink.log(20, ROW)
    sink.log(40, ROW | {"loss/total": 3.0})
    found = scrape(port)
    assert all(LABELS.items() <= s.labels.items() for samples in found.values() for s in samples)
    alone = {name: samples[0].value for name, samples in found.items() if len(samples) == 1}
    assert alone["m3i_step"] == 40 and alone["m3i_throughput_images_per_second"] == 900
    assert alone["m3i_efficiency_flops_per_second"] == 3e14
    assert alone["m3i_efficiency_joules_per_image"] == 0.25
    assert alone["m3i_gpu_power_watts"] == 1 and alone["m3i_gpu_sm_clock_hertz"] == 1e6
    assert alone["m3i_gpu_memory_used_bytes"] == 2**30 and alone["m3i_gpu_tensor_ratio"] == 0.01
    assert alone["m3i_gpu_nvlink_sent_bytes_per_second"] == 2**30
    assert alone["m3i_memory_peak_bytes"] == 2**31 and alone["m3i_host_process_cpu_ratio"] == 1.5
    assert alone["m3i_gpu_temperature_celsius"] == 1 and alone["m3i_efficiency_mfu"] == 0.3
    stages = {s.labels["stage"]: s.value for s in found["m3i_stage_seconds"]}
    assert stages == {"data": 0.012, "backward": 0.25}
    assert {s.labels["term"]: s.value for s in found["m3i_loss"]} == {"intra": 2.5, "total": 3.0}


def test_what_a_row_lacks_is_not_served_on(sink: PrometheusSink, port: int) -> None:
    """A rank whose GPU is not read any more has no power; an evaluation comes now and then."""
    sink.log(20, ROW | {"gpu/power_w": 300.0, "loss/intra": 2.0, "loss/total": 3.0})
    sink.log(20, {"evaluate/knn_top1": 0.5, "evaluate/seconds": 3.0})
    assert {"m3i_gpu_power_watts", "m3i_evaluate_knn_top1"} <= set(scrape(port))
    sink.log(40, {"loss/total": 2.5, "throughput/img_s": 900.0})
    found = {name: samples for name, samples in scrape(port).items() if samples}
    assert set(found) == {
        *("m3i_step", "m3i_logged_timestamp_seconds", "m3i_loss"),
        *("m3i_throughput_images_per_second", "m3i_evaluate_knn_top1", "m3i_evaluate_seconds"),
    }
    assert {s.labels["term"]: s.value for s in found["m3i_loss"]} == {"total": 2.5}
    sink.log(60, ROW | {"gpu/power_w": 200.0})
    assert scrape(port)["m3i_gpu_power_watts"][0].value == 200


def test_names_are_prometheus_s() -> None:
    for name in [*ROW, "loss/a.b-c", "odd group/x-y.z"]:
        metric, label, _, _ = exported(name)
        assert re.fullmatch(r"[a-z_][a-z0-9_]*", metric), name
        assert not metric.endswith(("_ms", "_gib", "_percent", "_total"))
        assert (label is None) == (name.partition("/")[0] not in ("loss", "monitor", "time"))


def listens_at(port: int) -> set[str]:
    """Addresses of this network namespace at which the kernel has a listener of this port."""
    found = set()
    for version, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{version}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            words, local_port = local.split(":")
            if state == "0A" and int(local_port, 16) == port:  # TCP_LISTEN
                raw = bytes.fromhex(words)  # words of four bytes, each in the host's order
                swapped = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                found.add(socket.inet_ntop(family, swapped))
    return found


def _open(cfg: TelemetryConfig) -> LiveSinks:
    expect_live_sinks(cfg)
    return open_live_sinks(cfg, Path("runs/demo"), recipe="demo", rank=0, config={})


def test_only_this_machine_is_served_unless_an_address_is_given(port: int) -> None:
    with closing(_open(TelemetryConfig(prometheus_port=port))):
        assert listens_at(port) == {LOOPBACK}


@pytest.mark.parametrize(
    ("address", "host"), [("::1", "[::1]"), ("0.0.0.0", LOOPBACK), ("::", "[::1]")]
)
def test_the_address_that_is_given_is_served(address: str, host: str, port: int) -> None:
    with closing(_open(TelemetryConfig(prometheus_port=port, prometheus_address=address))) as sink:
        assert listens_at(port) == {address}
        sink.log(20, ROW)
        assert scrape(port, host)["m3i_step"][0].value == 20


@pytest.mark.parametrize("address", ["", "localhost:9400", "[::1]", "all", "127.0.0"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    told = re.escape("telemetry.prometheus_address: expected an IPv4 or IPv6 address")
    with pytest.raises(ValueError, match=f"{told}.*got {re.escape(repr(address))}"):
        TelemetryConfig(prometheus_address=address)


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])  # of documentation: nobody's
def test_an_address_of_another_machine_is_named(address: str, port: int) -> None:
    told = rf"telemetry\.prometheus_address: expected an address of this machine.*{address} and"
    with pytest.raises(OSError, match=told):
        expect_free(address, port)
    with pytest.raises(OSError, match=told):
        PrometheusSink(address, port, run="b", recipe="", rank=0)


def test_a_port_in_use_is_named(sink: PrometheusSink, port: int) -> None:
    told = (
        rf"telemetry\.prometheus_port: expected a free port of {LOOPBACK}, got {port}, which is in "
        "use; set"
    )
    with pytest.raises(OSError, match=told):
        expect_free(LOOPBACK, port)
    with pytest.raises(OSError, match=told):
        PrometheusSink(LOOPBACK, port, run="b", recipe="", rank=0)


def test_a_port_is_free_again(port: int) -> None:
    for _ in range(2):
        expect_free(LOOPBACK, port)
        PrometheusSink(LOOPBACK, port, run="b", recipe="", rank=0).close()


def test_the_dashboard_asks_for_what_the_endpoint_has(sink: PrometheusSink, port: int) -> None:
    sink.log(20, ROW)
    found = scrape(port)
    dashboard = json.loads((ROOT / "launch" / "grafana.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    queries += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["name"] == "run"]
    asked = {name for query in queries for name in re.findall(r"m3i_\w+", query)}
    assert len(asked) > 20 and asked <= found.keys()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            (metric,) = re.findall(r"m3i_\w+", target["expr"])
            known = found[metric][0].labels.keys()
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known
    places = [tuple(panel["gridPos"][k] for k in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
