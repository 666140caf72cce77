"""Inputs of a run's page, gathered from its directory, its data and its encoders.

What cannot be shown is left out with its reason: a run may have no checkpoint yet, no captions or
classes, or data that are elsewhere by now.
Legend: M pictures, S side, N cells, C token width, E embedding width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.data import LoaderConfig
from m3i_fast.evaluation.chosen_rows import choose_rows
from m3i_fast.evaluation.dense.patch_pca import patch_pca
from m3i_fast.evaluation.retrieval.zero_shot import nearest, retrieval_ranks
from m3i_fast.json_files import read_json
from m3i_fast.objectives.targets import normalise_views
from m3i_fast.objectives.terms import Caption, Category
from m3i_fast.observe.metrics import Curves, read_curves
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.pipelines.storage.objects import place_of
from m3i_fast.pipelines.storage.remote import manifest_at
from m3i_fast.report.evaluations.plots import evenly
from m3i_fast.report.inputs import (
    Guesses,
    Nearest,
    Neighbours,
    PatchPca,
    Picture,
    ReportInputs,
    RetrievalRow,
)
from m3i_fast.report.run.seen import mixed_pair, seen_inputs

NUM_CAPTIONS = 12
NUM_NEAREST = 5
NUM_PCA = 6
NUM_QUERIES = 6
SHEET_SIDE = 96  # most pixels of a picture of a sheet
_BATCH = 64


class EncodesCells(Protocol):
    """An image encoder, as the objective and a loaded model have it."""

    def encode_cells(self, images: Tensor) -> Tensor:
        """Encode images as one token a cell: [M, 3, S, S] -> [M, N, C]."""

    def summarise(self, tokens: Tensor) -> Tensor:
        """Summarise the tokens of each image for its heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownEncoder:
    """An encoder with its heads, in evaluation mode, where it has any."""

    encoder: EncodesCells
    caption: Caption | None = None
    category: Category | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Pictures of a split, one a group, with what each encoder makes of them."""

    split: str
    views: Tensor  # [M, 3, S, S] uint8
    captions: list[str]  # "": none
    label: Tensor  # [M] int64, -1: none
    tokens: dict[str, Tensor]  # who -> [NUM_PCA, N, C], of the last pictures
    features: dict[str, Tensor]  # who -> [M, C]
    image: dict[str, Tensor]  # who -> [M, E]
    text: dict[str, Tensor]  # who -> [M, E]
    logits: Tensor | None  # [M, K], of the trained encoder

    def name(self, row: int) -> str:
        """Return what a picture is called."""
        return self.captions[row] or f"picture {row + 1}"


def gather(
    run: Path,
    cfg: TrainConfig,
    encoders: Mapping[str, ShownEncoder] | str,
    *,
    title: str,
    num_steps: int,
    class_names: tuple[str, ...] = (),
    most: int = 1000,
    **said: Any,
) -> ReportInputs:
    """Gather the page of a run.

    cfg: the run's, with `data` where the data lie now. encoders: "trained" and perhaps "untrained";
    or the reason why there is none. num_steps: steps that the run has taken. class_names: of the
    category head. most: pictures that are encoded. said: further fields of `ReportInputs`.
    """
    data = cfg.data.members[0] if cfg.data.mixture else cfg.data
    absent: dict[str, str] = {}
    found: dict[str, Any] = {}
    try:
        manifest = manifest_at(data)
    except (OSError, ValueError) as error:
        reason = f"The run's data are not there: {error}. Where they lie now: --data DIR."
        absent = dict.fromkeys(("seen", "retrieval", "features", "classes"), reason)
        manifest = None
    if manifest is not None:
        found["attribution"] = manifest.attribution
        found |= _seen(cfg, data, manifest, absent)
        if isinstance(encoders, str):
            absent |= dict.fromkeys(("retrieval", "features", "classes"), encoders)
        else:
            found |= _encoded(cfg, data, manifest, encoders, class_names, most, absent)
    return ReportInputs(
        title=title,
        curves=_curves(run),
        num_steps=num_steps,
        config=read_json(run / "config.json"),
        environment=_environment(run),
        absent=absent,
        **found,
        **said,
    )


def _curves(run: Path) -> Curves:
    path = run / "metrics.jsonl"
    return read_curves(path) if path.exists() else {}


def _environment(run: Path) -> dict[str, Any]:
    try:
        return dict(read_json(run / "env.json"))
    except (FileNotFoundError, ValueError) as error:
        return {"env.json": str(error)}


def _seen(
    cfg: TrainConfig, data: LoaderConfig, manifest: Manifest, absent: dict[str, str]
) -> dict[str, Any]:
    """Return samples as the model sees them, and the pair that explains M3I where it trains."""
    try:
        seen = seen_inputs(cfg, data, manifest)
    except (OSError, ValueError, RuntimeError) as error:
        absent["seen"] = f"The first batch cannot be read: {error}."
        return {}
    return {"seen": [shown.input for shown in seen], "mixed_pair": mixed_pair(cfg, seen)}


def held_out_split(cfg: TrainConfig, data: LoaderConfig, manifest: Manifest) -> str:
    """Return the split to show: that of the run's evaluations, else another one than trained on."""
    others = [name for name in manifest.splits if name != data.split]
    if cfg.evaluate_split in others:
        return cfg.evaluate_split
    return others[0] if others else data.split


