"""The objective as data: its terms, and the sizes of their predictors.

A term names what is predicted, by what, under which likelihood, and what keeps the target from
collapsing: the plug-ins of the paper's equation  L = sum_k w_k * -log P_k(z_k | z_hat_k).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from m3i_fast.config.fields import NUMBERS, SOME_ROWS, WIDTHS, Checked, Conflict, unmet
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.objective.heads import CaptionerConfig, DecoderConfig, ProjectorConfig
from m3i_fast.config.objective.losses import LOSSES, LossKey
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.targets import TARGETS, Target

MAX_SCALE = 100.0
SHARPENING = ("centring", "sinkhorn", "joint_sinkhorn", "mean_entropy")
"""Regularisers whose targets are softmaxes over prototypes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Term(Checked):
    """Describe -log P(z | z_hat) of one target, a row of the paper's table 1."""

    name: str
    """Name of the term in metrics and tables."""
    target: str
    """Target z, a row of `targets.TARGETS`. category: embedding of the class;
    caption: embedding of the caption; caption_tokens: its tokens, one after another;
    grounded_caption: those of a region's box and then of its text; referring_box: of its text and
    then of its box; labels: which of many the picture has; numbers: of the picture; pixels: of a
    patch, normalised; features: of a patch; gram: the cosines of all pairs of patches; embedding:
    one of the view; prototypes: the view's assignment to them; cell_prototypes: that of a cell;
    summary: the encoder's own mean of the view, which nothing predicts; mean_embedding: the mean
    over both global views of their embeddings."""
    view: Literal["same", "other"] = "same"
    """View of the target: the input's, or another one of the same picture."""
    asked: Literal["first", "last", "all"] = "all"
    """Images of a mixed input for which a dense target is predicted."""
    encoder: Literal["none", "momentum", "shared", "frozen", "snapshot"] = "none"
    """Encoder of the target view: none (labels, pixels), the EMA of the image encoder, the image
    encoder itself (shared), a frozen one (`teacher`), or an earlier state of the EMA (snapshot),
    which is taken anew every `objective.snapshot_every` steps."""
    teacher: str | None = None
    """Frozen encoder of this term, in the place of `objective.teacher`: so a run has several. Such
    a term has a decoder of its own."""
    predictor: Literal[
        "none",
        "head",
        "captioner",
        "linear",
        "decoder",
        "mask_token",
        "projector",
        "projector_predictor",
    ]
    """Predictor of z_hat. none: the encoder's tokens themselves; head: mean over the tokens, then
    an MLP; captioner: causal Transformer over the caption, which reads the cells; linear: of each
    token; decoder: Transformer with mask tokens; mask_token: the encoder itself at a hidden cell,
    of which it gets a mask token, then an MLP (`mixing.hidden`); projector: MLP with batch norm,
    which the target's side has too; projector_predictor: another MLP on top of it, on the input's
    side alone."""
    likelihood: str
    """Likelihood. gaussian: squared distance; boltzmann: softmax over candidates; sigmoid: of each
    pair; or one that a loss of your own names."""
    regulariser: str
    """Regulariser, for the entropy H(p(z)); `m3i_fast.config.objective.losses.LOSSES` has the
    combinations."""
    column: str = ""
    """Named column of the data that holds an annotation; empty: the data set's class, or its
    captions. Regions have no such default."""
    reversal: float = 0.0
    """Factor of the gradient that the encoder gets with the opposite sign, so that it forgets the
    class, labels or numbers that the term's head learns to tell: a scanner, a hospital, a camera
    (gradient reversal, DANN's lambda). 0: the gradient as it is."""
    reversal_steps: Annotated[int, NUMBERS] = 0
    """Steps in which that factor rises from 0, as DANN's 2 / (1 + exp(-10 p)) - 1 of their share p;
    0: it is there from the first step."""
    mean: Literal["batch", "members"] = "batch"
    """Rows that a term of an annotation is the mean over, where not every picture has a target.
    batch: all rows of all ranks, those without a target as 0, so that the term is an expectation
    over samples and one labelled picture weighs the same in any batch; members: the rows that have
    a target, so that the only one of a batch weighs as much as a whole batch."""
    standardise: Literal["none", "running", "batch", "phi_s"] = "none"
    """Statistics by which each channel of a Gaussian's features is standardised before their layer
    norm, so that what all cells have in common is no target. running: by running mean and variance
    over steps and ranks, as DINO's centre, which leaves rows independent; batch: by those of the
    step's rows; phi_s: a frozen teacher's features, by one scale for all channels in a basis in
    which all have the same variance (PHI-S), in the place of the layer norm."""
    statistics: str | None = None
    """File with the mean and covariance of phi_s, which `objectives.phi_s.write_statistics` writes.
    None: those of the first `objective.phi_s_steps` steps."""
    symmetric: bool = False
    """Whether each of both views also predicts the other: the mean of both directions. With the
    predictor mask_token: whether both views predict their own hidden cells."""
    temperature: float = 0.1
    """Temperature of softmaxes over embeddings or prototypes; category and caption learn theirs."""
    target_temperature: float | None = None
    """Temperature of the softmax over prototypes that gives the target; none: its paper's, 0.04 of
    centring and joint_sinkhorn, 0.05 of sinkhorn, a quarter of `temperature` of mean_entropy."""
    target_warmup_steps: Annotated[int, NUMBERS] = 0
    """Steps in which the target's temperature goes from its paper's to `target_temperature`, in
    equal parts (DINO: 0.04 to 0.07 in the first 30 epochs)."""
    output_norm: bool = True
    """Whether the projector ends in a batch norm without affine."""
    weight: float = 1.0
    """Weight in the sum; 0 leaves the term out, with all that only it needs."""

    def place(self) -> str:
        return f"term {self.name!r}: "

    def conflicts(self) -> Iterator[Conflict]:
        if self.target not in TARGETS:
            yield (
                "target",
                f"expected one of {sorted(TARGETS)}, got {self.target!r}; a new one is added to "
                "m3i_fast.config.objective.targets.TARGETS",
            )
            return
        if self.loss_key not in LOSSES:
            known = sorted(key[1:] for key in LOSSES if key[0] == self.target)
            yield (
                "likelihood",
                f"of target {self.target} expected likelihood and regulariser among {known}, got "
                f"{self.loss_key[1:]}; a new one is added to "
                "m3i_fast.config.objective.losses.LOSSES",
            )
        compares_features = self.target == "features" and self.likelihood != "boltzmann"
        yield from unmet(
            self,
            predictor=(
                self.predictor in self.kind.predictors,
                f"one of {self.kind.predictors} for target {self.target}",
            ),
            view=(
                self.view in self.kind.views,
                f"{' or '.join(self.kind.views)} for target {self.target}",
            ),
            weight=(self.weight >= 0, ">= 0"),
            temperature=(self.temperature > 0, "> 0"),
            target_temperature=(
                self.target_temperature is None
                or (self.regulariser in SHARPENING and self.target_temperature > 0),
                f"none, or > 0 with a regulariser among {SHARPENING}",
            ),
            target_warmup_steps=(
                not self.target_warmup_steps or self.target_temperature is not None,
                "0 without target_temperature",
            ),
            mean=(
                self.mean == "batch" or self.is_annotation,
                f"batch for {self.target}, which every picture has (members is for annotations)",
            ),
            reversal=(
                self.reversal == 0
                or (
                    self.reversal > 0
                    and self.is_annotation
                    and self.kind.column not in ("text", "regions")
                ),
                f">= 0, and 0 for {self.target} (it is for category, labels and numbers)",
            ),
            reversal_steps=(not self.reversal_steps or self.reversal > 0, "0 without reversal"),
            teacher=(
                self.teacher is None or self.encoder == "frozen",
                f"none with encoder {self.encoder} (it is for frozen)",
            ),
            column=(
                self.kind.has_default or not self.kind.column or bool(self.column),
                f"the name of a column of {self.kind.column} for {self.target}",
            ),
            standardise=(
                self.standardise == "none" or compares_features,
                f"none for {self.target} under {self.likelihood} (it is for features under "
                "gaussian or cosine_smooth_l1)",
            ),
            statistics=(
                self.statistics is None or self.standardise == "phi_s",
                f"none with standardise {self.standardise} (it is for phi_s)",
            ),
        )
        is_fixed = (self.encoder, self.regulariser) == ("frozen", "stop_gradient")
        if self.standardise == "phi_s" and not is_fixed:
            yield (
                "standardise",
                "expected phi_s with encoder frozen and regulariser stop_gradient, got it with "
                f"{self.encoder} and {self.regulariser}; running is for features that move",
            )
        if self.column and not self.kind.column:
            yield "column", f"expected none for {self.target}, got {self.column!r}"
        yield from self._encoder_conflicts()
        yield from self._symmetry_conflicts()

    def _encoder_conflicts(self) -> Iterator[Conflict]:
        if self.encoder not in self.kind.encoders:
            yield (
                "encoder",
                f"expected {' or '.join(self.kind.encoders)} for {self.target}, got {self.encoder}",
            )
        if self.encoder == "shared" and self.view != "other":
            yield (
                "encoder",
                "expected momentum or frozen, or shared with a target of the other view, got "
                f"shared with {self.target} of the {self.view} view",
            )

        if self.predictor == "mask_token" and self.view != "same":
            yield "view", "expected same with the predictor mask_token, got other"

    def _symmetry_conflicts(self) -> Iterator[Conflict]:
        of_other_view = self.view == "other" and self.kind.of == "view"
        if self.symmetric and not of_other_view and self.predictor != "mask_token":
            yield (
                "symmetric",
                "expected an embedding or prototypes of the other view, or the predictor "
                f"mask_token, got {self.target} of the {self.view} view by {self.predictor}",
            )
        if self.symmetric and self.regulariser == "queue":
            yield (
                "symmetric",
                "expected False with a queue, which would hold the first direction's targets as "
                "negatives of the second, got True",
            )

    @property
    def loss_key(self) -> LossKey:
        """Return target, likelihood and regulariser, the key of the loss in `LOSSES`."""
        return self.target, self.likelihood, self.regulariser

    @property
    def kind(self) -> Target:
        """Return what is known of this kind of target."""
        return TARGETS[self.target]

    @property
    def target_encoder(self) -> str:
        """Return the name of the target's encoder, of which each frozen one has its own."""
        return f"frozen:{self.teacher}" if self.teacher is not None else self.encoder

    @property
    def layer_norms(self) -> bool:
        """Return whether a Gaussian's targets go through a layer norm, which would undo PHI-S."""
        return self.target == "features" and self.standardise != "phi_s"

    @property
    def is_dense(self) -> bool:
        """Return whether z is of single cells."""
        return self.kind.of == "cells"

    @property
    def is_annotation(self) -> bool:
        """Return whether z is an annotation of the picture, which some pictures lack."""
        return self.kind.of == "annotation"

    @property
    def decorrelates(self) -> bool:
        """Return whether predictions are kept apart by a matrix of all rows of a step."""
        return self.regulariser in ("decorrelation", "covariance")

    @property
    def sees_both_views(self) -> bool:
        """Return whether the trained encoder sees the other view too."""
        return self.symmetric or self.encoder == "shared"


