"""Doctor, telemetry and ledger on the null device: NVML's answers, and whose they are."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.launches.trace import read_trace
from scripts.null_cuda import environment, program

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "build" / "null"


def on_null(*command: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        program(*command),
        env=environment(LIBRARIES, **settings),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("card", "name", "code"),
    [
        ("a100", "NVIDIA A100-SXM4-80GB (sm_80)", "NVIDIA A100-SXM4-80GB takes sm_80"),
        ("h100", "NVIDIA H100 80GB HBM3 (sm_90)", "NVIDIA H100 80GB HBM3 takes sm_90a"),
    ],
)
def test_the_doctor_examines_the_card(card: str, name: str, code: str) -> None:
    """Its error is true: kernels that compute nothing are wrong. DALI is not there: a warning."""
    done = on_null("-m", "m3i_fast.cli", "doctor", "--json", card=card)
    assert done.returncode == 1, done.stderr
    found = {each["subject"]: each for each in json.loads(done.stdout)["findings"]}
    assert found["GPU"]["level"] == "ok" and found["GPU"]["detail"].startswith(name)
    assert found["torch"]["level"] == "ok", found["torch"]
    assert re.search(r"cuDNN 9\d{4}, .*FlashAttention 2", found["torch"]["detail"])
    assert found["_C"]["level"] == "ok"
    assert code in found["_C_cuda"]["detail"]
    assert found["_C_cuda"]["detail"].endswith("wrong results")
    assert found["NVML"] == {
        "subject": "NVML", "level": "ok", "detail": "driver null, 1 GPUs", "fix": "",
    }  # fmt: skip
    errors = {subject for subject, each in found.items() if each["level"] == "error"}
    assert errors == {"_C_cuda"}
    assert found["DALI"]["level"] == "warning"


SAMPLE = """
import json, time
from m3i_fast.observe.telemetry.sampler import TelemetrySampler
with TelemetrySampler(10) as sampler:
    begin = time.monotonic()
    time.sleep(0.3)
    print(json.dumps(sampler.summary(begin, time.monotonic())))
"""


def test_the_telemetry_reads_constants_that_say_null(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    done = on_null("-c", SAMPLE, card="h100", devices=2, trace=trace)
    assert done.returncode == 0, done.stderr
    cards: list[dict[str, Any]] = json.loads(done.stdout)["gpus"]
    assert len({card["uuid_hash"] for card in cards}) == 2
    for card in cards:
        assert card["name"] == "NVIDIA H100 80GB HBM3 (null)"
        assert card["power_w"]["mean"] == 1 and card["power_limit_w"] == 2
        assert card["sm_clock_mhz"]["max"] == 1 and card["gpu_percent"]["max"] == 0
        assert card["throttle_reasons"] == ["gpu_idle"]
    refused = {r["call"] for r in read_trace(trace) if r["kind"] == "unsupported"}
    assert "nvmlDeviceGetTotalEnergyConsumption" in refused
    assert not refused & {"nvmlDeviceGetPowerUsage", "nvmlDeviceGetHandleByUUID"}


APPEND = """
import sys
from pathlib import Path
from m3i_fast.benchmarks.ledger.rows import append_row
append_row("gaussian", {"device": "cuda"}, folder=Path(sys.argv[1]) if sys.argv[1:] else None)
"""


def test_a_row_of_the_null_device_never_enters_the_ledger(tmp_path: Path) -> None:
    """Neither by default nor where the ledger is named; elsewhere it tells what measured it."""
    ledger = ROOT / "benchmarks" / "results"
    before = (ledger / "gaussian.jsonl").read_bytes()
    for named in ((), (str(ledger),), (str(ROOT / "cuda" / ".." / "benchmarks" / "results"),)):
        refused = on_null("-c", APPEND, *named, card="h100")
        assert refused.returncode == 1
        assert "got figures of the null CUDA runtime" in refused.stderr
    assert (ledger / "gaussian.jsonl").read_bytes() == before
    done = on_null("-c", APPEND, str(tmp_path), card="h100")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "gaussian.jsonl").read_text())
    name = "NVIDIA H100 80GB HBM3 (null CUDA runtime)"
    assert row["machine"]["gpu"] == row["machine"]["cards"][0]["name"] == name
    assert row["machine_class"].startswith(f"1 x {name}")