# ---- What the encoders make of held-out pictures -------------------------------------------------


def _encoded(
    cfg: TrainConfig,
    data: LoaderConfig,
    manifest: Manifest,
    encoders: Mapping[str, ShownEncoder],
    class_names: tuple[str, ...],
    most: int,
    absent: dict[str, str],
) -> dict[str, Any]:
    split = held_out_split(cfg, data, manifest)
    try:
        held = _embed(cfg, data, split, manifest, encoders, most)
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"Split {split} of {place_of(data.path)} cannot be read: {error}."
        absent |= dict.fromkeys(("retrieval", "features", "classes"), reason)
        return {}
    found: dict[str, Any] = {"patch_pca": _patch_pca(held, cfg.vision.grid)}
    if encoders["trained"].caption is None:
        absent["retrieval"] = "The run learns no captions."
    elif not any(held.captions):
        absent["retrieval"] = f"Split {split} has no captions."
    else:
        found |= _retrieval(held)
    if not bool((held.label >= 0).any()):
        absent["classes"] = f"Split {split} has no classes."
    else:
        found["neighbours"] = _neighbours(held)
        guesses = _guesses(held, manifest.class_names, class_names)
        if guesses is not None:
            found["guesses"] = guesses
    return found


@torch.no_grad()
def _embed(
    cfg: TrainConfig,
    data: LoaderConfig,
    split: str,
    manifest: Manifest,
    encoders: Mapping[str, ShownEncoder],
    most: int,
) -> Held:
    """Encode pictures from all over a split, one a group."""
    size = min(_BATCH, most)
    chosen = choose_rows(replace(data, split=split), most)
    batches = evaluation_batches(
        data.path,
        split,
        image_size=cfg.vision.image_size,
        batch_size=size,
        max_pixels=data.max_pixels,
        bucket_fields_of=data,
        rows=chosen.rows,
    )
    tokenizer = Tokenizer.from_info(manifest.tokenizer)
    columns: dict[str, list[Tensor]] = {}
    captions: list[str] = []
    for batch in batches:
        token_ids, num_tokens = batch.token_ids, batch.num_tokens
        of = {"views": batch.global_views[0], "label": batch.label}
        for ids, number in zip(token_ids.numpy(), num_tokens.tolist(), strict=True):
            captions.append(tokenizer.decode(ids[:number]) if number else "")
        for who, shown in encoders.items():
            of |= _embed_batch(who, shown, token_ids, num_tokens, of["views"])
        for name, column in of.items():
            columns.setdefault(name, []).append(column)
    # All tokens of all pictures may be gigabytes: those of the last pictures are shown.
    tokens = {who: torch.cat(columns.pop(f"tokens {who}")[-2:])[-NUM_PCA:] for who in encoders}
    joined = {name: torch.cat(parts) for name, parts in columns.items()}

    def by(part: str) -> dict[str, Tensor]:
        return {who: joined[f"{part} {who}"] for who in encoders if f"{part} {who}" in joined}

    return Held(
        split=split,
        views=joined["views"],
        captions=captions,
        label=joined["label"],
        tokens=tokens,
        features=by("features"),
        image=by("image"),
        text=by("text"),
        logits=joined.get("logits trained"),
    )


def _embed_batch(
    who: str, shown: ShownEncoder, token_ids: Tensor, num_tokens: Tensor, views: Tensor
) -> dict[str, Tensor]:
    device = shown.device
    rows = torch.arange(len(views), device=device)
    tokens = shown.encoder.encode_cells(normalise_views(views.to(device), rows, torch.float32))
    summary = shown.encoder.summarise(tokens)
    found = {"tokens": tokens[-NUM_PCA:], "features": tokens.mean(1)}
    if shown.caption is not None:
        found["image"] = shown.caption.embed(summary)
        found["text"] = shown.caption.embed_captions(token_ids.to(device), num_tokens.to(device))
    if shown.category is not None:
        found["logits"] = shown.category.logits(summary)
    return {f"{name} {who}": value.float().cpu() for name, value in found.items()}


