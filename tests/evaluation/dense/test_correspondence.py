"""Finding patches again: coordinates as features must be found, and a loop must agree."""

import math

import pytest
import torch

from m3i_fast.evaluation.dense.correspondence import (
    measure_correspondence,
    patch_correspondence,
    pixel_tokens,
    position_means,
    two_crops,
)

NO_MEANS = torch.zeros((), dtype=torch.float64)


def _boxes(num: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    corner, side = torch.rand(num, 2, 2, generator=rng) * 20, 44 + torch.rand(num, 2, 2) * 20
    flip = torch.randint(0, 2, (num, 2, 1), generator=rng).float()
    return torch.cat([corner, side, flip], -1)


def _centres(boxes: torch.Tensor, grid: int) -> torch.Tensor:
    """[B, 5] -> [B, N, 2]: patch centres in pixels of the whole image, patch by patch."""
    result = torch.empty(len(boxes), grid * grid, 2)
    for i, (y, x, height, width, flip) in enumerate(boxes.tolist()):
        for n in range(grid * grid):
            row, column = (n // grid + 0.5) / grid, (n % grid + 0.5) / grid
            column = 1 - column if flip else column
            result[i, n] = torch.tensor([y + height * row, x + width * column])
    return result


def _on_a_cone(centres: torch.Tensor) -> torch.Tensor:
    """Features whose cosine falls with distance in the image."""
    angle = centres / 90 * math.pi / 2
    return torch.cat([angle.sin(), angle.cos()], -1)


def test_features_of_place_are_found_and_noise_is_chance() -> None:
    boxes, grid = _boxes(64), 8
    views = tuple(torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8) for _ in range(2))
    placed = tuple(_on_a_cone(_centres(boxes[:, v], grid)) for v in range(2))
    share, chance, asked = patch_correspondence(placed, NO_MEANS, views, boxes)  # type: ignore[arg-type]
    assert float(share.min()) > 0.99 and int(asked.min()) > 10
    assert 0.05 < float(chance.mean()) < 9 / 64
    noise = tuple(torch.randn(64, 64, 32) for _ in range(2))
    share, chance, _ = patch_correspondence(noise, NO_MEANS, views, boxes)  # type: ignore[arg-type]
    assert float(share.mean()) == pytest.approx(float(chance.mean()), abs=0.02)


def test_a_loop_agrees() -> None:
    boxes, grid, num = _boxes(5), 4, 5
    views = tuple(torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8) for _ in range(2))
    plain = views[1].clone()
    plain[:, :, :8] = 255  # the first row of patches has no contrast
    tokens = tuple(torch.randn(num, 16, 6) for _ in range(2))
    means = torch.randn(16, 6, dtype=torch.float64)
    share, _, asked = patch_correspondence(tokens, means, (views[0], plain), boxes)  # type: ignore[arg-type]
    first, second = _centres(boxes[:, 0], grid), _centres(boxes[:, 1], grid)
    for i in range(num):
        y, x, height, width, _ = boxes[i, 0].tolist()
        hits = []
        for n in range(4, 16):
            down, across = second[i, n].tolist()
            if not (y < down < y + height and x < across < x + width):
                continue
            scores = torch.cosine_similarity(
                (tokens[1][i, n] - means[n])[None], tokens[0][i] - means
            )
            offset = (first[i, int(scores.argmax())] - second[i, n]).abs()
            hits.append(
                float(offset[0]) <= height / grid + 1e-4 and float(offset[1]) <= width / grid + 1e-4
            )
        assert int(asked[i]) == len(hits)
        assert float(share[i]) == pytest.approx(sum(hits) / len(hits))


def test_pixels_find_themselves() -> None:
    view = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 32, 32, 0]]).expand(3, 2, 5)
    tokens = pixel_tokens(view, 4)
    share, chance, asked = patch_correspondence((tokens, tokens), NO_MEANS, (view, view), boxes)
    assert share.tolist() == [1.0] * 3 and asked.tolist() == [16] * 3
    assert chance.tolist() == pytest.approx([(4 * 4 + 8 * 6 + 4 * 9) / 16 / 16] * 3)


