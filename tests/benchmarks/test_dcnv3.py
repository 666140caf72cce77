"""The benchmark of dcnv3 runs, compares equal outputs and records what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m3i_fast.benchmarks import dcnv3, harness
from m3i_fast.benchmarks.dcnv3 import Config, Size
from m3i_fast.ops import reference

SMALL = Size(batch_size=2, height=5, width=6, channels=8, groups=2)


def test_rows_are_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dcnv3, "CPU_SIZES", (SMALL,))
    monkeypatch.setattr(harness, "results_dir", lambda: tmp_path)
    dcnv3.main(["--device", "cpu", "--num-samples", "2"])
    rows = [row["figures"] for row in harness.read_rows("dcnv3")]
    assert [(row["dtype"], row["pass"]) for row in rows] == [
        (dtype, kind)
        for dtype in ("float32", "bfloat16")
        for kind in ("forward", "forward+backward")
    ]
    assert set(rows[0]["timings"]) == {"m3i_fast", "grid_sample", "torchvision", "copy"}
    assert set(rows[1]["timings"]) == {"m3i_fast", "grid_sample", "torchvision"}
    milliseconds = rows[0]["timings"]["m3i_fast"]["median_ms"]
    num_bytes = 2 * 5 * 6 * 4 * (8 + 8 + 2 * 9 * 3)
    assert rows[0]["gb_s"] == pytest.approx(num_bytes / milliseconds / 1e6)
    shown = capsys.readouterr().out
    assert "2x5x6x8 / 2, float32, 1.5 px, forward" in shown and str(tmp_path) in shown

    dcnv3.main(["--device", "cpu", "--num-samples", "2", "--no-record"])
    assert len(list(harness.read_rows("dcnv3"))) == 4


def test_all_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config(device="cpu")
    dcnv3.make_functions(cfg, SMALL, torch.float32, 10.0, backward=True)
    monkeypatch.setattr(dcnv3, "by_grid_sample", lambda x, *_, **__: torch.zeros_like(x))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        dcnv3.make_functions(cfg, SMALL, torch.float32, 1.5, backward=False)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("softmax", [False, True])
def test_grid_sample_is_the_same_function(kernel_size: int, dilation: int, softmax: bool) -> None:
    points = kernel_size**2
    x, mask = torch.randn(2, 7, 5, 12), torch.randn(2, 7, 5, 3 * points)
    offset = 3 * torch.randn(2, 7, 5, 6 * points)
    geometry = {
        "kernel_size": kernel_size,
        "stride": 1,
        "padding": dilation * (kernel_size // 2),
        "dilation": dilation,
        "groups": 3,
        "offset_scale": 1.5,
        "softmax": softmax,
    }
    got = dcnv3.by_grid_sample(x, offset, mask, **geometry)  # type: ignore[arg-type]
    expected = reference.dcnv3(x, offset, mask, **geometry)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_gpu_runs_the_published_layers_near_and_far(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Config(device="cuda").rows
    assert len(rows) == len(dcnv3.GPU_SIZES) * 2 * 2
    assert {reach for _, _, reach in rows} == {1.5, 10.0}
    assert all(size.channels % size.groups == 0 for size, _, _ in rows)
    assert {size.channels // size.groups for size, _, _ in rows} == {16, 32}


def test_config_names_a_bad_field() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        Config(num_samples=0)