def m3i() -> tuple[Term, ...]:
    """Return the terms of M3I, figure 2.

    The first image predicts its own view, the other one another view, both their category and
    caption. The paper does not tell the terms' weights. That of the dense ones is chosen on a part
    of the demo's training concepts, at equal time.
    """
    dense = {
        "weight": 3.0,
        "target": "features",
        "encoder": "momentum",
        "predictor": "decoder",
        "likelihood": "gaussian",
        "regulariser": "covariance",
        "standardise": "running",
    }
    label = {"predictor": "head", "likelihood": "boltzmann", "regulariser": "negatives"}
    return (
        Term(name="intra", view="same", asked="first", **dense),  # type: ignore[arg-type]
        Term(name="inter", view="other", asked="last", **dense),  # type: ignore[arg-type]
        Term(name="category", target="category", **label),  # type: ignore[arg-type]
        Term(name="caption", target="caption", **label),  # type: ignore[arg-type]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig(Checked):
    """Choose the terms of the loss, and the sizes of their predictors."""

    terms: tuple[Term, ...] = field(default_factory=m3i)
    """Terms of the sum; M3I's four by default."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Choice of the terms' weights."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    head_hidden_dim: Annotated[int, range(WIDTHS.stop)] = 2048
    """Width of the hidden layer of the heads of annotations; 0: one linear layer without bias
    in the place of two, as CLIP."""
    teacher: str | None = None
    """Frozen encoder: a run directory, RUN,which=ema for the moving average of a run's encoder,
    timm:NAME or timm:NAME:FILE."""
    teacher_cache: str | None = None
    """Folder that keeps what frozen encoders say of every picture, so that they run once a picture
    and not at each step: filled before the first step, by all ranks, and read by later runs too. It
    needs data.augment False, views that are the same at every step. None: frozen encoders run in
    each step."""
    snapshot_every: Annotated[int, SOME_ROWS] = 10_000
    """Steps after which the snapshot is taken anew from the encoder's EMA: 10,000 in DINOv3."""
    sigma: float = 0.5**0.5
    """Standard deviation of the Gaussian likelihood; sqrt(1/2) gives SiameseIM's mean squared
    error."""
    decorrelation_weight: float = 0.02
    """Weight of the regularisers decorrelation and covariance, SiameseIM's value."""
    temperature: float = 0.07
    """Initial temperature of categories and captions; learnt, and kept from 0.01 up."""
    num_prototypes: Annotated[int, SOME_ROWS] = 4096
    """Prototypes of each term over prototypes (DINO, iBOT, MSN, SwAV)."""
    queue_length: Annotated[int, SOME_ROWS] = 65536
    """Embeddings of earlier batches that MoCo's queue holds."""
    phi_s_steps: Annotated[int, SOME_ROWS] = 3000
    """Steps of which phi_s takes mean and covariance where no file has them; its basis follows them
    after 1, 2, 4, 8 steps and so on, and stays as it is after the last one."""
    num_slices: Annotated[int, SOME_ROWS] = 1024
    """Random directions by which sigreg tests embeddings, drawn anew at each step."""
    sigreg_weight: float = 0.05
    """Weight of sigreg beside the prediction of mean_embedding, whose own is one less it: LeJEPA's
    only hyper-parameter."""

    def place(self) -> str:
        return "objective."

    def conflicts(self) -> Iterator[Conflict]:
        names = [term.name for term in self.terms]
        if len(set(names)) != len(names):
            yield "terms", f"expected distinct names, got {names}"
        wrong = [name for name in names if not name.isidentifier()]
        if wrong:
            yield "terms", f"expected letters, digits and _ in names, got {wrong}"
        if not any(term.weight > 0 for term in self.terms):
            yield "terms", "expected a weight > 0, got none"
        least = 1 / MAX_SCALE
        yield from unmet(
            self,
            temperature=(self.temperature >= least, f">= {least}"),
            sigreg_weight=(0 <= self.sigreg_weight <= 1, "a share in [0, 1]"),
        )
        if self.uses(encoder="snapshot") and not self.uses(encoder="momentum"):
            yield (
                "terms",
                "expected a term with encoder momentum beside those with encoder snapshot, an "
                "earlier state of it, got none",
            )
        linear = [t.name for t in self.active_terms if t.predictor == "linear"]
        if linear and (self.mixing.mode != "none" or self.uses(predictor="linear", view="other")):
            yield (
                "terms",
                "expected predictor decoder, or linear with mixing.mode none and the same view, as "
                f"it predicts the cell of its own token, got linear of {linear}",
            )
        yield from self._mask_token_conflicts()
        views = [t.name for t in self.active_terms if not t.is_annotation]
        if self.mixing.mode == "blend" and views:
            yield (
                "mixing.mode",
                "expected blend, which leaves no image's pixels alone, with terms of annotations "
                f"only, got {views}",
            )

    def _mask_token_conflicts(self) -> Iterator[Conflict]:
        in_place = [t.name for t in self.active_terms if t.predictor == "mask_token"]
        if in_place and not self.mixing.encodes_hidden:
            yield (
                "mixing.hidden",
                "expected mask_token, with mixing.mode masked, for the predictor mask_token of "
                f"{in_place}, got {self.mixing.hidden} with mode {self.mixing.mode}",
            )
        decoded = [t.name for t in self.active_terms if t.predictor == "decoder"]
        if decoded and self.mixing.encodes_hidden:
            yield (
                "mixing.hidden",
                f"expected dropped with the predictor decoder of {decoded}, which has mask tokens "
                "of its own, got mask_token",
            )

    @property
    def active_terms(self) -> tuple[Term, ...]:
        """Return the terms whose weight is above 0."""
        return tuple(term for term in self.terms if term.weight > 0)

    @property
    def teachers(self) -> dict[str, str | None]:
        """Return the frozen encoders in use by `Term.target_encoder`: what to load, or None."""
        frozen = (term for term in self.active_terms if term.encoder == "frozen")
        return {term.target_encoder: term.teacher or self.teacher for term in frozen}

    @property
    def num_encoded_views(self) -> int:
        """Return how many global views of each input the encoder encodes, 1 or 2."""
        return 1 + any(term.sees_both_views for term in self.active_terms)

    def projects(self, term: Term) -> bool:
        """Return whether a term's dense targets go through a projector that follows by EMA."""
        of_average = (term.target, term.encoder, term.predictor) == (
            "features",
            "momentum",
            "decoder",
        )
        return of_average and self.decoder.projector != "none"

    def uses(self, **facts: object) -> bool:
        """Return whether an active term has these values: `uses(target="caption")`."""
        return any(
            all(getattr(term, name) == value for name, value in facts.items())
            for term in self.active_terms
        )

    @property
    def reads_cells(self) -> bool:
        """Return whether a term reads single cells, and not means over a picture's tokens alone."""
        return any(term.kind.summaries == "none" for term in self.active_terms)

    def vision_conflicts(self, vision: VisionConfig) -> Iterator[Conflict]:
        """Yield what keeps this encoder from being trained with this mixing."""
        yield from vision.encoder_conflicts()
        yield from self.mixing.grid_conflicts(vision.grid)
        yield from self.mixing.cell_conflicts(
            alone=vision.encodes_cells_alone, multiple=vision.mask_multiple
        )
