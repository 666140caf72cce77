"""The benchmark of InternImage compares equal models and records what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m3i_fast.benchmarks import harness, internimage
from m3i_fast.benchmarks.internimage import Config, grid_sample_core
from m3i_fast.ops import reference

ARGUMENTS = ["--device", "cpu", "--sizes", "demo", "--image-size", "32", "--num-samples", "2"]


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_other_core_is_the_same_function(kernel_size: int, dilation: int) -> None:
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
        "softmax": True,
    }
    got = grid_sample_core(x, offset, mask, **geometry)  # type: ignore[arg-type]
    expected = reference.dcnv3(x, offset, mask, **geometry)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_rows_are_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "results_dir", lambda: tmp_path)
    internimage.main([*ARGUMENTS, "--batch-size", "2"])
    (row,) = harness.read_rows("internimage")
    figures = row["figures"]
    assert set(figures["timings"]) == {"m3i_fast", "grid_sample", "no sampling", "op alone"}
    milliseconds = figures["timings"]["m3i_fast"]["median_ms"]
    assert figures["images_per_s"]["m3i_fast"] == pytest.approx(2000 / milliseconds)
    assert figures["op_share"] == pytest.approx(
        figures["timings"]["op alone"]["median_ms"] / milliseconds
    )
    shown = capsys.readouterr().out
    assert "DEMO" in shown and str(tmp_path) in shown

    internimage.main([*ARGUMENTS, "--train", "--no-record"])
    assert len(list(harness.read_rows("internimage"))) == 1


def test_other_outputs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internimage, "grid_sample_core", lambda x, *_, **__: 2 * x)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        internimage.make_functions(Config(device="cpu", image_size=32), "demo")


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("image_size", 48)])
def test_config_names_a_bad_field(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {value}"):
        Config(**{field: value})  # type: ignore[arg-type]
