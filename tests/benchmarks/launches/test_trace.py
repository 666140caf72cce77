"""Traces of the null CUDA runtime: what their reader takes, refuses and adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.launches.trace import (
    lines_of,
    peak_device_bytes,
    read_trace,
    split_at_marks,
)


def record(kind: str, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "thread": 0, "device": 0, **values}


def launch(**values: Any) -> dict[str, Any]:
    shape = {"grid": [1, 1, 1], "block": [32, 1, 1], "shared": 0, "stream": 0, "architecture": 90}
    return record("launch", name="k", **shape, **values)


def copy(source: str, target: str, count: int, **values: Any) -> dict[str, Any]:
    ends = {"from": source, "to": target, "bytes": count, "stream": 3}
    return record("copy", call="cudaMemcpyAsync", **ends, **values)


TRACE = [
    record("allocate", side="device", bytes=100),
    record("mark", name="step 0"),
    launch(),
    launch(capture=7),
    record("library", library="cublas", call="cublasGemmEx", stream=0),
    record("replay", capture=7, nodes=4, launches=3, stream=0),
    copy("pageable", "device", 8, line="a.py:1"),
    copy("pinned", "device", 5),
    copy("pinned", "device", 6),
    record("allocate", side="device", bytes=50),
    record("allocate", side="pinned", bytes=1000),
    record("free", side="device", bytes=100),
    record("mark", name="between"),
    record("wait", call="cudaStreamSynchronize", stream=0, line="b.py:2"),
    record("wait", call="cudaStreamSynchronize", stream=0),
    record("allocate", side="device", bytes=70),
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def test_a_step_is_what_follows_its_mark(tmp_path: Path) -> None:
    records = list(read_trace(write(tmp_path / "trace.jsonl", TRACE)))
    assert records == TRACE
    start, step, between = split_at_marks(records)
    assert [start.name, step.name, between.name] == ["start", "step 0", "between"]
    # A captured launch runs at its replay, and the host starts the replay as one.
    assert (step.num_launches, step.host_launches) == (1 + 1 + 3, 1 + 1 + 1)
    assert step.copies == {("pageable", "device"): 1, ("pinned", "device"): 2}
    assert step.copied_bytes == {("pageable", "device"): 8, ("pinned", "device"): 11}
    assert step.streams == {0, 3}
    assert not step.of("wait")
    assert lines_of(between.of("wait")) == {"b.py:2": 1, "?": 1}


def test_the_peak_is_of_one_device_and_of_its_own_memory(tmp_path: Path) -> None:
    assert peak_device_bytes(TRACE) == 150
    elsewhere = [{**each, "device": 1} for each in TRACE]
    assert peak_device_bytes([*TRACE, *elsewhere]) == 150


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("no json", "expected a record, got 'no json"),
        ('{"kind": "dance"}', "expected a record"),
        (json.dumps(record("free", side="device")), "expected the keys"),
        (json.dumps(record("free", side="device", bytes=1, weight=2)), r"\['weight'\] differ"),
    ],
)
def test_what_is_no_record_is_refused_with_its_line(broken: str, told: str, tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.jsonl", TRACE[:2])
    trace.write_text(trace.read_text() + broken + "\n")
    with pytest.raises(ValueError, match=rf"trace\.jsonl:3: .*{told}"):
        list(read_trace(trace))


def test_what_follows_a_mark_of_the_backward_pass_has_its_line_on_that_thread() -> None:
    records = [
        record("mark", name="step 0"),
        launch(),
        {**record("mark", name="backward of a.py:3"), "thread": 1},
        launch(),
        {**launch(), "thread": 1},
        {**launch(line="b.py:1"), "thread": 1},
        {**record("allocate", side="device", bytes=1), "thread": 1},
        record("mark", name="between"),
        {**launch(), "thread": 1},
    ]
    _, step, between = split_at_marks(records)
    assert lines_of(step.of("launch")) == {"?": 2, "backward of a.py:3": 1, "b.py:1": 1}
    assert lines_of(between.of("launch")) == {"?": 1}
    assert lines_of(step.of("allocate")) == {"?": 1}
