"""The benchmark of dcnv3 runs, compares equal outputs and records what it shows."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ops import dcnv3, dcnv3_others
from m3i_fast.benchmarks.ops.dcnv3 import Config, Size
from m3i_fast.ops import reference

SMALL = Size(batch_size=2, height=5, width=6, channels=8, groups=2)


def test_rows_are_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dcnv3, "CPU_SIZES", (SMALL,))
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    dcnv3.main(["--device", "cpu", "--num-samples", "2"])
    rows = [row["figures"] for row in ledger.read_rows("dcnv3")]
    assert [(row["dtype"], row["pass"]) for row in rows] == [
        (dtype, kind)
        for dtype in ("float32", "bfloat16", "float16")
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
    assert len(list(ledger.read_rows("dcnv3"))) == 6


def test_all_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config(device="cpu")
    dcnv3.make_functions(cfg, SMALL, torch.float32, 10.0, backward=True)
    monkeypatch.setattr(
        dcnv3_others, "dcnv3_by_grid_sample", lambda x, *_, **__: torch.zeros_like(x)
    )
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        dcnv3.make_functions(cfg, SMALL, torch.float32, 1.5, backward=False)


# Modules of the official extensions' names and signatures, computed by our reference: to build the
# extensions themselves takes a GPU.
DCNV3 = """
import torch
from m3i_fast.ops import reference

def dcnv3_forward(input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
                  dilation_h, dilation_w, group, group_channels, offset_scale, im2col_step,
                  remove_center):
    step = min(input.shape[0], im2col_step)
    if input.dtype == torch.bfloat16:
        raise RuntimeError(f"not implemented for {input.dtype}")
    assert input.shape[0] % step == 0 and group * group_channels == input.shape[3]
    return reference.dcnv3(
        input, offset, mask, kernel_size=(kernel_h, kernel_w), stride=(stride_h, stride_w),
        padding=(pad_h, pad_w), dilation=(dilation_h, dilation_w), groups=group,
        offset_scale=offset_scale, remove_center=remove_center)

def dcnv3_backward(input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
                   dilation_h, dilation_w, group, group_channels, offset_scale, grad_output,
                   im2col_step, remove_center):
    geometry = kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
    leaves = [tensor.detach().requires_grad_() for tensor in (input, offset, mask)]
    with torch.enable_grad():
        out = dcnv3_forward(
            *leaves, *geometry, group, group_channels, offset_scale, im2col_step, remove_center)
    return torch.autograd.grad(out, leaves, grad_output)
"""
DCNV4 = """
import math
import torch
import DCNv3

class DCNv4Function:
    @staticmethod
    def apply(input, offset_mask, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h,
              dilation_w, group, group_channels, offset_scale, im2col_step, remove_center):
        points = kernel_h * kernel_w - remove_center
        assert offset_mask.shape[3] == math.ceil(group * points * 3 / 8) * 8
        used = offset_mask[..., : group * points * 3].unflatten(3, (group, points * 3))
        offset, mask = used.split([points * 2, points], dim=4)
        return DCNv3.dcnv3_forward(
            input, offset.flatten(3), mask.flatten(3), kernel_h, kernel_w, stride_h, stride_w,
            pad_h, pad_w, dilation_h, dilation_w, group, group_channels, offset_scale, im2col_step,
            remove_center)
"""


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "DCNv3.py").write_text(DCNV3)
    (tmp_path / "DCNv4").mkdir()
    (tmp_path / "DCNv4" / "functions.py").write_text(DCNV4)
    monkeypatch.syspath_prepend(tmp_path)
    dcnv3_others.find.cache_clear()
    yield
    dcnv3_others.find.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("DCNv3", "DCNv4"))]:
        del sys.modules[name]


@pytest.mark.usefixtures("official")
@pytest.mark.parametrize("backward", [False, True])
def test_official_extensions_are_timed_where_installed(
    backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """make_functions compares their outputs with ours; here their gradients too."""
    cfg = Config(device="cpu")
    functions = dcnv3.make_functions(cfg, SMALL, torch.float32, 1.5, backward)
    assert {"m3i_fast", "DCNv3", "DCNv4"} <= set(functions)
    x, offset, mask = (torch.randn(2, 5, 6, channels) for channels in (8, 36, 18))
    expected = gradients(partial(reference.dcnv3, **SMALL_GEOMETRY), x, offset, mask)
    found = dcnv3_others.others(2)
    official = gradients(found["DCNv3"].function, x, offset, mask)
    torch.testing.assert_close(official, expected)
    both = gradients(found["DCNv4"].function, *dcnv3_others.dcnv4_inputs(x, offset, mask, 2))
    torch.testing.assert_close(both[0], expected[0])
    dcnv3.make_functions(cfg, SMALL, torch.bfloat16, 1.5, backward)
    assert "DCNv3 in torch.bfloat16 left out: not implemented for torch.bfloat16" in caplog.text


SMALL_GEOMETRY = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 2}


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


def test_what_is_not_installed_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    dcnv3_others.find.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [set(dcnv3_others.others(2)) for _ in range(2)]
    assert found == [{"grid_sample", "torchvision"}] * 2
    assert caplog.messages == [
        "DCNv3 left out: No module named 'DCNv3'",
        "DCNv4 left out: No module named 'DCNv4'",
    ]


def test_without_arguments_tyro_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where only torch and rich are installed."""
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "m3i_fast.flags", raising=False)
    monkeypatch.setattr(sys, "argv", ["dcnv3"])
    assert read_command(Config, "dcnv3", None) == read_command(Config, "dcnv3", []) == Config()
    with pytest.raises(ImportError, match="tyro"):
        read_command(Config, "dcnv3", ["--device", "cpu"])


def test_a_gpu_runs_the_published_layers_near_and_far(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Config(device="cuda").rows
    assert len(rows) == len(dcnv3.GPU_SIZES) * 2 * 2
    assert {reach for _, _, reach in rows} == {1.5, 10.0}
    assert all(size.channels % size.groups == 0 for size, _, _ in rows)
    assert {size.channels // size.groups for size, _, _ in rows} == {16, 32}


def test_config_names_a_bad_field() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        Config(num_samples=0)
