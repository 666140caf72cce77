"""Recipes: functions that return a whole run. `m3i-fast train NAME --field value` starts from one.

Marked with where a value comes from: [paper] M3I, [SiameseIM] its base method, the rest is chosen
here and said so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from m3i_fast.config import TrainConfig
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.config.heads import DecoderConfig, ProjectorConfig
from m3i_fast.config.internimage import (
    InternImageConfig,
    internimage_b,
    internimage_demo,
    internimage_g,
    internimage_h,
    internimage_l,
    internimage_s,
    internimage_t,
    internimage_xl,
)
from m3i_fast.config.mixing import MixingConfig
from m3i_fast.config.objective import ObjectiveConfig
from m3i_fast.config.optim import EmaConfig, OptimConfig
from m3i_fast.config.text import TextConfig
from m3i_fast.config.vision import VisionConfig
from m3i_fast.config.vit import ViTConfig, vit_b, vit_demo, vit_h, vit_l, vit_s
from m3i_fast.hints import nearest
from m3i_fast.objectives.methods import METHODS
from m3i_fast.pipelines.sources.openmoji import build as build_openmoji

MIN_CONTRAST = 8  # of 255 levels: less is blank paper, sky, or JPEG's noise in either
DEMO_MERGES = 500  # unseen words split into pieces that were seen


def demo(*, data: Path = Path("data/openmoji"), seed: int = 0) -> TrainConfig:
    """64-pixel drawings on two CPU cores: every part of M3I in minutes, all random from `seed`.

    Values are chosen on a part of the training concepts (`data openmoji --tune`), none on the
    held-out ones.
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
    """The demo's data, encoder and optimiser, with another method's terms and inputs.

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
        mask_per_batch=method.mask_per_batch,
        min_contrast=0,
        num_queries=0,
    )
    loader = replace(
        cfg.data,
        local_views=cfg.data.local_views if method.local_views else None,
    )
    return replace(
        cfg, data=loader, objective=replace(cfg.objective, terms=method.terms, mixing=mixing)
    )


def demo_internimage(*, data: Path = Path("data/openmoji"), seed: int = 0) -> TrainConfig:
    """The demo with an InternImage: twice its pixels a side, so that the token grid is the same.

    All else is the ViT's, tuned for neither.
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
    build_openmoji(
        path,
        labelled=labelled,
        captioned=captioned,
        tune=tune,
        max_variants=3,
        num_merges=DEMO_MERGES,
        context_length=demo().text.context_length,
    )


def _production(
    vision: VisionConfig, *, batch_size: int, num_steps: int, compile: bool
) -> TrainConfig:
    """M3I on a captioned and labelled data set; values chosen where no source is marked."""
    colours = ViewConfig(
        size=vision.image_size,
        scale=(0.08, 1.0),  # [SiameseIM]
        blur_probability=0.5,  # [SiameseIM] 1.0 and 0.1 on its two views
        solarize_probability=0.1,  # [SiameseIM] 0.2 on one of two views
    )
    return TrainConfig(
        num_steps=num_steps,
        num_classes=1000,
        data=LoaderConfig(
            path=Path("data/train"),
            batch_size=batch_size,
            global_views=colours,
            num_threads=8,
        ),
        vision=vision,
        text=TextConfig(),  # [paper] CLIP's base text Transformer, from scratch
        objective=ObjectiveConfig(
            mixing=MixingConfig(  # [paper] two images, block-wise, about half and half, together
                mode="joint", mask_block=2, min_contrast=MIN_CONTRAST
            ),
            # [SiameseIM] depth, heads; its width is the encoder's, and so has the targets' rank
            decoder=DecoderConfig(dim=max(512, vision.dim), depth=4, num_heads=16),
        ),
        optim=OptimConfig(
            lr=6.25e-5 * 16 * batch_size / 4096,  # [SiameseIM] 1e-3 at 4096, linear in the batch
            weight_decay=0.05,  # [SiameseIM]
            betas=(0.9, 0.95),  # [SiameseIM]
            clip_grad_norm=1.0,  # [SiameseIM]
        ),
        ema=EmaConfig(momentum=0.995),  # [SiameseIM]
        compile=compile,
        log_every=50,
        checkpoint_every=2000,
    )


def _vit_variants() -> dict[str, Callable[[], TrainConfig]]:
    """m3i_vit_{s,b,l,h}, plain and for a GPU.

    Batch sizes are chosen to fit 80 GB in bf16, and not yet measured.
    """
    batch_sizes = {"s": (1024, 1024), "b": (512, 768), "l": (256, 320), "h": (96, 128)}
    found: dict[str, Callable[[], TrainConfig]] = {}
    for size, vision in {"s": vit_s, "b": vit_b, "l": vit_l, "h": vit_h}.items():
        a100, h100 = batch_sizes[size]
        for suffix, batch_size in {"": a100, "_a100": a100, "_h100": h100}.items():
            found[f"m3i_vit_{size}{suffix}"] = partial(
                _build_vit, vision, size, batch_size, compile=bool(suffix)
            )
    return found


