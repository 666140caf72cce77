"""The demo, which trains on a CPU, and the other methods in its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3i_fast.config.columns import ColumnConfig
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.config.models.internimage import internimage_demo
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.config.objective.heads import CaptionerConfig, DecoderConfig, ProjectorConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.config.optim import EmaConfig, OptimConfig
from m3i_fast.config.train import TrainConfig
from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes.production import MIN_CONTRAST

DEMO_MERGES = 500  # unseen words split into pieces that were seen


def demo(*, data: Path = Path("data/openmoji"), seed: int = 0) -> TrainConfig:
    """Train on 64-pixel drawings with every part of M3I, in minutes on two CPU cores.

    Needs: nothing, `m3i-fast demo` packs the drawings; a CPU; 2 GB.

    All is drawn from `seed`. Values are chosen on a part of the training concepts (`data openmoji
    --tune`), none on the held-out ones.
    """
    # Colour tells flags, faces and signs apart: no hue, saturation or gray.
    views = ViewConfig(
        size=64, jitter_probability=0.5, hue=0.0, saturation=0.0, gray_probability=0.0
    )
    return TrainConfig(
        seed=seed,
        num_steps=2000,
        num_classes=9,
        data=LoaderConfig(
            path=data,
            seed=seed,
            batch_size=32,
            global_views=views,
            local_views=replace(views, size=32, scale=(0.15, 0.6)),
            num_threads=1,
        ),
        vision=vit_demo(),
        text=TextConfig(
            vocab_size=512 + DEMO_MERGES + 2,
            context_length=24,
            dim=128,
            depth=2,
            num_heads=4,
            embed_dim=128,
        ),
        objective=ObjectiveConfig(
            # A view has 39 cells with content in the median; 98 % of them are among 48.
            mixing=MixingConfig(
                mask_block=2, min_contrast=MIN_CONTRAST, num_queries=48, token_dropout=0.2
            ),
            decoder=DecoderConfig(dim=96, depth=2, num_heads=4),
            projector=ProjectorConfig(hidden_dim=256, output_dim=128, predictor_hidden_dim=64),
            head_hidden_dim=256,
            num_prototypes=256,
            queue_length=1024,
        ),
        optim=OptimConfig(
            lr=1e-3,
            warmup_fraction=0.04,
            betas=(0.9, 0.98),
            matrices="muon",  # in so few steps AdamW fits not even the training labels
        ),
        ema=EmaConfig(momentum=0.99),
        log_every=20,
        checkpoint_every=500,
    )


def demo_method(name: str, *, data: Path = Path("data/openmoji"), seed: int = 0) -> TrainConfig:
    """Train another method's terms and inputs with the demo's data, encoder and optimiser.

    Nothing is tuned for it. M3I is `demo` itself.
    """
    cfg, method = demo(data=data, seed=seed), METHODS[name]
    if name == "m3i":
        return cfg
    mixing = replace(
        cfg.objective.mixing,
        mode=method.mode,
        mask_ratio=method.mask_ratio,
        final_mask_ratio=method.mask_ratio,
        mask_block=method.mask_block,
        hidden=method.hidden,
        mask_per_batch=method.mask_per_batch,
        min_contrast=0,
        num_queries=0,
    )
    captioner = cfg.objective.captioner
    if any(term.predictor == "captioner" for term in method.terms):
        captioner = CaptionerConfig(
            dim=cfg.text.dim,
            depth=cfg.text.depth,
            num_heads=cfg.text.num_heads,
            parallel=method.parallel_captions,
        )
    loader = replace(
        cfg.data,
        local_views=cfg.data.local_views if method.local_views else None,
    )
    objective = replace(cfg.objective, terms=method.terms, mixing=mixing, captioner=captioner)
    if objective.uses(encoder="snapshot"):  # of a thousand steps, as 10,000 of a million
        objective = replace(objective, snapshot_every=100)
    # its data have to have them; how many of a picture, no network depends on
    of_regions = {term.column for term in method.terms if term.kind.column == "regions"}
    columns = tuple(ColumnConfig(name=name, kind="regions") for name in sorted(of_regions))
    return replace(cfg, data=loader, objective=objective, columns=columns)


def demo_internimage(*, data: Path = Path("data/openmoji"), seed: int = 0) -> TrainConfig:
    """Train the demo with an InternImage, on 128-pixel drawings.

    Needs: nothing, `m3i-fast demo` packs the drawings; a CPU; 2 GB.

    Twice the ViT's pixels a side, so that the token grid is the same. All else is the ViT's, tuned
    for neither.
    """
    cfg, vision = demo(data=data, seed=seed), internimage_demo()
    views, local_views = cfg.data.global_views, cfg.data.local_views
    assert local_views is not None
    loader = replace(
        cfg.data,
        global_views=replace(views, size=2 * views.size),
        local_views=replace(local_views, size=2 * local_views.size),
    )
    return replace(
        cfg,
        num_steps=1000,
        vision=vision,
        data=loader,
        objective=replace(
            cfg.objective, mixing=replace(cfg.objective.mixing, mode="joint", mask_block=2)
        ),
    )


def pack_demo(
    path: Path, *, labelled: float = 1.0, captioned: float | None = None, tune: float = 0.0
) -> None:
    """Write the demo's data, with the tokenizer that its recipe expects.

    `labelled` is the share of the training concepts with a class, `captioned` of those with a
    caption, drawn apart. Without `captioned`, `labelled` is the share with both, and thirds of the
    rest keep the caption only, the class only, nothing.
    """
    # Rasterising needs numpy, torch and more, which naming a recipe does not.
    from m3i_fast.pipelines.sources.openmoji import build

    build(
        path,
        labelled=labelled,
        captioned=captioned,
        tune=tune,
        max_variants=3,
        num_merges=DEMO_MERGES,
        context_length=demo().text.context_length,
    )