def _fields(boxes: torch.Tensor, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of both views: waves over the picture, of each picture its own."""
    rng = torch.Generator().manual_seed(1)
    waves = torch.randn(len(boxes), 2, 64, generator=rng) / 6
    phase = torch.rand(len(boxes), 1, 64, generator=rng) * 2 * math.pi
    first, second = ((_centres(boxes[:, v], grid) @ waves + phase).sin() for v in range(2))
    return first, second


def test_a_code_of_the_position_is_chance_and_hides_nothing() -> None:
    boxes, grid = _boxes(128), 8
    views = tuple(torch.randint(0, 256, (128, 3, 64, 64), dtype=torch.uint8) for _ in range(2))
    cells = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    code = torch.cat([(cells / 4).sin(), (cells / 4).cos(), torch.rand(64, 12)], -1)
    codes = (code.expand(128, -1, -1),) * 2
    share, chance, _ = patch_correspondence(codes, NO_MEANS, views, boxes)  # type: ignore[arg-type]
    assert float(share.mean()) > 2 * float(chance.mean())  # why the means are taken out
    means = position_means(part for view in codes for part in view.split(50))
    assert torch.equal(means, code.double())
    share, chance, _ = patch_correspondence(codes, means, views, boxes)  # type: ignore[arg-type]
    assert torch.allclose(share, chance, atol=1e-6)

    fields = _fields(boxes, grid)
    of_content, _, _ = patch_correspondence(fields, position_means(fields), views, boxes)  # type: ignore[arg-type]
    assert float(of_content.mean()) > 0.95
    padded = tuple(torch.cat([of, 5 * code.expand(128, -1, -1)], -1) for of in fields)
    both, _, _ = patch_correspondence(padded, position_means(padded), views, boxes)  # type: ignore[arg-type]
    assert float((both - of_content).abs().mean()) < 1e-3


def test_position_means_are_over_pictures_of_both_views() -> None:
    views = [torch.randn(7, 16, 6), torch.randn(9, 16, 6)]
    assert torch.allclose(position_means(views), torch.cat(views).double().mean(0), atol=1e-12)


def _pictures(num: int) -> list[torch.Tensor]:
    """Smooth random pictures [H, W, 3] uint8, of different sizes."""
    rng = torch.Generator().manual_seed(2)
    coarse = (torch.rand(1, 3, 9, 9, generator=rng) for _ in range(num))
    sizes = [(90 + i, 120 - i) for i in range(num)]
    smooth = (
        torch.nn.functional.interpolate(of, size=size, mode="bicubic").clamp(0, 1)
        for of, size in zip(coarse, sizes, strict=True)
    )
    return [(255 * of[0]).to(torch.uint8).permute(1, 2, 0).contiguous() for of in smooth]


def test_crops_of_ones_own_pictures_are_found_again() -> None:
    pictures = _pictures(24)
    first, second, boxes = two_crops(pictures, torch.arange(24), size=64, seed=0)
    for box, picture in zip(boxes, pictures, strict=True):
        y, x, height, width, flip = box.unbind(1)
        assert bool((y >= 0).all() and (y + height <= picture.shape[0]).all())
        assert bool((x >= 0).all() and (x + width <= picture.shape[1]).all())
        share = height * width / (picture.shape[0] * picture.shape[1])
        assert bool((share > 0.45).all()) and set(flip.tolist()) <= {0.0, 1.0}
    assert set(boxes[..., 4].flatten().tolist()) == {0.0, 1.0}

    def embed(views: torch.Tensor) -> torch.Tensor:
        return pixel_tokens(views, 8)

    def pairs() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        split = (each.split(7) for each in (first, second, boxes))
        return list(zip(*split, strict=True))  # type: ignore[arg-type]

    found = measure_correspondence(embed, pairs, torch.device("cpu"))
    means = position_means(embed(view) for view in (first, second))
    tokens = (embed(first), embed(second))
    share, chance, asked = patch_correspondence(tokens, means, (first, second), boxes)
    assert torch.equal(found.num_queries, asked)
    torch.testing.assert_close(found.share, share, equal_nan=True)
    torch.testing.assert_close(found.chance, chance, equal_nan=True)
    has = asked > 0
    assert found.mean_share == pytest.approx(float(share[has].mean()))
    assert found.mean_share > 2 * found.mean_chance > 0
    mirrored = boxes.clone()
    mirrored[:, 0, 4] = 1 - boxes[:, 0, 4]
    wrong = patch_correspondence(tokens, means, (first, second), mirrored)[0]
    assert float(wrong.nanmean()) < found.mean_share - 0.1  # the flip in a box matters


def test_a_crop_depends_on_the_seed_and_the_position_alone() -> None:
    pictures = _pictures(5)
    whole = two_crops(pictures, torch.arange(5), size=32, seed=0)
    part = two_crops(pictures[3:], torch.arange(3, 5), size=32, seed=0)
    assert all(torch.equal(a[3:], b) for a, b in zip(whole, part, strict=True))
    other = two_crops(pictures, torch.arange(5), size=32, seed=1)
    assert not torch.equal(whole[2], other[2])


def test_no_pairs_are_an_error() -> None:
    with pytest.raises(ValueError, match="pairs: expected batches of two views"):
        measure_correspondence(lambda views: views, list, torch.device("cpu"))
