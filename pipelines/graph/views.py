"""Views, crops of the decoded image, each with its box.

An image is [H, W, 3] uint8 ("HWC"), a view [3, S, S] uint8 ("CHW"), a box [5] float32
(y, x, height, width, flip) on the CPU.
"""

from __future__ import annotations

from m3i_fast.config.data import ViewConfig
from m3i_fast.pipelines.graph.colour_jitter import coin, photometric
from m3i_fast.pipelines.graph.dali import DataNode, dali_math, fn, types

INTERPOLATION = {"cubic": types.INTERP_CUBIC, "linear": types.INTERP_LINEAR}


def random_view(image: DataNode, size_hw: DataNode, cfg: ViewConfig) -> tuple[DataNode, DataNode]:
    """Crop `image` at random: (view, box); size_hw: [2], its upright height and width."""
    anchor, extent = fn.random_crop_generator(
        size_hw, random_area=cfg.scale, random_aspect_ratio=cfg.ratio
    )
    flip = coin(cfg.flip_probability)
    anchor, extent = fn.cast(anchor, dtype=types.FLOAT), fn.cast(extent, dtype=types.FLOAT)
    view = cut(image, anchor, extent, cfg.size, cfg.interpolation)
    return to_chw(photometric(view, cfg), flip), box(anchor, extent, flip)


def random_views(
    image: DataNode,
    size_hw: DataNode,
    cfg: ViewConfig,
    other: tuple[DataNode, DataNode] | None = None,
) -> tuple[list[DataNode], list[DataNode]]:
    """Crop `cfg.count` random views of a decoded image; returns views and boxes.

    other: another decoded image and its height and width, of which the second view is cut.
    """
    sources = [(image, size_hw)] * cfg.count
    if other is not None:
        sources[1] = other
    pairs = [random_view(*source, cfg) for source in sources]
    return [view for view, _ in pairs], [view_box for _, view_box in pairs]


def centre_view(image: DataNode, size_hw: DataNode, size: int) -> tuple[DataNode, DataNode]:
    """Crop the largest centred square: (view, box), as resizing the shorter side and a crop."""
    size_hw = fn.cast(size_hw, dtype=types.FLOAT)
    side = fn.reductions.min(size_hw)
    anchor = dali_math.floor((size_hw - side) / 2.0)
    extent = fn.stack(side, side)
    flip = fn.cast(side * 0.0, dtype=types.FLOAT)
    return to_chw(cut(image, anchor, extent, size, "cubic"), flip), box(anchor, extent, flip)


def cut(
    image: DataNode, anchor: DataNode, extent: DataNode, size: int, interpolation: str
) -> DataNode:
    """Resize a region to [size, size, 3] in one antialiased kernel, without cropping first."""
    return fn.resize(
        image,
        size=[size, size],
        roi_start=anchor,
        roi_end=anchor + extent,
        interp_type=INTERPOLATION[interpolation],
        antialias=True,
    )


def to_chw(view: DataNode, flip: DataNode) -> DataNode:
    """Transpose a view to [3, S, S] uint8, mirrored where `flip` is 1."""
    return fn.crop_mirror_normalize(
        view,
        dtype=types.UINT8,
        output_layout="CHW",
        mirror=fn.cast(flip, dtype=types.INT32),
        mean=[0.0, 0.0, 0.0],
        std=[1.0, 1.0, 1.0],
    )


def box(anchor: DataNode, extent: DataNode, flip: DataNode) -> DataNode:
    """Join (y, x), (height, width) and flip to a box [5]."""
    return fn.cat(anchor, extent, fn.reshape(flip, shape=[1]))
