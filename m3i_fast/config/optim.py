"""The optimiser and the moving average of a run, with their schedules' ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from m3i_fast.config.fields import Checked, Conflict, unmet

# Whose code there is of an optimiser; a builder of each is in engine/optim/optimizers.py.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "adamw": ("torch", "te", "apex"),
    "lamb": ("torch", "apex"),
    "lars": ("torch",),
}
APEX_LAMB_DECAYS = "> 0 with optim.name = lamb and optim.impl = apex, which adapts only what decays"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(Checked):
    """Choose the optimiser, its schedules, and the bound of the gradient norm."""

    name: Literal["adamw", "lamb", "lars"] = "adamw"
    """The optimiser. lamb and lars, for large batches, scale the step of every tensor that decays
    by its norm; lars is SGD with momentum otherwise, and wants a far larger lr."""
    impl: Literal["auto", "torch", "te", "apex"] = "auto"
    """Implementation: auto is torch's; te is Transformer Engine's FusedAdam, apex NVIDIA Apex's
    FusedAdam or FusedLAMB, each on a GPU where it is installed."""
    lr: float = 1e-3
    """Peak learning rate, for this batch size."""
    final_lr: float = 0.0
    """Learning rate at the last step."""
    warmup_fraction: float = 0.025
    """Share of the steps in which the learning rate rises linearly (SiameseIM: 40 of 1600
    epochs)."""
    lr_decay: Literal["cosine", "linear", "sqrt"] = "cosine"
    """How the learning rate falls to final_lr: by half a cosine, a line, or 1 - sqrt of the share
    of the fall that is over (arXiv 2405.18392)."""
    lr_decay_fraction: float | None = None
    """Share of the steps, the last ones, in which it falls; before it is constant (WSD: 0.1 or
    0.2). none: all after the warm-up; 0: it does not fall."""
    weight_decay: float = 0.05
    """Decoupled weight decay (lamb and lars: within the scaled step); none on parameters of one
    dimension or less."""
    final_weight_decay: float = 0.05
    """Weight decay at the last step, reached by a cosine."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's and LAMB's betas (SiameseIM: 0.9, 0.95); the first is LARS's momentum."""
    eps: float | None = None
    """Number added to AdamW's and LAMB's root of the second moment; none: 1e-8, and 1e-6 for
    lamb."""
    layer_decay: float = 1.0
    """Learning rate of an image encoder's layer over that of the next (BEiT); 1: the same."""
    dcn_lr_scale: float = 1.0
    """Learning rate of DCNv3's offset, mask and gate projections over the others' (the official
    InternImage code's DCN_LR_MUL is of offsets and gates, and none by default)."""
    freeze_patch_embed: bool = False
    """Leave the patch embedding as it was drawn (MoCo v3, for stability); InternImage: its stem."""
    freeze_encoder: bool = False
    """Leave the image encoder as it begins, which --init gives weights: heads, decoders and the
    text encoder train on its features (LiT, locked-image tuning), and no backward pass runs through
    it."""
    matrices: Literal["adamw", "muon"] = "adamw"
    """Optimiser of the weight matrices of Transformer blocks; AdamW updates all else. muon
    orthogonalises their momentum: more is learnt a step, for 15 to 20 small products a matrix."""
    muon_lr: float = 0.02
    """Muon's peak learning rate; it follows lr's schedule."""
    clip_grad_norm: float = 1.0
    """Bound of the global gradient norm; 0 turns clipping off."""

    def place(self) -> str:
        return "optim."

    def conflicts(self) -> Iterator[Conflict]:
        yield from unmet(
            self,
            lr=(self.lr > 0, "> 0"),
            muon_lr=(self.muon_lr > 0, "> 0"),
            final_lr=(self.final_lr >= 0, ">= 0"),
            weight_decay=(self.weight_decay >= 0, ">= 0"),
            final_weight_decay=(self.final_weight_decay >= 0, ">= 0"),
            warmup_fraction=(0 <= self.warmup_fraction <= 1, "0 to 1"),
            lr_decay_fraction=(
                self.lr_decay_fraction is None
                or 0 <= self.lr_decay_fraction <= 1 - self.warmup_fraction + 1e-9,  # 0.9 and 0.1
                "none, or 0 to 1 - optim.warmup_fraction",
            ),
            clip_grad_norm=(self.clip_grad_norm >= 0, ">= 0"),
            betas=(all(0 <= beta < 1 for beta in self.betas), "0 <= beta < 1"),
            eps=(self.eps is None or self.eps > 0, "> 0 or none"),
            layer_decay=(0 < self.layer_decay <= 1, "0 < decay <= 1"),
            dcn_lr_scale=(self.dcn_lr_scale > 0, "> 0"),
            matrices=(
                self.matrices == "adamw" or self.name == "adamw",
                f"adamw with optim.name = {self.name}",
            ),
            impl=(
                self.used_impl in IMPLEMENTATIONS[self.name],
                f"{' or '.join(('auto', *IMPLEMENTATIONS[self.name]))} with optim.name = "
                f"{self.name}",
            ),
        )
        if self.freeze_encoder:
            still = "with optim.freeze_encoder, of which nothing learns"
            yield from unmet(
                self,
                layer_decay=(self.layer_decay == 1, f"1 {still}"),
                dcn_lr_scale=(self.dcn_lr_scale == 1, f"1 {still}"),
                freeze_patch_embed=(not self.freeze_patch_embed, f"False {still}"),
            )
        if (self.name, self.impl) == ("lamb", "apex"):
            for name in ("weight_decay", "final_weight_decay"):
                yield from unmet(self, **{name: (getattr(self, name) != 0, APEX_LAMB_DECAYS)})

    @property
    def used_impl(self) -> str:
        """Return the implementation that impl chooses."""
        return "torch" if self.impl == "auto" else self.impl

    def warmup_steps(self, num_steps: int) -> int:
        """Return how many of a run's steps warm up."""
        return round(self.warmup_fraction * num_steps)

    def decay_steps(self, num_steps: int) -> int:
        """Return in how many of a run's steps the learning rate falls."""
        after = num_steps - self.warmup_steps(num_steps)
        if self.lr_decay_fraction is None:
            return after
        return min(round(self.lr_decay_fraction * num_steps), after)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig(Checked):
    """Choose the momentum of the average encoder, which is the target network."""

    momentum: float = 0.995
    """Momentum at the first step (SiameseIM: 0.995)."""
    final_momentum: float = 1.0
    """Momentum at the last step, reached by a cosine."""

    def place(self) -> str:
        return "ema."

    def conflicts(self) -> Iterator[Conflict]:
        if not 0 <= self.momentum <= self.final_momentum <= 1:
            yield (
                "momentum",
                "expected 0 <= momentum <= final_momentum <= 1, got "
                f"{self.momentum} and {self.final_momentum}",
            )
