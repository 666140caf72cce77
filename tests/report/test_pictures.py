import base64
import io

import numpy as np
from PIL import Image

from m3i_fast.report.pictures import Inline, inline, pair_pictures, pca_card, retrieval_card
from tests.report import sample_run


def _decoded(picture: Inline) -> np.ndarray:
    content = base64.b64decode(picture.uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


def test_a_picture_is_inlined_without_loss() -> None:
    picture = sample_run.photograph("chelsea")
    got = inline(picture, "a cat")
    np.testing.assert_array_equal(_decoded(got), picture)
    assert (got.width, got.height, got.alt) == (451, 300, "a cat")


def test_only_small_pictures_keep_their_pixels_when_enlarged() -> None:
    picture = sample_run.photograph("chelsea")
    assert not inline(picture, "x").pixelated
    assert inline(sample_run.resized(picture), "x").pixelated


def test_own_cells_show_their_picture_and_hide_the_other() -> None:
    pair = sample_run.mixed_pair()
    got = [_decoded(picture) for picture in pair_pictures(pair).own_cells]
    shown = [picture[..., 3] == 255 for picture in got]
    np.testing.assert_array_equal(shown[0], pair.mask.repeat(16, 0).repeat(16, 1))
    np.testing.assert_array_equal(shown[1], ~shown[0])
    for picture, mine, view in zip(got, shown, pair.view_a, strict=True):
        np.testing.assert_array_equal(picture[mine][:, :3], view[mine])
        assert not picture[~mine].any()


def test_boxes_keep_their_place_and_their_mirror() -> None:
    box = pair_pictures(sample_run.mixed_pair()).boxes_b[1]
    assert [box.y, box.x, box.height, box.width, box.mirrored] == [100, 210, 250, 240, True]


def test_colours_are_rounded_to_bytes() -> None:
    item = sample_run.patch_pictures(1)[0]
    got = _decoded(pca_card(item).trained)
    np.testing.assert_allclose(got / 255, item.trained, atol=0.5 / 255 + 1e-6)


def test_the_right_picture_is_named_as_such() -> None:
    card = retrieval_card(sample_run.retrieval_rows()[0])
    marked = ["(the right one)" in picture.alt for picture in card.trained.pictures]
    assert marked.index(True) == card.trained.right and marked.count(True) == 1
