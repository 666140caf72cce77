"""The known methods as lists of terms: the rows of the paper's table 1, and later ones.

A method is data: what the encoder is shown, and the terms. The same trainer runs each of them.
Nothing here imports torch. `m3i-fast methods` prints the table; a new method is an entry of METHODS
(docs/extend/new_method.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import Term, m3i

Family = Literal[
    "supervised", "weakly supervised", "intra-view", "inter-view", "several targets", "M3I"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Describe a method: its source, its terms, and what the encoder is shown."""

    title: str
    """The method's name in tables."""
    paper: str
    """arXiv number, or where the method stands in M3I's table 1."""
    family: Family
    """Group of methods that it is listed with."""
    terms: tuple[Term, ...]
    """The terms of the sum."""
    mode: Literal["own_image", "joint", "masked", "none"] = "none"
    """What the encoder is shown, as `MixingConfig.mode`."""
    mask_ratio: float = 0.5
    """Share of the cells hidden in mode masked."""
    mask_block: int = 1
    """Side of a mask block, in tokens."""
    hidden: Literal["dropped", "mask_token"] = "dropped"
    """What the encoder gets of hidden cells, as `MixingConfig.hidden`."""
    mask_per_batch: bool = False
    """Whether all inputs of a batch have one mask."""
    local_views: bool = False
    """Whether local views are inputs too."""
    parallel_captions: float = 0.0
    """Share of captions that are predicted in parallel, as `CaptionerConfig.parallel`."""
    differs: str = ""
    """In what this differs from the paper, in sentences; empty where in nothing."""

    @property
    def mixing(self) -> MixingConfig:
        """Return what the encoder is shown as a config, alike from the first step to the last."""
        return MixingConfig(
            mode=self.mode,
            mask_ratio=self.mask_ratio,
            final_mask_ratio=self.mask_ratio,
            mask_block=self.mask_block,
            hidden=self.hidden,
            mask_per_batch=self.mask_per_batch,
        )


LABEL = {"predictor": "head", "likelihood": "boltzmann", "regulariser": "negatives"}
CATEGORY = Term(name="category", target="category", **LABEL)  # type: ignore[arg-type]
CAPTION = Term(name="caption", target="caption", **LABEL)  # type: ignore[arg-type]
SIGMOID = replace(CAPTION, likelihood="sigmoid")
CAPTION_TOKENS = Term(
    name="caption_tokens",
    target="caption_tokens",
    predictor="captioner",
    likelihood="boltzmann",
    regulariser="negatives",
)
GROUNDED_CAPTION = replace(
    CAPTION_TOKENS, name="grounded_caption", target="grounded_caption", column="regions"
)
REFERRING_BOX = replace(
    CAPTION_TOKENS, name="referring_box", target="referring_box", column="regions"
)

pixels = partial(
    Term,
    target="pixels",
    predictor="decoder",
    likelihood="gaussian",
    regulariser="fixed",
)
features = partial(
    Term,
    target="features",
    encoder="momentum",
    predictor="decoder",
    likelihood="gaussian",
    regulariser="stop_gradient",
)
embedding = partial(
    Term,
    target="embedding",
    view="other",
    encoder="momentum",
    predictor="projector",
    likelihood="gaussian",
    regulariser="stop_gradient",
)
prototypes = partial(
    Term,
    target="prototypes",
    view="other",
    encoder="momentum",
    predictor="projector",
    likelihood="boltzmann",
    regulariser="centring",
)
cell_prototypes = partial(
    Term,
    target="cell_prototypes",
    encoder="momentum",
    predictor="mask_token",
    likelihood="boltzmann",
    regulariser="centring",
)
IBOT = (
    prototypes(name="prototypes", symmetric=True),
    cell_prototypes(name="cells", symmetric=True),
)
KOLEO = Term(
    name="spread",
    target="summary",
    view="other",
    encoder="shared",
    predictor="none",
    likelihood="none",
    regulariser="koleo",
    weight=0.2,  # both views' sum, each times 0.1
)
SIMCLR = embedding(
    name="views",
    encoder="shared",
    likelihood="boltzmann",
    regulariser="all_views",
    output_norm=False,
)


def radio(*teachers: str | None) -> tuple[Term, ...]:
    """Return RADIO's terms for these frozen encoders: each one's picture and its cells.

    teachers: as `Term.teacher`; None is `objective.teacher`. PHI-S balances their cells
    (arXiv 2410.01680); all terms weigh alike.
    """
    terms: list[Term] = []
    for number, teacher in enumerate(teachers):
        after = f"_{number + 1}" if len(teachers) > 1 else ""
        terms += (
            embedding(
                name=f"picture{after}",
                view="same",
                encoder="frozen",
                teacher=teacher,
                output_norm=False,
            ),
            features(
                name=f"cells{after}",
                encoder="frozen",
                teacher=teacher,
                predictor="linear",
                standardise="phi_s",
            ),
        )
    return tuple(terms)


