"""What is read, and how it becomes training batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from m3i_fast.config.fields import (
    BATCHES,
    NUMBERS,
    SIDES,
    THREADS,
    TOKENS,
    Checked,
    Conflict,
    unmet,
)

BackendName = Literal["auto", "dali", "torch"]
AffinityName = Literal["auto", "none"]
DEFAULT_LANES = 1920  # divided by most numbers of ranks that nodes of 8 and of 4 GPUs make
CACHE_DIR = Path("~/.cache/m3i-fast")  # of what is fetched from object storage, or on its way there
MAX_PIXELS = 89_478_485  # Pillow's limit (PIL.Image.MAX_IMAGE_PIXELS), past which it warns of bombs
BUCKET_FIELDS = ("buffer_gib", "cache_dir", "cache_gib", "reads_in_flight", "fetch_ahead")
"""Fields of `LoaderConfig` that say how object storage is read, whatever is read of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig(Checked):
    """Cut views of one size out of the decoded image, and change their colours."""

    count: Annotated[int, range(1, 65)] = 2
    """Views per image."""
    size: Annotated[int, SIDES] = 224
    """Side of the square view in pixels."""
    size_range: Annotated[tuple[int, int] | None, SIDES] = None
    """Of views of any shape (data.max_tokens_per_batch): least and most side, in pixels, of the
    square of which a view has the area. Each view draws a whole number of patches between; its
    aspect is its crop's. None: size alone."""
    scale: tuple[float, float] = (0.3, 1.0)
    """Range of the crop's area as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height."""
    interpolation: Literal["cubic", "linear"] = "cubic"
    """Resampling filter, antialiased either way."""
    flip_probability: float = 0.5
    """Probability of the horizontal mirror."""
    jitter_probability: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed at all."""
    brightness: float = 0.4
    """Half-width of the brightness factor's uniform range about 1."""
    contrast: float = 0.4
    """Half-width of the uniform range about 1 of the contrast factor, about the view's mean
    gray."""
    saturation: float = 0.2
    """Half-width of the saturation factor's uniform range about 1."""
    hue: float = 0.1
    """Half-width of the hue rotation's uniform range about 0, in turns (0.5 is half a turn)."""
    gray_probability: float = 0.2
    """Probability that all colour is removed."""
    blur_probability: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels of the view."""
    blur_kernel_size: Annotated[int | None, range(1, 1024)] = None
    """Side of the blur's kernel in pixels of the view, odd, its half less than the view; None: a
    tenth of the view's side, made odd (23 at 224)."""
    solarize_probability: float = 0.0
    """Probability that values of 128 and more are inverted."""

    def conflicts(self) -> Iterator[Conflict]:
        low, high = self.scale
        inside = "0 < low <= high <= 1 (the box stays inside the image)"
        yield from unmet(
            self,
            scale=(0 < low <= high <= 1, inside),
            ratio=(0 < self.ratio[0] <= self.ratio[1], "0 < low <= high"),
            blur_sigma=(0 < self.blur_sigma[0] <= self.blur_sigma[1], "0 < low <= high"),
            blur_kernel_size=(
                self.blur_kernel % 2 == 1 and self.blur_kernel // 2 < self.size,
                "an odd number, of which half is less than the view's size",
            ),
            hue=(0 <= self.hue <= 0.5, "turns in [0, 0.5]"),
            size_range=(self.sizes[0] <= self.sizes[1], "least <= most"),
        )
        for name in (f.name for f in fields(self) if f.name.endswith("_probability")):
            yield from unmet(self, **{name: (self._is_share(name), "a probability in [0, 1]")})
        for name in ("brightness", "contrast", "saturation"):
            yield from unmet(self, **{name: (self._is_share(name), "a value in [0, 1]")})

    def _is_share(self, name: str) -> bool:
        return 0 <= getattr(self, name) <= 1

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the least and the most side of the square of which a view has the area."""
        return self.size_range or (self.size, self.size)

    @property
    def blur_kernel(self) -> int:
        """Return the side of the blur's kernel in pixels of the view, odd."""
        return self.size // 10 | 1 if self.blur_kernel_size is None else self.blur_kernel_size

    @property
    def jitters(self) -> bool:
        """Return whether brightness, contrast, saturation or hue can change."""
        return self.jitter_probability > 0 and any(
            (self.brightness, self.contrast, self.saturation, self.hue)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixturePart:
    """A data set of a mixture, and how often an input comes of it."""

    path: Path
    split: str
    weight: float
    """Above 0, in any unit."""

    @classmethod
    def parse(cls, text: str) -> MixturePart:
        """Read DIR:SPLIT:WEIGHT; the directory may be a URL. Raises ValueError for another."""
        path, _, rest = text.rpartition(":")
        path, _, split = path.rpartition(":")
        try:
            weight = float(rest)
        except ValueError:
            weight = math.nan
        if not (path and split and 0 < weight < math.inf):
            raise ValueError(f"expected DIR:SPLIT:WEIGHT with a weight above 0, got {text!r}")
        return cls(path=Path(path), split=split, weight=weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig(Checked):
    """Choose the data that are read, and how they become training batches."""

    path: Path = Path("data/openmoji")
    """Dataset directory (with manifest.json and shards), or its URL."""
    split: str = "train"
    """Split of the dataset."""
    mixture: tuple[str, ...] = ()
    """Data sets to train on in place of path and split, each as DIR:SPLIT:WEIGHT, for instance
    s3://bucket/photos:train:0.7 data/drawings:train:0.3: every input comes of one of them, so often
    as its weight says. They have one tokenizer; classes of the same name are one class."""
    batch_size: Annotated[int, BATCHES] = 64
    """Samples per batch on each rank."""
    max_tokens_per_batch: Annotated[int, TOKENS] = 0
    """Patches of a batch on each rank, of all views of all its samples, in the place of batch_size:
    views then have any size and aspect (`size_range`), and a batch has as many samples as fit.
    0: squares of one size, batch_size samples of them."""
    global_views: ViewConfig = field(default_factory=ViewConfig)
    """Views at the full size."""
    local_views: ViewConfig | None = None
    """Smaller views; none: no such views."""
    seed: Annotated[int, NUMBERS] = 0
    """Seed of the samples' order, the crops and the colours."""
    num_threads: Annotated[int, THREADS] = 1
    """Threads that read, decode and cut views; results do not depend on their number."""
    backend: BackendName = "auto"
    """What reads and decodes: DALI, or torch with Pillow, which runs everywhere, slower. On a CPU
    their batches are equal; on a GPU DALI decodes with another library, to other pixels. auto takes
    DALI where it works, and otherwise says why not."""
    affinity: AffinityName = "auto"
    """Where those threads run, and those that fetch: auto takes the cores of the NUMA node that the
    rank's GPU is attached to, or deals ranks without a GPU to the nodes, of the cores that the
    process may use. A machine of one node is left as it is. none leaves it to the system, as the
    thread that hands requests to obstore and obstore's own are in any case."""
    prefetch: Annotated[int, range(1, 65)] = 2
    """Batches prepared ahead, at most 64: each is held decoded."""
    max_pixels: Annotated[int, range(1, 2**31)] = MAX_PIXELS
    """Most pixels of a picture, height times width; larger ones are refused by name before they are
    decoded. The default is Pillow's MAX_IMAGE_PIXELS."""
    strict: bool = False
    """End the run, with the sample's name, at the first one that cannot be used."""
    max_skipped: Annotated[int, range(0, 2**31)] = 100
    """Samples of a rank that may turn out to be corrupt while training: each is named in the run's
    skipped_samples.jsonl, and another sample takes its place. One more ends the run."""
    augment: bool = True
    """Cut random crops and change their colours. False: every view is the largest centred square of
    the picture, at every step the same, whatever the views' scale, mirror and colours say."""
    max_regions: Annotated[int, range(1, 257)] = 4
    """Regions that a view has, of each column of regions: a batch has room for so many of every
    view. Where a view shows more, so many are drawn anew at every step."""
    min_region_share: float = 0.5
    """Share of a region's area that a view has to show; others are left out of that view. At a
    half, what a text tells is more often in the view than not."""
    alternates: bool = True
    """Cut the second global view out of another picture of the same thing, where the data set has
    such (data styles --alternates): one of them, drawn anew at every step."""
    hw_decoder_load: float | None = None
    """Share of a batch's JPEGs that the GPU's hardware decoder takes, its CUDA cores the rest; None
    leaves it to DALI. It applies to decoding on a GPU alone."""
    exact_decode: bool = False
    """Decode all JPEGs of a GPU by its CUDA cores: the hardware decoder rounds otherwise, and which
    pictures of a batch it takes depends on the batch. So a picture has the same pixels in any
    batch, as it has on a CPU without this. The hardware decoder is idle then."""
    lanes: Annotated[int | None, range(1, 2**16 + 1)] = None
    """Sequences of clumps (up to 128 neighbours of a shard) that a run reads side by side from
    object storage; a multiple of the number of ranks. It is part of the order of the samples. None:
    1,920, or fewer where there are few clumps; each data set of a mixture has its own. A folder has
    no lanes: all its samples are shuffled."""
    clumps_a_window: Annotated[int, range(1, 65)] = 1
    """Clumps of a lane that are shuffled together; part of the order, as the lanes are."""
    buffer_gib: float = 32.0
    """Most GiB of clumps that one rank holds open, of all data sets together: of each of its lanes
    one window, those that are fetched ahead, and those whose samples are in the last batches."""
    cache_dir: Path = CACHE_DIR
    """Folder of the files that are fetched from object storage, best on a local NVMe; the processes
    of a node share it."""
    cache_gib: float = 64.0
    """Most GiB of clumps in cache_dir, of all processes together; those used longest ago are
    removed. At the end of an epoch each lane holds two windows for some batches. Manifest and
    tables of samples come on top."""
    reads_in_flight: Annotated[int, range(1, 2**10 + 1)] = 32
    """Reads from object storage at the same time, on each rank."""
    fetch_ahead: Annotated[int, range(1, 2**24 + 1)] = 8192
    """Samples of a rank whose clumps are fetched before their turn."""

    def conflicts(self) -> Iterator[Conflict]:
        load = self.hw_decoder_load
        yield from unmet(
            self, hw_decoder_load=(load is None or 0 <= load <= 1, "a share in [0, 1]")
        )
        yield from unmet(
            self, min_region_share=(0 < self.min_region_share <= 1, "a share in (0, 1]")
        )
        if self.exact_decode and load:
            yield "hw_decoder_load", f"expected None or 0 with exact_decode, got {load}"
        yield from self._shape_conflicts()
        for name in ("buffer_gib", "cache_gib"):
            yield from unmet(self, **{name: (getattr(self, name) > 0, "more than 0")})
        for text in self.mixture:
            try:
                MixturePart.parse(text)
            except ValueError as error:
                yield "mixture", str(error)

    def _shape_conflicts(self) -> Iterator[Conflict]:
        """Yield a range of sizes without a budget of tokens."""
        for name in ("global_views", "local_views"):
            view = getattr(self, name)
            if not self.any_shape and view is not None and view.size_range is not None:
                yield (
                    f"{name}.size_range",
                    "expected none without data.max_tokens_per_batch, with which views have any "
                    f"size, got {view.size_range}",
                )

    @property
    def any_shape(self) -> bool:
        """Return whether views have any size and aspect, and batches a budget of tokens."""
        return self.max_tokens_per_batch > 0

    def patch_sides(self, patch_size: int) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Return the least and most patches along a side of global views, and of local ones."""
        low, high = self.global_views.sizes
        of_global = low // patch_size, high // patch_size
        if self.local_views is None:
            return of_global, None
        low, high = self.local_views.sizes
        return of_global, (low // patch_size, high // patch_size)

    @property
    def decoder_load(self) -> float | None:
        """Return the share that the hardware decoder is given: none of it by exact_decode."""
        return 0.0 if self.exact_decode else self.hw_decoder_load

    @property
    def mixture_parts(self) -> tuple[MixturePart, ...]:
        """Return the data sets of the mixture, none where path and split are read."""
        return tuple(map(MixturePart.parse, self.mixture))

    @property
    def members(self) -> tuple[LoaderConfig, ...]:
        """Return the config of each data set of the mixture, as of one that is read alone."""
        return tuple(
            replace(self, path=part.path, split=part.split, mixture=())
            for part in self.mixture_parts
        )

    def with_bucket_fields_of(self, other: LoaderConfig) -> LoaderConfig:
        """Return this config with another's cache and limits of reading from object storage."""
        return replace(self, **{name: getattr(other, name) for name in BUCKET_FIELDS})
