"""The terms as modules, each of which computes -log P(z | z_hat) of a step.

Legend, beside that of step_context: Q cells predicted, E embedding width, K prototypes.
"""

from __future__ import annotations

from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.objectives.terms.base import Sizes, TermModule, copy_state, momentum_copy
from m3i_fast.objectives.terms.caption_tokens import CaptionTokens, TextTokens
from m3i_fast.objectives.terms.columns import Labels, Numbers
from m3i_fast.objectives.terms.dense import Dense, DenseContrast, dense_dim
from m3i_fast.objectives.terms.gram import Gram
from m3i_fast.objectives.terms.labels import Annotation, Caption, Category, Label
from m3i_fast.objectives.terms.regions import RegionTokens
from m3i_fast.objectives.terms.views import Embedding, PrototypeTerm

__all__ = [
    "Annotation",
    "Caption",
    "CaptionTokens",
    "Category",
    "Dense",
    "DenseContrast",
    "Embedding",
    "Gram",
    "Label",
    "Labels",
    "Numbers",
    "PrototypeTerm",
    "RegionTokens",
    "Sizes",
    "TermModule",
    "TextTokens",
    "build_term",
    "copy_state",
    "dense_dim",
    "momentum_copy",
]


def build_term(term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> TermModule:
    """Build the module of a term, with its parameters."""
    module: TermModule = term.kind.builder()(term, cfg, sizes)
    return module
