"""Zero-shot measures of an image and a text encoder: retrieval both ways, classes from prompts.

Legend: Q queries, G gallery items, E embedding width, C classes, P prompts a class.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor


def retrieval_ranks(
    queries: Tensor,  # [Q, E]
    gallery: Tensor,  # [G, E]
    query_group: Tensor,  # [Q] int64
    gallery_group: Tensor,  # [G] int64
) -> Tensor:  # [Q] int64, 0 = found first
    """Return the rank, by cosine, of the best gallery item of each query's group.

    A tie counts against the query: an encoder that maps everything to one point ranks last, not
    first. Hits at k are `ranks < k`. Raises ValueError when a query has no item in the gallery or
    an embedding is not finite.
    """
    for name, tensor in (("queries", queries), ("gallery", gallery)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: expected finite embeddings, got NaN or infinity")
    cosine = F.normalize(queries.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).T
    right = query_group[:, None] == gallery_group[None, :]
    if not bool(right.any(1).all()):
        missing = int(query_group[~right.any(1)][0])
        raise ValueError(
            f"gallery_group: expected an item of every query's group, got none of {missing}"
        )
    best = cosine.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return (~right & (cosine >= best)).sum(1)


def nearest(
    queries: Tensor,  # [Q, E]
    gallery: Tensor,  # [G, E]
    *,
    k: int,
) -> Tensor:  # [Q, k] int64, gallery rows, most similar first
    """Return the k gallery items of highest cosine; of equal ones the earlier row comes first."""
    cosine = F.normalize(queries.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).T
    return cosine.argsort(dim=1, descending=True, stable=True)[:, :k]


def recall_chance(*, k: int, num_gallery: int) -> float:
    """Return recall at k of a random order of a gallery with one right item: k / G, at most 1."""
    return min(k / num_gallery, 1.0)


def prompt_of(template: str, class_name: str) -> str:
    """Put a class's name into the place of {}, its underscores as spaces: apple_pie."""
    return template.replace("{}", class_name.replace("_", " "))


def says_nothing(class_name: str) -> bool:
    """Return whether a name is a number, as of an index or of WordNet: a prompt cannot use it."""
    return re.fullmatch(r"n?\d+", class_name) is not None


def class_embeddings(prompts: Tensor) -> Tensor:  # [C, P, E] -> [C, E] fp32, unit length
    """Return the normalised mean of each class's unit prompt embeddings, as CLIP's ensembles."""
    return F.normalize(F.normalize(prompts.float(), dim=-1).mean(1), dim=-1)


def zero_shot_predict(
    images: Tensor,  # [N, E]
    classes: Tensor,  # [C, E]
) -> Tensor:  # [N] int64
    """Return the class whose embedding has the highest cosine with the image's."""
    return (F.normalize(images.float(), dim=-1) @ F.normalize(classes.float(), dim=-1).T).argmax(1)
