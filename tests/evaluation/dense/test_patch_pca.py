import numpy as np
import pytest
import torch
from skimage import data
from sklearn.decomposition import PCA
from torch import Tensor

from m3i_fast.evaluation.dense.patch_pca import patch_pca


def _tokens() -> Tensor:
    """8 x 8 pixel patches of two photographs as tokens: correlated, as features are."""
    pictures = torch.from_numpy(
        np.stack(
            [data.astronaut(), data.coffee()[:400, :400].repeat(2, 0).repeat(2, 1)[:512, :512]]
        )
    )
    patches = pictures[:, ::4, ::4].unfold(1, 8, 8).unfold(2, 8, 8)
    return patches.reshape(2, 256, -1).float()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("images", [slice(0, 2), slice(0, 1), slice(1, 2)])
def test_colours_equal_sklearn_up_to_the_fixed_sign(images: slice, reverse: bool) -> None:
    tokens = _tokens()[images]
    tokens = tokens.flip(-1) if reverse else tokens
    rows = tokens.flatten(0, 1).double().numpy()
    oracle = PCA(n_components=3, svd_solver="full").fit(rows)
    flat = oracle.components_
    sign = np.sign(flat[np.arange(3), np.abs(flat).argmax(1)])
    projected = oracle.transform(rows) * sign
    low, high = np.percentile(projected, [1, 99], axis=0)
    expected = np.clip((projected - low) / (high - low), 0, 1).reshape(len(tokens), 256, 3)
    torch.testing.assert_close(
        patch_pca(tokens), torch.from_numpy(expected).float(), atol=1e-5, rtol=0
    )


def test_colours_fill_the_range_and_ignore_offset_and_scale() -> None:
    tokens = _tokens()
    colours = patch_pca(tokens)
    assert colours.shape == (2, 256, 3)
    assert float(colours.amin()) == 0 and float(colours.amax()) == 1
    assert 0.01 < float((colours == 1).double().mean()) < 0.03  # 1 % clipped at the top
    torch.testing.assert_close(patch_pca(tokens * 7 + 100), colours, atol=1e-4, rtol=0)


def test_collapsed_tokens_give_a_flat_picture_not_nan() -> None:
    assert bool(patch_pca(torch.full((1, 16, 8), 2.5)).isfinite().all())


def test_too_few_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens: .* got \(1, 16, 2\)"):
        patch_pca(torch.zeros(1, 16, 2))
