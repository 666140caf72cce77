"""Inputs of the demo's page, gathered from a run, its data and its two encoders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.evaluation.dense.patch_pca import patch_pca
from m3i_fast.evaluation.retrieval.zero_shot import nearest, retrieval_ranks
from m3i_fast.json_files import read_json
from m3i_fast.objectives.mixing import draw_mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.manifest import Manifest, read_manifest
from m3i_fast.pipelines.dataset.tokenizer import Tokenizer
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from m3i_fast.report.inputs import (
    MixedPair,
    Nearest,
    PatchPca,
    Picture,
    ReportInputs,
    RetrievalRow,
)

NUM_CAPTIONS = 12
NUM_NEAREST = 5
NUM_PCA = 6


@dataclass(frozen=True, kw_only=True)
class EncodedPictures:
    """All held-out pictures, one a concept, with the features and embeddings of both encoders."""

    pictures: list[Picture]
    captions: list[str]
    tokens: dict[str, Tensor]  # who -> [M, N, C]
    image: dict[str, Tensor]  # who -> [M, E]
    text: dict[str, Tensor]  # who -> [M, E]


def gather(
    run: Path, cfg: TrainConfig, encoders: dict[str, MutualInformation], figures: dict[str, Any]
) -> ReportInputs:
    """Gather all inputs of the page.

    encoders: trained and untrained, in evaluation mode, on the CPU.
    """
    manifest = read_manifest(cfg.data.path)
    tokenizer = Tokenizer.from_info(manifest.tokenizer)
    heldout = _heldout(cfg, encoders, tokenizer)
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(len(heldout.captions), generator=rng).tolist()
    groups = torch.arange(len(heldout.captions))
    ranks = {
        who: retrieval_ranks(heldout.text[who], heldout.image[who], groups, groups)
        for who in encoders
    }
    best_first = ranks["trained"].argsort(stable=True)
    return ReportInputs(
        title="M3I in one stage: labels, captions and dense self-supervision",
        evaluation=figures,
        metrics=read_jsonl(run / "metrics.jsonl"),
        mixed_pair=_mixed_pair(cfg, manifest, tokenizer),
        retrieval=[
            _retrieval(heldout, row, {who: int(of[row]) for who, of in ranks.items()})
            for row in evenly(best_first, NUM_CAPTIONS).tolist()
        ],
        retrieval_choice=f"In even steps from the one that the trained encoder finds best to the "
        f"one that it finds worst of all {len(order)} held-out captions.",
        retrieval_ranks={who: of.tolist() for who, of in ranks.items()},
        patch_pca=_patch_pca(heldout, order[-NUM_PCA:], cfg.vision.grid),
        config=read_json(run / "config.json"),
        environment=read_json(run / "env.json"),
        attribution=manifest.attribution,
    )


@torch.no_grad()
def _heldout(
    cfg: TrainConfig, encoders: dict[str, MutualInformation], tokenizer: Tokenizer
) -> EncodedPictures:
    batches = list(
        evaluation_batches(
            cfg.data.path,
            "heldout",
            image_size=cfg.vision.image_size,
            batch_size=256,
            representatives_only=True,
        )
    )
    views = torch.cat([batch.global_views[0] for batch in batches])
    ids = torch.cat([batch.token_ids for batch in batches])
    counts = torch.cat([batch.num_tokens for batch in batches])
    tokens, image, text = {}, {}, {}
    for who, objective in encoders.items():
        embedded = [objective.embed_images(some) for some in views.split(256)]
        tokens[who] = torch.cat([t for t, _ in embedded])
        image[who] = torch.cat([e for _, e in embedded if e is not None])
        text[who] = objective.embed_captions(ids, counts)
    return EncodedPictures(
        pictures=[_picture(view) for view in views],
        captions=[tokenizer.decode(row.numpy()) for row in ids],
        tokens=tokens,
        image=image,
        text=text,
    )


def evenly(values: Tensor, number: int) -> Tensor:  # [N] -> [min(number, N)]
    """Return values at even steps, the first and the last among them."""
    return values[torch.linspace(0, len(values) - 1, min(number, len(values))).round().long()]


def _retrieval(heldout: EncodedPictures, row: int, rank_of: dict[str, int]) -> RetrievalRow:
    def retrieved(who: str) -> Nearest:
        query, gallery = heldout.text[who][row : row + 1], heldout.image[who]
        rows = nearest(query, gallery, k=NUM_NEAREST)[0].tolist()
        return Nearest(
            pictures=tuple(heldout.pictures[i] for i in rows),
            names=tuple(heldout.captions[i] for i in rows),
            right=rows.index(row) if row in rows else None,
            rank=rank_of[who],
        )

    return RetrievalRow(
        caption=heldout.captions[row],
        picture=heldout.pictures[row],
        trained=retrieved("trained"),
        untrained=retrieved("untrained"),
    )


def _patch_pca(heldout: EncodedPictures, rows: list[int], grid: int) -> list[PatchPca]:
    colours = {
        who: patch_pca(tokens[rows]).view(len(rows), grid, grid, 3).numpy()
        for who, tokens in heldout.tokens.items()
    }
    return [
        PatchPca(
            name=heldout.captions[row],
            picture=heldout.pictures[row],
            trained=colours["trained"][i],
            untrained=colours["untrained"][i],
        )
        for i, row in enumerate(rows)
    ]


def _mixed_pair(cfg: TrainConfig, manifest: Manifest, tokenizer: Tokenizer) -> MixedPair:
    """Return the first pair of the first batch whose images are both annotated, if any is."""
    loader = Loader(cfg.data)
    batch = next(loader)
    loader.close()
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
    annotated = (batch.num_tokens > 0) & (batch.label >= 0)
    p = int(annotated[mix.members].all(1).to(torch.int8).argmax())
    first, second = mix.members[p].tolist()
    mask = mix.choice[p].numpy() == 0
    views = [[_picture(view[i]) for i in (first, second)] for view in batch.global_views]
    names = [*manifest.class_names, ""]  # label -1 has no name
    return MixedPair(
        originals=_originals(cfg, batch, (first, second)),
        view_a=(views[0][0], views[0][1]),
        view_b=(views[1][0], views[1][1]),
        boxes_a=batch.boxes[[first, second], 0].numpy(),
        boxes_b=batch.boxes[[first, second], 1].numpy(),
        mask=mask,
        mixed=_mixed(views[0][0], views[0][1], mask),
        captions=(
            tokenizer.decode(batch.token_ids[first].numpy()),
            tokenizer.decode(batch.token_ids[second].numpy()),
        ),
        categories=(names[int(batch.label[first])], names[int(batch.label[second])]),
    )


def _mixed(first: Picture, second: Picture, mask: npt.NDArray[np.bool_]) -> Picture:
    cell = first.shape[0] // mask.shape[0]
    return np.where(np.kron(mask, np.ones((cell, cell), bool))[..., None], first, second)


def _originals(cfg: TrainConfig, batch: Batch, rows: tuple[int, int]) -> tuple[Picture, Picture]:
    """Return the two whole pictures at their own size, by sample id in the training split."""
    side = int(batch.image_size[list(rows)].max())
    wanted = [int(batch.sample_id[row]) for row in rows]
    by_sample: dict[int, Picture] = {}
    for whole in evaluation_batches(cfg.data.path, cfg.data.split, image_size=side, batch_size=256):
        for i, sample in enumerate(whole.sample_id.tolist()):
            if sample in wanted:
                by_sample[sample] = _picture(whole.global_views[0][i])
    return by_sample[wanted[0]], by_sample[wanted[1]]


def _picture(view: Tensor) -> Picture:  # [3, S, S] uint8 -> [S, S, 3]
    return view.permute(1, 2, 0).contiguous().cpu().numpy()
