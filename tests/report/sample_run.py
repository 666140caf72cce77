"""Inputs of a report without a training run: real photographs, and curves made by arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage import data

from m3i_fast.evaluation.dense.patch_pca import patch_pca
from m3i_fast.evaluation.retrieval.zero_shot import nearest, retrieval_ranks
from m3i_fast.observe.metrics import Curves
from m3i_fast.report.inputs import (
    Guesses,
    MixedPair,
    Nearest,
    Neighbours,
    PatchPca,
    ReportInputs,
    RetrievalRow,
    SeenInput,
    ShownSample,
    ShownView,
)

SIZE = 64
PHOTOGRAPHS = {
    "brick": "a wall of bricks",
    "cell": "a single cell under the microscope",
    "chelsea": "a ginger cat looking at you",
    "coffee": "a cup of coffee on a saucer",
    "coins": "old coins in rows",
    "grass": "blades of grass",
    "gravel": "gravel",
    "horse": "the black outline of a horse",
    "hubble_deep_field": "galaxies in the Hubble deep field",
    "immunohistochemistry": "a stained slice of tissue",
    "moon": "craters of the moon",
    "page": "a printed page & its shadow",
    "retina": "the retina of an eye",
    "rocket": "a rocket before its start",
    "astronaut": "an astronaut before a flag <script>alert('caption')</script>",
    "camera": "a man with a camera",
}
BOXES_A = np.array([[10, 110, 280, 280, 0], [30, 80, 320, 340, 0]], np.float32)
BOXES_B = np.array([[60, 40, 220, 330, 1], [100, 210, 250, 240, 1]], np.float32)


def photograph(name: str) -> np.ndarray:
    picture = getattr(data, name)()
    if picture.dtype == bool:
        picture = picture * np.uint8(255)
    return np.stack([picture] * 3, -1) if picture.ndim == 2 else picture[..., :3]


def resized(picture: np.ndarray, size: int = SIZE) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))


def crop(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    y, x, height, width, flip = (int(v) for v in box)
    view = resized(picture[y : y + height, x : x + width])
    return view[:, ::-1] if flip else view


def mixed_pair() -> MixedPair:
    originals = (photograph("chelsea"), photograph("coffee"))
    view_a = tuple(map(crop, originals, BOXES_A))
    mask = (np.add.outer(np.arange(4), np.arange(4) // 2) * 5 % 8) < 4
    cells = mask.repeat(16, 0).repeat(16, 1)[..., None]
    return MixedPair(
        originals=originals,
        view_a=view_a,
        view_b=tuple(map(crop, originals, BOXES_B)),
        boxes_a=BOXES_A,
        boxes_b=BOXES_B,
        mask=mask,
        mixed=np.where(cells, view_a[0], view_a[1]),
        captions=(PHOTOGRAPHS["chelsea"], ""),
        categories=("Animals & Nature", "Food & Drink"),
    )


def retrieval_rows() -> list[RetrievalRow]:
    """A photograph's left half stands for its caption, and colour or brightness finds the rest."""
    pictures = [resized(photograph(name)) for name in PHOTOGRAPHS]
    captions = list(PHOTOGRAPHS.values())
    pixels = torch.tensor(np.stack(pictures)).float() / 255
    halves = [pixels[:, :, :32].flatten(1, 2), pixels[:, :, 32:].flatten(1, 2)]
    colours = [torch.cat([half.mean(1) - 0.5, half.std(1)], 1) for half in halves]
    brightness = [torch.stack([c.mean(1), 1 - c.mean(1)], 1) for c in colours]
    group = torch.arange(len(pictures))

    def found(query: torch.Tensor, gallery: torch.Tensor) -> list[Nearest]:
        ranks = retrieval_ranks(query, gallery, group, group).tolist()
        return [
            Nearest(
                pictures=tuple(pictures[i] for i in shown),
                names=tuple(captions[i] for i in shown),
                right=rank if rank < 5 else None,
                rank=rank,
            )
            for shown, rank in zip(nearest(query, gallery, k=5).tolist(), ranks, strict=True)
        ]

    rows = zip(captions, pictures, found(*colours), found(*brightness), strict=True)
    return [
        RetrievalRow(caption=caption, picture=picture, trained=trained, untrained=untrained)
        for caption, picture, trained, untrained in rows
    ]


def patch_pictures(num: int = 6) -> list[PatchPca]:
    names = list(PHOTOGRAPHS)[2 : 2 + num]
    pictures = np.stack([resized(photograph(name)) for name in names])
    patches = torch.tensor(pictures).float().unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)
    mean = patches.view(num, 64, 3, 64).mean(-1)
    edges = patches.view(num, 64, -1).diff(dim=-1)
    trained, untrained = (patch_pca(t).view(num, 8, 8, 3).numpy() for t in (mean, edges))
    return [
        PatchPca(name=PHOTOGRAPHS[n], picture=p, trained=a, untrained=b)
        for n, p, a, b in zip(names, pictures, trained, untrained, strict=True)
    ]