def _retrieval(held: Held) -> dict[str, Any]:
    """Return captions with the pictures they find, from the best found to the worst."""
    asked = [row for row, caption in enumerate(held.captions) if caption]
    index, groups = torch.tensor(asked), torch.arange(len(asked))
    text = {who: rows[index] for who, rows in held.text.items()}
    image = {who: rows[index] for who, rows in held.image.items()}
    ranks = {who: retrieval_ranks(text[who], image[who], groups, groups) for who in text}
    best_first = ranks["trained"].argsort(stable=True)

    def found(who: str, row: int) -> Nearest | None:
        if who not in text:
            return None
        rows = nearest(text[who][row : row + 1], image[who], k=NUM_NEAREST)[0].tolist()
        return Nearest(
            pictures=tuple(_picture(held.views[asked[i]]) for i in rows),
            names=tuple(held.captions[asked[i]] for i in rows),
            right=rows.index(row) if row in rows else None,
            rank=int(ranks[who][row]),
        )

    rows = []
    for place in evenly(len(asked), NUM_CAPTIONS):
        row = int(best_first[place])
        trained = found("trained", row)
        assert trained is not None
        rows.append(
            RetrievalRow(
                caption=held.captions[asked[row]],
                picture=_picture(held.views[asked[row]]),
                trained=trained,
                untrained=found("untrained", row),
            )
        )
    choice = (
        f"In even steps from the one that the trained encoder finds best to the one that it finds "
        f"worst of {len(asked):,} captions of split {held.split}."
    )
    return {
        "retrieval": rows,
        "retrieval_choice": choice,
        "retrieval_ranks": {who: of.tolist() for who, of in ranks.items()},
    }


def _patch_pca(held: Held, grid: int) -> list[PatchPca]:
    number = len(next(iter(held.tokens.values())))
    colours = {
        who: patch_pca(tokens).view(number, grid, grid, 3).numpy()
        for who, tokens in held.tokens.items()
    }
    first = len(held.views) - number
    return [
        PatchPca(
            name=held.name(first + i),
            picture=_picture(held.views[first + i]),
            trained=colours["trained"][i],
            untrained=colours["untrained"][i] if "untrained" in colours else None,
        )
        for i in range(number)
    ]


def _neighbours(held: Held) -> Neighbours | None:
    """Return some labelled pictures with the others that are most similar by the mean token."""
    known = (held.label >= 0).nonzero()[:, 0]
    if len(known) < 2:
        return None
    features, label = held.features["trained"][known], held.label[known]
    queries = evenly(len(known), NUM_QUERIES)
    number = min(NUM_NEAREST + 1, len(known) - 1)
    best = nearest(features[queries], features, k=number + 1)
    own = torch.tensor(queries)[:, None]
    found = torch.stack([row[row != i][:number] for row, i in zip(best, own, strict=True)])
    used, place = torch.cat([torch.tensor(queries), found.flatten()]).unique(return_inverse=True)
    return Neighbours(
        pictures=_small(held.views[known[used]]),
        queries=place[: len(queries)].tolist(),
        found=place[len(queries) :].view_as(found).numpy(),
        is_right=(label[found] == label[own]).numpy(),
    )


def _guesses(held: Held, of_data: tuple[str, ...], of_head: tuple[str, ...]) -> Guesses | None:
    """Return the guesses of the category head, with the labels by its own classes."""
    if held.logits is None or held.logits.shape[1] != len(of_head):
        return None
    places = {name: place for place, name in enumerate(of_head)}
    own = torch.tensor([*(places.get(name, -1) for name in of_data), -1])  # label -1 stays
    label = own[held.label]
    if not bool((label >= 0).any()):
        return None
    return Guesses(logits=held.logits.numpy(), label=label.numpy(), class_names=of_head)


def _small(views: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:  # [M, 3, S, S] uint8
    if views.shape[-1] > SHEET_SIDE:
        views = F.interpolate(views.float(), size=(SHEET_SIDE, SHEET_SIDE), mode="area").byte()
    return views.numpy()


def _picture(view: Tensor) -> Picture:  # [3, S, S] uint8 -> [S, S, 3]
    return view.permute(1, 2, 0).contiguous().numpy()
