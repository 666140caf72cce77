"""Cut all views of decoded pictures: crops, resized and changed in their colours, by drawn numbers.

Legend: B samples of M pictures and V views each, S pixels on a side; of views of any size P pixels
along a side of a patch, T patches of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m3i_fast.config.data import ViewConfig
from m3i_fast.ops.library import m3i

# Columns of a view's parameters.
VIEW_PARAMS = (
    *("y", "x", "height", "width"),
    *("flip", "brightness", "contrast", "saturation", "hue", "order", "gray", "sigma", "solarize"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """Describe one view, as the kernels take it; `view_specs` makes it of a config."""

    size: int
    """Side of the view in pixels."""
    blur_kernel_size: int
    """Side of the blur's kernel in pixels of the view, odd."""
    cubic: bool
    """Whether the filter of the resize is bicubic; else it is bilinear. Both are antialiased."""
    distribution: tuple[float, ...]
    """How its parameters are drawn: the 15 numbers of ViewDistribution in cuda/views/params.h."""

    @property
    def filter(self) -> tuple[int, int]:
        """Return the blur kernel and 1 for bicubic, as the operator of patches takes them."""
        return self.blur_kernel_size, int(self.cubic)

    def geometry(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Return height, width, blur kernel and 1 for bicubic, as operators take them.

        height, width: of a view of other sides than `size`, whose blur kernel is no longer than its
        reflections allow.
        """
        height = self.size if height is None else height
        width = self.size if width is None else width
        blur = min(self.blur_kernel_size, 2 * min(height, width) - 1)
        return height, width, blur, int(self.cubic)


def view_specs(*groups: ViewConfig | None) -> tuple[ViewSpec, ...]:
    """Return the views of all groups, each group `count` times; None is a group of no views."""
    specs: list[ViewSpec] = []
    for cfg in groups:
        if cfg is None:
            continue
        spec = ViewSpec(
            size=cfg.size,
            blur_kernel_size=cfg.blur_kernel,
            cubic=cfg.interpolation == "cubic",
            distribution=(
                *(*cfg.scale, *cfg.ratio, cfg.flip_probability, cfg.jitter_probability),
                *(cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue),
                *(cfg.gray_probability, cfg.blur_probability, *cfg.blur_sigma),
                cfg.solarize_probability,
            ),
        )
        specs += [spec] * cfg.count
    return tuple(specs)


NUM_DISTRIBUTION = 15  # numbers of a view's distribution
NUM_GEOMETRY = 4  # of its geometry
MAX_SIDE = 16384  # pixels of a view


def _check(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int | None) -> None:
    """Check dtype and shape; None matches every extent."""
    torch._check(
        tensor.dtype == dtype, lambda: f"{name}: expected dtype {dtype}, got {tensor.dtype}"
    )
    extents = tuple(tensor.shape)
    expected = ", ".join("*" if extent is None else str(extent) for extent in shape)
    torch._check(
        len(extents) == len(shape)
        and all(want is None or want == got for want, got in zip(shape, extents, strict=True)),
        lambda: f"{name}: expected shape [{expected}], got {list(extents)}",
    )


def _check_pictures(name: str, pictures: int, num_views: int) -> None:
    torch._check(
        pictures == 1 or (pictures == 2 and num_views > 1),
        lambda: (
            f"{name}: expected one picture a sample, or two for two views and more, "
            f"got {pictures} for {num_views} views"
        ),
    )


@torch.library.register_fake("m3i::draw_views")
def _fake_draw(
    image_size: Tensor,  # [B, M, 2] int64
    position: Tensor,  # [B] int64
    seed: int,
    distribution: Sequence[float],  # [V * 15]
) -> Tensor:  # [B, V, 13] float32
    num_views = len(distribution) // NUM_DISTRIBUTION
    _check("position", position, torch.int64, None)
    _check("image_size", image_size, torch.int64, position.shape[0], None, 2)
    _check_pictures("image_size", image_size.shape[1], num_views)
    return image_size.new_empty(
        (position.shape[0], num_views, len(VIEW_PARAMS)), dtype=torch.float32
    )


@torch.library.register_fake("m3i::make_views")
def _fake_make(
    pixels: Tensor,  # [bytes] uint8
    offset: Tensor,  # [B, M] int64
    image_size: Tensor,  # [B, M, 2] int64
    params: Tensor,  # [B, V, 13] float32
    geometry: Sequence[int],  # [V * 4]
    num_threads: int,
) -> Tensor:  # [all bytes of the views] uint8
    num_views = len(geometry) // NUM_GEOMETRY
    _check("pixels", pixels, torch.uint8, None)
    _check("offset", offset, torch.int64, None, None)
    _check_pictures("offset", offset.shape[1], num_views)
    _check("image_size", image_size, torch.int64, *offset.shape, 2)
    _check("params", params, torch.float32, offset.shape[0], num_views, len(VIEW_PARAMS))
    sides = zip(geometry[::NUM_GEOMETRY], geometry[1::NUM_GEOMETRY], strict=True)
    return pixels.new_empty(offset.shape[0] * 3 * sum(height * width for height, width in sides))


@torch.library.register_fake("m3i::make_patches")
def _fake_patches(
    pixels: Tensor,  # [bytes] uint8
    offset: Tensor,  # [B, M] int64
    image_size: Tensor,  # [B, M, 2] int64
    params: Tensor,  # [B, V, 13] float32
    grids: Tensor,  # [B, V, 3] int64
    filters: Sequence[int],  # [V * 2]
    patch_size: int,
    lengths: Sequence[int],  # [V]
    num_threads: int,
) -> Tensor:  # [T of all views, 3 P P] uint8
    num_views = len(lengths)
    _check("pixels", pixels, torch.uint8, None)
    _check("offset", offset, torch.int64, None, None)
    _check_pictures("offset", offset.shape[1], num_views)
    _check("image_size", image_size, torch.int64, *offset.shape, 2)
    _check("params", params, torch.float32, offset.shape[0], num_views, len(VIEW_PARAMS))
    _check("grids", grids, torch.int64, offset.shape[0], num_views, 3)
    return pixels.new_empty(sum(lengths), 3 * patch_size**2)


def draw_views(
    image_size: Tensor,  # [B, M, 2] int64
    position: Tensor,  # [B] int64
    *,
    seed: int,
    views: Sequence[ViewSpec],
) -> Tensor:  # [B, V, 13] float32
    """Draw the parameters of all views, on the CPU.

    Row [b, v] depends on (seed, position[b], v), on the picture's size and on the distribution of
    view v, and on nothing else: not on the batch, the other views, threads or the machine. Its
    numbers are words of Philox-4x32-10 with the seed as the key and (position, view, block) as the
    counter.

    The distributions are torchvision's: `RandomResizedCrop.make_params` (ten attempts, then the
    largest crop about the centre), `RandomHorizontalFlip`, `RandomApply([ColorJitter])`,
    `RandomGrayscale`, `RandomApply([GaussianBlur])` and `RandomSolarize`. Columns are those of
    `VIEW_PARAMS`: the crop's y, x, height and width in whole pixels; flip, gray and solarize are 0
    or 1; brightness, contrast and saturation are factors, 1 where nothing changes; hue is in turns;
    order is the number of the permutation of these four among all 24, sorted; sigma is in pixels of
    the view, 0 for no blur.

    Args:
        image_size: height and width of each picture; contiguous. Where M is 2, view 1 is cut of the
            second picture, all others of the first.
        position: of each sample in the run, 0 or more; contiguous.
        seed: any int64.
        views: what `view_specs` returns.

    Raises:
        RuntimeError: an argument is not as described; the message names it, what was expected and
            what was given.
    """
    numbers = [number for view in views for number in view.distribution]
    return m3i.draw_views.default(image_size, position, seed, numbers)


def centre_squares(
    image_size: Tensor,  # [B, 2] int64
    num_views: int = 1,
) -> Tensor:  # [B, V, 13] float32
    """Return the parameters of views of the largest centred square, with nothing else changed.

    image_size: height and width of each picture; where a margin is odd, the smaller half is above
    or to the left.
    """
    side = image_size.amin(1, keepdim=True)
    corner = torch.div(image_size - side, 2, rounding_mode="floor")
    unchanged = image_size.new_tensor([0, 1, 1, 1, 0, 0, 0, 0, 0]).expand(len(image_size), -1)
    params = torch.cat([corner, side, side, unchanged], 1).float()
    return params[:, None].expand(-1, num_views, -1).contiguous()


def make_views(
    pixels: Tensor,  # [bytes] uint8
    offset: Tensor,  # [B, M] int64
    image_size: Tensor,  # [B, M, 2] int64
    params: Tensor,  # [B, V, 13] float32
    *,
    views: Sequence[ViewSpec],
    num_threads: int = 1,
) -> tuple[Tensor, ...]:  # V x [B, 3, S, S] uint8
    """Cut views out of decoded pictures by the parameters that `draw_views` drew.

    The steps are crop, antialiased resize, horizontal flip, brightness, contrast, saturation and
    hue in the row's order, grayscale, Gaussian blur and solarize at 128, each rounded to uint8 as
    `torchvision.transforms.v2.functional` does on uint8 tensors on a CPU with AVX2. All but the
    blur give its bits (contrast up to 256 pixels a side, past which torchvision's fp32 mean of the
    gray is rounded). The blur is separable and in fp32 throughout, where torchvision sums the
    products of a square kernel in an order of its own: at most one level apart, in fewer than one
    value of 10,000 of random bytes. Steps whose factor changes nothing are skipped.

    Every instruction set and any number of threads give the same bits. Not differentiable.

    Args:
        pixels: decoded pictures, each [height, width, 3], one after the other or anywhere in the
            buffer; contiguous.
        offset: first byte of each picture in `pixels`; contiguous. Where M is 2, view 1 is cut of
            the second picture, all others of the first.
        image_size: height and width of each picture; contiguous.
        params: as `draw_views` returns, or rows of one's own; contiguous.
        views: what `view_specs` returns; their distributions are not read.
        num_threads: threads that share the views, at least 1.

    Returns:
        The views, one tensor each, contiguous; they are parts of one buffer.

    Raises:
        RuntimeError: an argument is not as described, a picture does not lie in `pixels` or a crop
            not in its picture, or half of a view's blur kernel is not less than its side; the
            message names what is wrong, what was expected and what was given.
    """
    geometry = [number for view in views for number in view.geometry()]
    flat = m3i.make_views.default(pixels, offset, image_size, params, geometry, num_threads)
    batch = offset.shape[0]
    parts = flat.split([batch * 3 * view.size**2 for view in views])
    return tuple(
        part.view(batch, 3, view.size, view.size) for part, view in zip(parts, views, strict=True)
    )


def make_patches(
    pixels: Tensor,  # [bytes] uint8
    offset: Tensor,  # [B, M] int64
    image_size: Tensor,  # [B, M, 2] int64
    params: Tensor,  # [B, V, 13] float32
    grids: Tensor,  # [B, V, 2] int64, on the CPU
    *,
    views: Sequence[ViewSpec],
    patch_size: int,
    num_threads: int = 1,
) -> tuple[Tensor, ...]:  # V x [T, 3 P P] uint8
    """Cut views of any sides out of decoded pictures, as patches behind one another.

    Each is the view that `make_views` cuts of these parameters, of other sides than `size`; sigma
    stays in pixels of the view, whose blur kernel is no longer than its reflections allow. On CUDA
    one launch cuts all views of all samples; nothing is waited for.

    Args:
        pixels, offset, image_size, params, num_threads: as of `make_views`.
        grids: rows and columns of patches of each view, at least 1; on the CPU, since the shapes of
            what is returned depend on them.
        views: what `view_specs` returns; of each the filter and the blur kernel are read.
        patch_size: P, pixels along a side of a patch.

    Returns:
        The patches of each view, those of sample 0 first, row by row, as `cut_patches` has them;
        they are parts of one buffer.

    Raises:
        RuntimeError: as `make_views`.
        ValueError: grids are of another shape, or on another device than the CPU.
    """
    if grids.shape != (len(offset), len(views), 2):
        raise ValueError(
            f"grids: expected [{len(offset)}, {len(views)}, 2], got {list(grids.shape)}"
        )
    if grids.device.type != "cpu":
        raise ValueError(f"grids: expected a tensor on the CPU, got one on {grids.device}")
    _check_sides(grids * patch_size)
    patches = grids.prod(2)
    before = patches.cumsum(0) - patches
    placed = torch.cat([grids, before[..., None]], 2)  # [B, V, 3]
    if pixels.is_cuda:
        placed = placed.pin_memory().to(pixels.device, non_blocking=True)
    lengths = patches.sum(0).tolist()
    flat = m3i.make_patches.default(
        *(pixels, offset, image_size, params, placed),
        [number for view in views for number in view.filter],
        *(patch_size, lengths, num_threads),
    )
    return flat.split(lengths)


def _check_sides(sides: Tensor) -> None:  # [B, V, 2] int64
    """Check that each view has pixels, and no more than the kernels index."""
    wrong = ((sides < 1) | (sides > MAX_SIDE)).nonzero()
    if len(wrong):
        sample, view, side = wrong[0].tolist()
        raise RuntimeError(
            f"grids: view {view}: expected a size of 1 to {MAX_SIDE} pixels, got "
            f"{int(sides[sample, view, side])} of sample {sample}"
        )


def cut_patches(images: Tensor, size: int) -> Tensor:
    """Cut images into square patches, row by row: [..., 3, H, W] -> [..., N, 3 size size]."""
    pixels = images.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [..., 3, h, P, w, P]
    return pixels.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)
