"""Inputs of a run's first step as the model sees them: pictures, their views, and what is encoded.

Legend: K images of an input, S side, g cells a side of the token grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from m3i_fast.config import TrainConfig
from m3i_fast.config.data import LoaderConfig
from m3i_fast.objectives.mixing import Mix, draw_mix
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.opened.open_few import open_few
from m3i_fast.report.data.gather import samples_of
from m3i_fast.report.inputs import MixedPair, Picture, SeenInput, ShownSample

NUM_SAMPLES = 8
_CANDIDATES = 32  # samples of which annotated ones are shown first

TOLD = {
    "joint": "Blocks of cells of {k} pictures share an input, and its tokens attend to everything.",
    "own_image": "Blocks of cells of {k} pictures share an input, and tokens attend within their "
    "own picture.",
    "masked": "{hidden} of the cells are hidden from the encoder.",
    "blend": "Each pixel is a weighted mean of two pictures, {share} of the first.",
    "none": "The encoder reads whole views.",
}


@dataclass(frozen=True, slots=True)
class DrawnInput:
    """An input of the page, and the cells that each of its pictures shows."""

    input: SeenInput
    shows: npt.NDArray[np.int64] | None  # [g, g], the picture that a cell shows, -1: none


def seen_inputs(cfg: TrainConfig, data: LoaderConfig, manifest: Manifest) -> list[DrawnInput]:
    """Return inputs of the first batch of a data set, those that are annotated first.

    data: of one data set. Views and masks are those that a run on one rank begins with. Raises as
    `Loader`.
    """
    images = cfg.objective.mixing.images_per_input
    opened = open_few(data)
    most = len(opened.table) // images * images
    number = max(min(_CANDIDATES // images * images, most), images)
    loader = Loader(
        replace(data, batch_size=number, num_threads=1, hw_decoder_load=None, exact_decode=False),
        images_per_input=images,
        opened=opened,
    )
    try:
        batch = next(loader)
        mix = draw_mix(
            cfg.objective.mixing,
            position=batch.position,
            first_position=0,
            grid=cfg.vision.grid,
            context_length=batch.token_ids.shape[1],
            seed=cfg.seed,
            step=0,
            num_steps=cfg.num_steps,
        )
        annotated = ((batch.num_tokens > 0).int() + (batch.label >= 0).int())[mix.members].sum(1)
        order = annotated.argsort(descending=True, stable=True).tolist()
        chosen = order[: max(NUM_SAMPLES // images, 1)]
        rows = [row for p in chosen for row in mix.members[p].tolist()]
        samples = dict(zip(rows, samples_of(data, manifest, batch, rows, opened), strict=True))
        return [_input(cfg, batch, mix, p, samples) for p in chosen]
    finally:
        loader.close()


def _input(
    cfg: TrainConfig, batch: Batch, mix: Mix, p: int, samples: dict[int, ShownSample]
) -> DrawnInput:
    members = mix.members[p].tolist()
    views = [_picture(batch.global_views[0][row].numpy()) for row in members]
    mixing, grid = cfg.objective.mixing, cfg.vision.grid
    shows: npt.NDArray[np.int64] | None = None
    share = 1.0 if mix.share is None else float(mix.share[p])
    if mixing.divides_cells:
        shows = np.full(grid * grid, -1)
        for image in range(len(members)):
            shows[mix.token_index[image * mix.num_inputs + p].numpy()] = image
        shows = shows.reshape(grid, grid)
        if len(members) > 1:
            shows = np.where(shows < 0, 0, shows)  # what is left over shows the first picture
        encoded = _cells(views, shows)
    elif mixing.mode == "blend":
        mean = share * views[0].astype(np.float32) + (1 - share) * views[1]
        encoded = mean.round().astype(np.uint8)
    else:
        encoded = views[0]
    hidden = 0.0 if shows is None else float((shows < 0).mean())
    told = TOLD[mixing.mode].format(k=len(members), hidden=f"{hidden:.0%}", share=f"{share:.0%}")
    if cfg.data.any_shape:
        told += " Here they are squares; training takes each at the aspect of its region."
    shown = SeenInput(samples=[samples[row] for row in members], encoded=encoded, told=told)
    return DrawnInput(shown, shows)


def _cells(views: list[Picture], shows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Take each cell of the picture that it shows; what no picture shows is transparent."""
    cell = views[0].shape[0] // shows.shape[0]
    choice = shows.repeat(cell, 0).repeat(cell, 1)[..., None]
    taken = np.zeros_like(views[0])
    for image, view in enumerate(views):
        taken = np.where(choice == image, view, taken)
    if (shows >= 0).all():
        return taken
    alpha = np.where(choice >= 0, 255, 0).astype(np.uint8)
    return np.concatenate([taken, alpha], axis=-1)


def mixed_pair(cfg: TrainConfig, drawn: list[DrawnInput]) -> MixedPair | None:
    """Return the first input as the pair that explains M3I; None where another method trains.

    M3I is what predicts dense features of the same and of the other view from two pictures in one
    input.
    """
    dense = {t.view for t in cfg.objective.active_terms if t.target in ("features", "pixels")}
    first = drawn[0] if drawn else None
    is_explained = (
        first is not None
        and dense == {"same", "other"}
        and len(first.input.samples) == 2
        and cfg.objective.mixing.mode in ("joint", "own_image")
    )
    if not is_explained or first is None or first.shows is None:
        return None
    one, two = first.input.samples
    return MixedPair(
        originals=(one.picture, two.picture),
        view_a=(one.views[0].picture, two.views[0].picture),
        view_b=(one.views[1].picture, two.views[1].picture),
        boxes_a=np.stack([_box(one, 0), _box(two, 0)]),
        boxes_b=np.stack([_box(one, 1), _box(two, 1)]),
        mask=first.shows == 0,
        mixed=first.input.encoded,
        captions=(one.caption, two.caption),
        categories=(one.category, two.category),
    )


def _box(sample: ShownSample, view: int) -> npt.NDArray[np.float32]:  # [5]
    """Return the region of a view in pixels of the shown picture, which may be smaller."""
    shown = sample.views[view]
    height = sample.picture.shape[0] / sample.size[0]
    width = sample.picture.shape[1] / sample.size[1]
    box = [shown.y * height, shown.x * width, shown.height * height, shown.width * width]
    return np.array([*box, shown.is_mirrored], np.float32)


def _picture(view: npt.NDArray[np.uint8]) -> Picture:  # [3, S, S] -> [S, S, 3]
    return np.ascontiguousarray(view.transpose(1, 2, 0))
