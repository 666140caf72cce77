import numpy as np
import open_clip
import pytest
import torch
from open_clip_train.train import get_clip_metrics
from torch import Tensor

from m3i_fast.evaluation.retrieval.zero_shot import (
    class_embeddings,
    nearest,
    prompt_of,
    recall_chance,
    retrieval_ranks,
    says_nothing,
    zero_shot_predict,
)


def _pairs(num: int = 150) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(num, 16, generator=rng)
    return image, image + 1.2 * torch.randn(num, 16, generator=rng)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_equals_open_clip(k: int) -> None:
    image, text = (torch.nn.functional.normalize(x, dim=-1) for x in _pairs())
    oracle = get_clip_metrics(image, text, torch.tensor(1.0))
    group = torch.arange(len(image))
    to_text = (retrieval_ranks(image, text, group, group) < k).double().mean()
    to_image = (retrieval_ranks(text, image, group, group) < k).double().mean()
    assert 0.1 < float(to_text) < 1
    assert float(to_text) == pytest.approx(oracle[f"image_to_text_R@{k}"])
    assert float(to_image) == pytest.approx(oracle[f"text_to_image_R@{k}"])


def test_any_item_of_the_group_is_right() -> None:
    image, text = _pairs(60)
    image_group, text_group = torch.arange(60) % 20, torch.arange(60) % 30 % 20
    got = retrieval_ranks(text, image, text_group, image_group)
    cosine = torch.cosine_similarity(text[:, None], image[None], dim=-1).numpy()
    for query in range(60):  # brute force: walk down the list to the first right item
        order = np.argsort(-cosine[query])
        right = image_group.numpy()[order] == int(text_group[query])
        assert int(got[query]) == int(np.flatnonzero(right)[0])


def test_a_collapsed_encoder_ranks_last() -> None:
    same, group = torch.ones(9, 4), torch.arange(9)
    assert torch.equal(retrieval_ranks(same, same, group, group), torch.full((9,), 8))


def test_nearest_is_the_order_of_the_cosines() -> None:
    image, text = _pairs(40)
    cosine = torch.cosine_similarity(text[:, None], image[None], dim=-1).numpy()
    expected = torch.from_numpy(np.argsort(-cosine, axis=1, kind="stable")[:, :5].copy())
    assert torch.equal(nearest(text, image, k=5), expected)


def test_chance_is_what_a_shuffled_gallery_gives() -> None:
    rng = torch.Generator().manual_seed(0)
    group = torch.arange(50)
    hits = [
        retrieval_ranks(*torch.randn(2, 50, 8, generator=rng), group, group) < 5 for _ in range(100)
    ]
    assert float(torch.stack(hits).double().mean()) == pytest.approx(
        recall_chance(k=5, num_gallery=50), abs=0.015
    )
    assert recall_chance(k=5, num_gallery=3) == 1.0


def test_classes_from_prompts_equal_open_clip() -> None:
    model = open_clip.create_model("RN50", pretrained=None, precision="fp32")
    model.eval()
    tokenizer = open_clip.get_tokenizer("RN50")
    names = ["cat", "dog", "house"]
    templates = [lambda c: f"a picture of a {c}", lambda c: f"a drawing of a {c}"]
    with torch.no_grad():
        oracle = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
        texts = tokenizer([t(c) for c in names for t in templates])
        prompts = model.encode_text(texts).view(3, 2, -1)
    classes = class_embeddings(prompts)
    torch.testing.assert_close(classes, oracle.T, atol=1e-5, rtol=0)
    images = oracle.T[[2, 0, 1, 1]] * torch.tensor([[0.1], [1.0], [30.0], [2.0]])
    assert zero_shot_predict(images, classes).tolist() == [2, 0, 1, 1]


def test_bad_input_is_named() -> None:
    image, text = _pairs(5)
    group = torch.arange(5)
    with pytest.raises(ValueError, match="expected an item of every query's group, got none of 9"):
        retrieval_ranks(text, image, torch.tensor([0, 9, 2, 3, 4]), group)
    with pytest.raises(ValueError, match="gallery: expected finite embeddings"):
        retrieval_ranks(text, image * torch.nan, group, group)


def test_a_prompt_has_the_words_of_a_name() -> None:
    assert prompt_of("a photo of {}, a {}.", "apple_pie") == "a photo of apple pie, a apple pie."
    assert [says_nothing(name) for name in ("12", "n01440764", "n", "42nd_street")] == [
        True,
        True,
        False,
        False,
    ]