def metrics(num: int = 120) -> list[dict[str, float]]:
    def row(i: int) -> dict[str, float]:
        step, wave = 10 * (i + 1), math.sin(2.4 * i) * math.cos(0.7 * i)
        decay = math.exp(-i / 35)
        terms = {
            "loss/intra": 0.4 + 0.6 * decay + 0.03 * wave,
            "loss/inter": 0.55 + 0.45 * decay + 0.03 * wave,
            "loss/category": 1.1 + 1.1 * decay + 0.12 * wave,
            "loss/caption": 2.1 + 2.05 * decay + 0.15 * wave,
        }
        return {
            "step": step,
            **terms,
            "loss/total": sum(terms.values()),
            "monitor/intra_cosine": 0.8 - 0.6 * decay,
            "monitor/inter_cosine": 0.7 - 0.6 * decay,
            "monitor/intra_explained": 0.35 - 0.6 * decay + 0.05 * wave,
            "monitor/inter_explained": 0.25 - 0.5 * decay + 0.05 * wave,
            "monitor/intra_constant": 0.3 + 0.2 * decay,
            "monitor/inter_constant": 0.35 + 0.2 * decay,
            "gradient/intra": 0.12 - 0.1 * decay,
            "gradient/inter": 0.08 - 0.07 * decay,
            "gradient/category": 0.4 * decay * (i % 3 == 0),
            "gradient/caption": 0.3 * decay,
            "gradient_cosine/intra_inter": 0.4 * wave,
            "monitor/target_std": 0.9 - 0.5 * decay + 0.01 * wave,
            "monitor/target_rank": 40 - 25 * decay + wave,
            "monitor/target_alignment": 0.8 - 0.4 * decay,
            "monitor/target_uniformity": -2.5 + 1.5 * decay,
            "monitor/target_kmeans_entropy": 0.9 - 0.1 * decay,
            "monitor/caption_log_scale": 14.3 + 10 * (1 - decay),
            "optim/lr": 1e-3 * (1 - i / num),
            "optim/grad_norm": 1.0 + decay + 0.2 * abs(wave),
            "throughput/img_s": 317 + 9 * wave - 120 * (i == 0),
            "time/data.wait_ms": 4.1 + 2 * abs(wave),
            "time/h2d_ms": 0.1,
            "time/mix_ms": 1.2,
            "time/fwd.target_ms": 31.0,
            "time/fwd.input_ms": 38.5 + wave,
            "time/fwd.text_ms": 9.0,
            "time/loss.intra_ms": 40.0,
            "time/loss.total_ms": 2.0,
            "time/bwd_ms": 88.0 + wave,
            "time/comm_ms": 0.2,
            "time/clip_ms": 1.5,
            "time/optim_ms": 11.2,
            "time/ema_ms": 2.1,
            "time/log_ms": 0.4,
            "time/ckpt_ms": 3.0,
        }

    rows = [row(i) for i in range(num)]
    for one in rows[3::4]:  # an evaluation on the way
        rows.append(
            {
                "step": one["step"],
                "evaluate/knn_top1": 0.6 - 0.3 / one["step"],
                "evaluate/knn_top1_ema": 0.62 - 0.3 / one["step"],
                "evaluate/caption_to_image_recall_at_5": 0.3 - 0.3 / one["step"],
                "evaluate/seconds": 2.5,
            }
        )
    return rows