def _build_vit(
    vision: Callable[..., ViTConfig], size: str, batch_size: int, *, compile: bool
) -> TrainConfig:
    cfg = vision(
        drop_path_rate={"s": 0.0, "b": 0.0, "l": 0.0, "h": 0.1}[size],
        activation_checkpointing="full" if size == "h" else "none",
    )
    return _for_400_epochs(cfg, batch_size, compile=compile)


def _internimage_variants() -> dict[str, Callable[[], TrainConfig]]:
    """m3i_internimage_{t,s,b,l,xl,h,g}, for a GPU of 80 GB in bf16.

    Batch sizes and rates of stochastic depth are chosen, and not yet measured.
    """
    sizes: dict[str, tuple[Callable[..., InternImageConfig], int, float]] = {
        "t": (internimage_t, 768, 0.1),
        "s": (internimage_s, 512, 0.1),
        "b": (internimage_b, 384, 0.1),
        "l": (internimage_l, 192, 0.1),
        "xl": (internimage_xl, 128, 0.1),
        "h": (internimage_h, 64, 0.2),
        "g": (internimage_g, 16, 0.4),
    }
    return {
        f"m3i_internimage_{size}": partial(_build_internimage, size, *settings)
        for size, settings in sizes.items()
    }


def _build_internimage(
    size: str, vision: Callable[..., InternImageConfig], batch_size: int, drop_path_rate: float
) -> TrainConfig:
    cfg = vision(
        num_classes=0,  # the terms have their own heads
        use_clip_projector=True,
        drop_path_rate=drop_path_rate,
        activation_checkpointing="full" if size in ("h", "g") else "none",
    )
    return _for_400_epochs(cfg, batch_size, compile=False)


def _for_400_epochs(cfg: VisionConfig, batch_size: int, *, compile: bool) -> TrainConfig:
    """400 epochs of 1.28 M images [paper, ablations on ImageNet-1k]."""
    return _production(
        cfg, batch_size=batch_size, num_steps=400 * 1_281_167 // batch_size, compile=compile
    )


def shrink(cfg: TrainConfig, *, path: Path, num_classes: int, text: TextConfig) -> TrainConfig:
    """The same recipe at a size that trains in a second, to try it on other data."""
    vision = _shrink_vision(cfg.vision)
    views = replace(cfg.data.global_views, size=vision.image_size)
    return replace(
        cfg,
        num_steps=2,
        num_classes=num_classes,
        vision=vision,
        text=text,
        data=replace(
            cfg.data, path=path, batch_size=4, global_views=views, num_threads=1, initial_fill=16
        ),
        objective=replace(
            cfg.objective,
            decoder=replace(cfg.objective.decoder, dim=32, depth=1, num_heads=2),
            projector=replace(
                cfg.objective.projector, hidden_dim=32, output_dim=16, predictor_hidden_dim=16
            ),
            head_hidden_dim=32,
            num_prototypes=16,
            queue_length=16,
        ),
        compile=False,
        log_every=1,
        checkpoint_every=2,
    )


def _shrink_vision(cfg: VisionConfig) -> VisionConfig:
    """A grid of 4 x 4 tokens, two layers or a layer a stage; the options stay."""
    if isinstance(cfg, ViTConfig):
        return replace(cfg, image_size=4 * cfg.patch_size, dim=32, depth=2, num_heads=2)
    return replace(
        cfg,
        image_size=64,
        channels=16,
        depths=(1, 1, 1, 1),
        groups=(1, 2, 4, 8),
        level2_post_norm_block_ids=(0,) if cfg.level2_post_norm else None,
        token_dim=32,
        pool_heads=2,
        pooled_dim=32,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "demo_internimage": demo_internimage,
    **_vit_variants(),
    **_internimage_variants(),
}


def recipes() -> dict[str, Callable[[], TrainConfig]]:
    """All of them by name: RECIPES, and demo_<method> of every method there is by now."""
    methods = {f"demo_{name}": partial(demo_method, name) for name in METHODS}
    return RECIPES | methods


def find_recipe(argv: list[str], default: str | None = None) -> tuple[str, TrainConfig, list[str]]:
    """`RECIPE ...` or `--config FILE ...` -> its name, its config and the other arguments.

    default: the recipe where the arguments name none. Raises ValueError for an unknown recipe,
    FileNotFoundError for a missing file.
    """
    if default is not None and (not argv or argv[0].startswith("-") and argv[0] != "--config"):
        argv = [default, *argv]
    if argv[0] == "--config":
        if len(argv) < 2:
            raise ValueError("--config: expected a file")
        return Path(argv[1]).stem, TrainConfig.load(Path(argv[1])), argv[2:]
    known = recipes()
    if argv[0] not in known:
        raise ValueError(
            f"unknown recipe {argv[0]!r}: expected one of {', '.join(known)}."
            + nearest(argv[0], known)
        )
    return argv[0], known[argv[0]](), argv[1:]
