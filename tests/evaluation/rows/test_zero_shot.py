"""Zero-shot has open_clip's own classifier, and scikit-learn's accuracy of its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor

from m3i_fast.evaluation.rows import zero_shot
from m3i_fast.evaluation.rows.zero_shot import classify_by_prompts, embed_classes

CLASSES = ["cat", "dog", "red apple", "green tree", "house", "boat", "hand"]
TEMPLATES = ["a photo of a {}.", "a drawing of the {}.", "{}"]


def small_clip() -> Any:
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()


def test_figures_are_those_of_open_clip(monkeypatch: Any) -> None:
    monkeypatch.setattr(zero_shot, "PROMPTS_A_BATCH", 8)  # two classes at a time
    monkeypatch.setattr(zero_shot, "BLOCK", 16)
    model = small_clip()
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    weight = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, TEMPLATES)

    def encode(texts: Sequence[str]) -> Tensor:
        found: Tensor = model.encode_text(tokenizer(list(texts)))
        return found

    classes = embed_classes(encode, CLASSES, TEMPLATES)
    torch.testing.assert_close(classes, weight.T, rtol=0, atol=1e-6)
    images = torch.randn(100, 24) + 3 * weight.T[torch.arange(100) % 7]
    label = torch.arange(100) % 7
    rows = np.arange(100)
    found = classify_by_prompts(images.numpy(), rows, classes, scale=20.0)
    logits = 20 * torch.nn.functional.normalize(images, dim=-1) @ weight
    top1, top5 = (top_k_accuracy_score(label, logits, k=k) for k in (1, 5))
    hits = found.ranked == label.numpy()[:, None]
    assert (hits[:, 0].mean(), hits.any(1).mean()) == (top1, top5)
    assert top1 < top5
    np.testing.assert_allclose(found.confidence, logits.softmax(1).amax(1).numpy(), atol=1e-5)


def test_fewer_classes_than_five_are_all_ranked() -> None:
    found = classify_by_prompts(np.eye(3, dtype="f4"), np.arange(3), torch.eye(3), scale=1.0)
    assert found.ranked.shape == (3, 3)
    assert np.array_equal(found.ranked[:, 0], [0, 1, 2])


def test_prompts_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="prompts: expected finite embeddings"):
        embed_classes(lambda texts: torch.full((len(texts), 4), torch.nan), ["cat"], ["a {}"])
