"""Zero-shot classification by prompts, as CLIP (arXiv 2103.00020, section 3.1.4).

Legend: M pictures, K classes, P prompts a class, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m3i_fast.evaluation.feature_rows import Index, Rows, row_blocks, unit
from m3i_fast.evaluation.retrieval.zero_shot import class_embeddings, prompt_of

MOST_RANKED = 5
BLOCK = 8192
PROMPTS_A_BATCH = 1024


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """What prompts say of each picture."""

    ranked: Index  # [M, 5] classes, the most similar first; fewer columns for fewer classes
    confidence: np.ndarray  # [M] fp64, the probability of the first


@torch.no_grad()
def embed_classes(
    encode_texts: Callable[[Sequence[str]], Tensor],  # texts -> [n, E]
    class_names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:  # [K, E] fp32 of unit length
    """Embed each class as the unit mean of the unit embeddings of its prompts.

    templates: with {} in the place of the class's name, as `prompt_of` has it. Raises ValueError
    for an embedding that is not finite.
    """
    classes_a_batch = max(PROMPTS_A_BATCH // len(templates), 1)
    embedded = []
    for start in range(0, len(class_names), classes_a_batch):
        names = class_names[start : start + classes_a_batch]
        prompts = [prompt_of(template, name) for name in names for template in templates]
        rows = encode_texts(prompts)
        if not bool(rows.isfinite().all()):
            raise ValueError("prompts: expected finite embeddings, got NaN or infinity")
        embedded.append(class_embeddings(rows.reshape(len(names), len(templates), -1)))
    return torch.cat(embedded)


@torch.no_grad()
def classify_by_prompts(
    images: Rows,  # [*, E]
    rows: Index,  # [M]
    classes: Tensor,  # [K, E] of unit length
    *,
    scale: float,
    device: torch.device | str = "cpu",
) -> ZeroShot:
    """Rank the classes of each picture by cosine; the softmax of scale * cosine is its confidence.

    Only the first five classes are kept, so memory does not grow with K.
    """
    classes = classes.to(device)
    kept = min(MOST_RANKED, len(classes))
    ranked = np.empty((len(rows), kept), dtype=np.int64)
    confidence = np.empty(len(rows))
    for place, block in row_blocks(images, rows, size=BLOCK, device=device):
        cosine = unit(block) @ classes.T
        ranked[place] = cosine.topk(kept, dim=1).indices.cpu().numpy()
        confidence[place] = (scale * cosine.double()).softmax(1).amax(1).cpu().numpy()
    return ZeroShot(ranked, confidence)