def columns(rows: list[dict[str, float]]) -> Curves:
    """Logged rows by name, as they are read of a file."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {
        name: (
            np.array([row["step"] for row in rows if name in row], float),
            np.array([row[name] for row in rows if name in row], float),
        )
        for name in names
    }


def seen() -> list[SeenInput]:
    """Two inputs: a pair by cells, with views and boxes; and one picture whose cells are hidden."""
    pair = mixed_pair()
    samples = [
        ShownSample(
            picture=picture,
            size=(2 * picture.shape[0], 2 * picture.shape[1]),
            sample_id=i,
            group_id=i,
            caption=caption,
            category=category,
            views=[
                ShownView(
                    picture=views[i],
                    **dict(zip(("y", "x", "height", "width"), 2.0 * boxes[i, :4], strict=True)),
                    is_mirrored=bool(boxes[i, 4]),
                    is_local=is_local,
                )
                for views, boxes, is_local in (
                    (pair.view_a, pair.boxes_a, False),
                    (pair.view_b, pair.boxes_b, True),
                )
            ],
        )
        for i, (picture, caption, category) in enumerate(
            zip(pair.originals, pair.captions, pair.categories, strict=True)
        )
    ]
    alpha = np.where(pair.mask.repeat(16, 0).repeat(16, 1), 255, 0).astype(np.uint8)
    hidden = np.concatenate([pair.view_a[0], alpha[..., None]], axis=-1)
    return [
        SeenInput(samples=samples, encoded=pair.mixed, told="Two pictures share an input."),
        SeenInput(samples=samples[:1], encoded=hidden, told="Half of the cells are hidden."),
    ]


def guesses() -> Guesses:
    """Logits of 300 pictures, of which the last hundred have no class."""
    rng = np.random.default_rng(0)
    label = np.concatenate([rng.integers(0, 5, 200), np.full(100, -1)])
    logits = rng.normal(size=(300, 5)) + 1.5 * (label[:, None] == np.arange(5))
    names = ("Animals & Nature", "Food & Drink", "a class of a rather long name", "<b>", "five")
    return Guesses(logits=logits.astype(np.float32), label=label, class_names=names)


def neighbours() -> Neighbours:
    pictures = np.stack([resized(photograph(name)).transpose(2, 0, 1) for name in PHOTOGRAPHS])
    found = np.arange(1, 13).reshape(3, 4)
    return Neighbours(pictures=pictures, queries=[0, 13, 14], found=found, is_right=found % 3 > 0)


def evaluation() -> dict[str, Any]:
    def minus(difference: float, half: float) -> dict[str, float]:
        return {"difference": difference, "low": difference - half, "high": difference + half}

    return {
        "held_out_concepts": 339,
        "train_images_per_s": 317.2,
        "knn_top1": {
            "trained": 0.569,
            "ema": 0.583,
            "untrained": 0.507,
            "chance": 0.286,
            "pixels": 0.551,
        },
        "linear_top1": {"trained": 0.573, "ema": 0.579, "untrained": 0.549, "chance": 0.286},
        "caption_to_image_recall_at_1": {"trained": 0.094, "untrained": 0.003, "chance": 1 / 339},
        "caption_to_image_recall_at_5": {"trained": 0.224, "untrained": 0.015, "chance": 5 / 339},
        "image_to_caption_recall_at_5": {"trained": 0.230, "untrained": 0.012, "chance": 5 / 339},
        "knn_balanced_accuracy": {
            "trained": 0.48,
            "untrained": 0.4,
            "chance": 1 / 9,
            "pixels": 0.43,
        },
        "linear_balanced_accuracy": {"trained": 0.5, "untrained": 0.46, "chance": 1 / 9},
        "chosen": {
            "trained": {"knn_k": 10, "linear_l2": 0.01},
            "untrained": {"knn_k": 5, "linear_l2": 0.1},
            "pixels": {"knn_k": 1},
        },
        "trained_minus": {
            "knn_top1": {
                "ema": minus(-0.014, 0.02),
                "untrained": minus(0.062, 0.047),
                "chance": minus(0.283, 0.06),
                "pixels": minus(0.018, 0.05),
            },
            "linear_top1": {"untrained": minus(0.024, 0.045), "chance": minus(0.287, 0.06)},
            "caption_to_image_recall_at_1": {
                "untrained": minus(0.091, 0.03),
                "chance": minus(0.094 - 1 / 339, 0.03),
            },
            "caption_to_image_recall_at_5": {
                "untrained": minus(0.209, 0.045),
                "chance": minus(0.224 - 5 / 339, 0.045),
            },
            "image_to_caption_recall_at_5": {
                "untrained": minus(0.218, 0.045),
                "chance": minus(0.230 - 5 / 339, 0.045),
            },
        },
    }


def report_inputs() -> ReportInputs:
    rows = retrieval_rows()
    return ReportInputs(
        title="M3I on captioned photographs",
        evaluation=evaluation(),
        curves=columns(metrics()),
        num_steps=1200,
        notes=["The run is complete, 1,200 steps."],
        mixed_pair=mixed_pair(),
        seen=seen(),
        guesses=guesses(),
        neighbours=neighbours(),
        recipe="demo",
        changed=[("optim.lr", 0.001, 0.0015), ("data.path", "data/openmoji", "a/" + "long/" * 30)],
        data={"photographs, train": "sha256 " + 64 * "0", "classes": 5},
        initial_weights={"source": "timm:vit.safetensors", "weights taken": 150},
        speed_notes=["As profiled in profile:", "Waiting for data: 1.0% of the step."],
        retrieval=rows[:12],
        retrieval_choice="The first twelve held-out captions.",
        retrieval_ranks={
            "trained": [row.trained.rank for row in rows],
            "untrained": [row.untrained.rank for row in rows],
        },
        patch_pca=patch_pictures(),
        config={
            "recipe": "demo",
            "vision": {"image_size": 64, "patch_size": 8, "dim": 128, "depth": 4},
            "objective": {"terms": [{"name": "intra", "weight": 1.0}], "sigma": 0.5**0.5},
            "optim": {"lr": 0.0015, "betas": [0.9, 0.98], "clip_grad_norm": None},
            "data": {"shards": "a/long/path/without/any/break/in/it/heldout-{000000..000012}.tar"},
        },
        environment={"python": "3.11", "torch": "2.13", "cpu": "two cores", "gpu": None},
        attribution="Pictures: scikit-image's sample images; licences in its data directory.",
    )