POOLING = "Mean of the tokens in place of the class token"
BLOCKS = "cells are hidden in squares of 2 x 2, not in large rectangles"
MASKS = (
    "Every view is masked, by one share of its cells and both views of a picture alike; "
    f"{BLOCKS}; the mean of the tokens in place of the class token."
)
HALF = "The cells weigh twice as much: of the authors' views half are masked, and all are counted."

with_mask_tokens = partial(
    Method,
    mode="masked",
    hidden="mask_token",
    mask_ratio=0.3,  # the mean of DINOv2's 0.1 to 0.5
    mask_block=2,
    local_views=True,
)

METHODS: dict[str, Method] = {
    "supervised": Method(
        title="Supervised classification",
        paper="table 1",
        family="supervised",
        terms=(CATEGORY,),
        differs="Cosine classifier with a learnt temperature, behind an MLP.",
    ),
    "clip": Method(
        title="CLIP",
        paper="arXiv 2103.00020",
        family="weakly supervised",
        terms=(CAPTION,),
        differs=f"{POOLING}; the projection of pictures is an MLP; captions are read in both "
        "directions and averaged; pictures and captions of one group are positives.",
    ),
    "siglip": Method(
        title="SigLIP",
        paper="arXiv 2303.15343",
        family="weakly supervised",
        terms=(SIGMOID,),
        differs="As CLIP here; mean of the tokens in place of attention pooling.",
    ),
    "cappa": Method(
        title="CapPa",
        paper="arXiv 2306.07915",
        family="weakly supervised",
        terms=(CAPTION_TOKENS,),
        parallel_captions=0.75,
        differs="The mean is over all tokens of a batch, not over each caption's and then over "
        "captions; a caption's first token, which starts each one, is read and not predicted; "
        "layers have biases.",
    ),
    "coca": Method(
        title="CoCa",
        paper="arXiv 2205.01917",
        family="several targets",
        terms=(CAPTION, replace(CAPTION_TOKENS, weight=2.0)),
        differs="The caption's encoder and decoder share no layers, and both read the picture's "
        "cells without attention pooling; as CLIP here.",
    ),
    "locca": Method(
        title="LocCa",
        paper="arXiv 2403.19596",
        family="weakly supervised",
        terms=(CAPTION_TOKENS, GROUNDED_CAPTION, REFERRING_BOX),
        differs="Its authors published no code. Each of the three tasks has a decoder of its own, "
        "in the place of one that is told the task by a prefix; a coordinate is a token of its own "
        "beside the text vocabulary; all tokens of a region but the start of its text are "
        "predicted, one after another, of up to four regions that the view shows.",
    ),
    "autoencoder": Method(
        title="Auto-encoder",
        paper="table 1",
        family="intra-view",
        terms=(pixels(name="pixels", predictor="linear"),),
    ),
    "dense_distillation": Method(
        title="Dense distillation (FD)",
        paper="arXiv 2205.14141",
        family="intra-view",
        terms=(features(name="features", encoder="frozen", predictor="linear"),),
        differs="Squared distance instead of smooth L1.",
    ),
    "global_distillation": Method(
        title="Global distillation",
        paper="table 1",
        family="intra-view",
        terms=(
            embedding(
                name="embedding",
                view="same",
                encoder="frozen",
                likelihood="boltzmann",
                regulariser="negatives",
            ),
        ),
    ),
    "mae": Method(
        title="MAE",
        paper="arXiv 2111.06377",
        family="intra-view",
        terms=(pixels(name="pixels"),),
        mode="masked",
        mask_ratio=0.75,
    ),
    "data2vec": Method(
        title="data2vec",
        paper="arXiv 2202.03555",
        family="intra-view",
        terms=(features(name="features"),),
        mode="masked",
        mask_ratio=0.6,
        mask_block=2,
        differs="Targets are the last layer's tokens, not the mean of the last K layers'; squared "
        f"distance instead of smooth L1; a decoder predicts them; {BLOCKS}.",
    ),
    "milan": Method(
        title="MILAN",
        paper="arXiv 2208.06049",
        family="intra-view",
        terms=(features(name="features", encoder="frozen"),),
        mode="masked",
        mask_ratio=0.75,
        differs="Cells are hidden at random, not by the teacher's attention, and hidden ones alone "
        "are asked; squared distance to layer-normed features, not the cosine; the decoder changes "
        "the tokens shown too.",
    ),
    "masked_global": Method(
        title="Masked prediction of a global feature",
        paper="table 1",
        family="intra-view",
        terms=(embedding(name="embedding", view="same", predictor="projector_predictor"),),
        mode="masked",
        mask_ratio=0.6,
        mask_block=2,
    ),
    "novel_view": Method(
        title="Novel view synthesis",
        paper="table 1",
        family="inter-view",
        terms=(pixels(name="pixels", view="other"),),
    ),
    "densecl": Method(
        title="DenseCL",
        paper="arXiv 2011.09157",
        family="inter-view",
        terms=(
            embedding(
                name="embedding",
                likelihood="boltzmann",
                regulariser="queue",
                temperature=0.2,
                output_norm=False,
                weight=0.5,
            ),
            features(
                name="cells",
                view="other",
                predictor="projector",
                likelihood="boltzmann",
                regulariser="queue",
                temperature=0.2,
                weight=0.5,
            ),
        ),
        differs="The picture's projector has batch norm; that of the cells has GELU for ReLU.",
    ),
    "moco_v3": Method(
        title="MoCo v3",
        paper="arXiv 2104.02057",
        family="inter-view",
        terms=(
            embedding(
                name="embedding",
                symmetric=True,
                predictor="projector_predictor",
                likelihood="boltzmann",
                regulariser="negatives",
                temperature=0.2,
                weight=0.8,  # both directions' sum, each times 2 tau
            ),
        ),
        differs=f"{POOLING}; no batch norm after the predictor; patch embedding is learnt.",
    ),
    "simclr": Method(
        title="SimCLR",
        paper="arXiv 2002.05709",
        family="inter-view",
        terms=(SIMCLR,),
        differs="Batch norm takes the statistics of each view, not of both together.",
    ),
    "byol": Method(
        title="BYOL",
        paper="arXiv 2006.07733",
        family="inter-view",
        terms=(
            embedding(
                name="embedding",
                symmetric=True,
                predictor="projector_predictor",
                output_norm=False,
                weight=4.0,  # both directions' sum of |u - v|^2 = 2 - 2 cos
            ),
        ),
    ),
    "simsiam": Method(
        title="SimSiam",
        paper="arXiv 2011.10566",
        family="inter-view",
        terms=(
            embedding(
                name="embedding",
                symmetric=True,
                encoder="shared",
                predictor="projector_predictor",
            ),
        ),
    ),
    "barlow_twins": Method(
        title="Barlow Twins",
        paper="arXiv 2103.03230",
        family="inter-view",
        terms=(
            embedding(
                name="embedding",
                encoder="shared",
                regulariser="cross_correlation",
                output_norm=False,
            ),
        ),
    ),
    "vicreg": Method(
        title="VICReg",
        paper="arXiv 2105.04906",
        family="inter-view",
        terms=(
            embedding(
                name="embedding",
                encoder="shared",
                regulariser="variance_covariance",
                output_norm=False,
            ),
        ),
    ),
    "unigrad": Method(
        title="UniGrad",
        paper="arXiv 2112.05141",
        family="inter-view",
        terms=(embedding(name="embedding", symmetric=True, regulariser="running_correlation"),),
    ),
    "dino": Method(
        title="DINO",
        paper="arXiv 2104.14294",
        family="inter-view",
        terms=(prototypes(name="prototypes", symmetric=True),),
        local_views=True,
        differs=f"{POOLING}; the teacher's temperature is 0.04 from the start.",
    ),
    "siameseim_pixel": Method(
        title="SiameseIM, pixels",
        paper="arXiv 2206.01204",
        family="inter-view",
        terms=(pixels(name="pixels", view="other"),),
        mode="masked",
        mask_ratio=0.6,
        mask_block=2,
        differs=f"{BLOCKS.capitalize()}.",
    ),
    "siameseim": Method(
        title="SiameseIM",
        paper="arXiv 2206.01204",
        family="inter-view",
        terms=(
            features(
                name="features", view="other", regulariser="covariance", standardise="running"
            ),
        ),
        mode="masked",
        mask_ratio=0.6,
        mask_block=2,
        differs=f"{BLOCKS.capitalize()}; "
        "layer norm in place of the predictor's batch norm; targets are standardised by "
        "running statistics in place of a projector with batch norm, and decorrelated by their "
        "covariance, not by their second moment; patch embedding is learnt.",
    ),
    "msn": Method(
        title="MSN",
        paper="arXiv 2204.07141",
        family="inter-view",
        terms=(prototypes(name="prototypes", regulariser="mean_entropy"),),
        mode="masked",
        mask_ratio=0.3,
        local_views=True,
        differs=f"{POOLING}; each picture of a batch has a mask of its own.",
    ),
    "mixmim": Method(
        title="MixMIM",
        paper="arXiv 2205.13137",
        family="intra-view",
        terms=(pixels(name="pixels"),),
        mode="own_image",
        mask_per_batch=True,
        differs="Images are mixed as pixels, by whole patches, and not as embeddings.",
    ),
    "ibot": with_mask_tokens(
        title="iBOT",
        paper="arXiv 2111.07832",
        family="several targets",
        terms=IBOT,
        differs=f"{MASKS} {HALF} Pictures and cells have a head each; the teacher's temperature is "
        "0.04 from the start; the centre of cells is that of the hidden ones.",
    ),
    "dinov2": with_mask_tokens(
        title="DINOv2",
        paper="arXiv 2304.07193",
        family="several targets",
        terms=(
            *IBOT,
            KOLEO,
        ),
        differs=f"{MASKS} {HALF} Targets are centred, as in its authors' configuration for "
        "ImageNet-1k; those of their largest models are balanced (regulariser joint_sinkhorn). "
        "Pictures and cells have a head each; the teacher's temperature is 0.04 from the start.",
    ),
    "dinov3": with_mask_tokens(
        title="DINOv3",
        paper="arXiv 2508.10104",
        family="several targets",
        terms=(
            prototypes(name="prototypes", symmetric=True, regulariser="joint_sinkhorn"),
            cell_prototypes(name="cells", symmetric=True, regulariser="joint_sinkhorn"),
            KOLEO,
            Term(
                name="gram",
                target="gram",
                encoder="snapshot",
                predictor="none",
                likelihood="gaussian",
                regulariser="stop_gradient",
                weight=2.0,
            ),
        ),
        differs=f"{MASKS} {HALF} The Gram matrix is of one global view, at its own resolution, and "
        "of the mean over all pairs of cells; its weight is there from the first step, where the "
        "paper adds it late; the teacher's temperature is 0.04 from the start.",
    ),
    "tips": with_mask_tokens(
        title="TIPS",
        paper="arXiv 2410.16512",
        family="several targets",
        terms=(
            CAPTION,
            *IBOT,
        ),
        differs=f"{MASKS} One caption a picture, where the paper has a noisy and a synthetic one, "
        "each with a token of its own. Both global views predict each other; small views are "
        "matched with the caption, too; terms weigh alike.",
    ),
    "siglip2": with_mask_tokens(
        title="SigLIP 2",
        paper="arXiv 2502.14786",
        family="several targets",
        terms=(
            SIGMOID,
            CAPTION_TOKENS,
            *IBOT,
        ),
        differs=f"{MASKS} Whole captions are written, no boxes and no regions (LocCa); assignments "
        "are learnt from the first step, not in the last fifth of the run; small views are matched "
        "with the caption, too; terms weigh alike.",
    ),
    "lejepa": Method(
        title="LeJEPA",
        paper="arXiv 2511.08544",
        family="inter-view",
        terms=(
            Term(
                name="views",
                target="mean_embedding",
                view="other",
                encoder="shared",
                predictor="projector",
                likelihood="gaussian",
                regulariser="sigreg",
                output_norm=False,
            ),
        ),
        local_views=True,
        differs=f"{POOLING}.",
    ),
    "radio": Method(
        title="RADIO with PHI-S",
        paper="arXiv 2410.01680",
        family="intra-view",
        terms=radio(None),
        differs="One teacher, objective.teacher; `methods.radio` has the two terms of each of "
        "several. A teacher's picture is the mean of its cells, not its class token; cells are "
        "predicted by a linear layer; views are of one size.",
    ),
    "slip": Method(
        title="SLIP",
        paper="arXiv 2112.12750",
        family="several targets",
        terms=(CAPTION, SIMCLR),
        differs="The caption is matched with one of both views, not with a third, weaker "
        "one; as CLIP here.",
    ),
    "m3i": Method(
        title="M3I",
        paper="arXiv 2211.09807",
        family="M3I",
        terms=m3i(),
        mode="joint",
        mask_block=2,
        local_views=True,
        differs="Its authors published no code. Targets are standardised by running statistics and "
        "decorrelated by their covariance; every image of an input is told apart by its own "
        "cells, which both its heads and the decoder are given; small views are inputs too. Which "
        "weights the terms had is not known: here dense ones weigh three times as much as labels.",
    ),
}
