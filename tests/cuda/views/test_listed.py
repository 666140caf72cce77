"""Pictures that are given each by itself, as DALI has them, make the views of tensors."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from m3i_fast.ops.views import make_views
from tests.shared.cuda import emulator
from tests.shared.ops.views_cases import Case, group, make


def test_listed_pictures_make_the_views_of_tensors() -> None:
    blur = {"blur_kernel_size": 3}
    case = Case(
        pictures=[[(20, 31)], [(25, 30)], [(7, 9)]],
        groups=[group(16, **blur), group(9, interpolation="linear", **blur)],
    )
    pixels, offset, image_size, params = make(case)
    expected = make_views(pixels, offset, image_size, params, views=case.specs)

    pictures, images = [], []
    for begin, (height, width) in zip(
        offset[:, 0].tolist(), image_size[:, 0].tolist(), strict=True
    ):
        stride = 3 * width + 5  # a row ends with bytes that are of no picture
        padded = torch.zeros(height * stride, dtype=torch.uint8)
        rows = padded.view(height, stride)[:, : 3 * width]
        rows.copy_(pixels[begin : begin + 3 * height * width].view(height, 3 * width))
        pictures.append(emulator.guarded(padded[:-5]))
        images.append([pictures[-1].data_ptr(), height | width << 32, stride])
    listed = emulator.guarded(torch.tensor(images, dtype=torch.int64))

    sources = [emulator.CUDA / "views/sm80/launch.cu", Path(__file__).with_name("listed.cu")]
    library = ctypes.CDLL(str(emulator.build_kernels(sources, include=[emulator.CUDA])))
    made = [emulator.guarded(torch.zeros_like(view)) for view in expected]
    on_device = [listed, emulator.guarded(params), *made]
    error = library.make_listed_views(*map(emulator.to_c, on_device), len(images), 16, 9)
    assert error == emulator.SUCCESS, emulator.last_report()
    assert all(map(torch.equal, made, expected))
