"""Synthetic pictures have what makes photographs cost what they cost to decode."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from skimage import data as photographs

from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.sources import synthetic


def spectral_slope(picture: Image.Image) -> float:
    """Exponent of the radial power spectrum between 0.01 and 0.4 cycles a pixel."""
    gray = np.asarray(picture.convert("L"), dtype=np.float64)
    gray -= gray.mean()
    window = np.outer(np.hanning(gray.shape[0]), np.hanning(gray.shape[1]))
    power = np.abs(np.fft.fft2(gray * window)) ** 2
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in gray.shape), indexing="ij"))
    edges = np.geomspace(0.01, 0.4, 16)
    bins = np.digitize(frequency.ravel(), edges)
    mean = [power.ravel()[bins == i].mean() for i in range(1, 16)]
    return float(np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(mean), 1)[0])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.build(tmp_path_factory.mktemp("synthetic") / "data", num_samples=12)


def pictures(path: Path) -> list[bytes]:
    tars = sorted(str(tar) for tar in path.glob("*.tar"))
    return [row["jpg"] for row in webdataset.WebDataset(tars, shardshuffle=False)]


def test_shape_size_and_kind_of_jpeg(path: Path) -> None:
    sizes = [len(raw) for raw in pictures(path)]
    assert len(sizes) == 12
    assert 60_000 < np.mean(sizes) < 100_000
    for raw in pictures(path):
        picture = Image.open(io.BytesIO(raw))
        assert picture.size == (500, 375) and picture.mode == "RGB"
        assert "progressive" not in picture.info
        assert [component[1:3] for component in picture.layer] == [(2, 2), (1, 1), (1, 1)]


def test_spectrum_and_colour_are_those_of_photographs(path: Path) -> None:
    photos = [
        Image.fromarray(getattr(photographs, n)()) for n in ("astronaut", "coffee", "chelsea")
    ]
    slopes = [spectral_slope(photo.resize((500, 375))) for photo in photos]
    ours = [Image.open(io.BytesIO(raw)) for raw in pictures(path)]
    assert min(slopes) - 0.5 < np.mean([spectral_slope(p) for p in ours]) < max(slopes) + 0.5
    saturation = [np.asarray(p.convert("HSV"))[..., 1].mean() for p in ours]
    assert 30 < np.mean(saturation) < 150


def test_same_bytes_on_every_run_and_a_prefix_stays_equal(path: Path, tmp_path: Path) -> None:
    again = synthetic.build(tmp_path / "again", num_samples=12)
    assert (path / "manifest.json").read_bytes() == (again / "manifest.json").read_bytes()
    fewer = synthetic.build(tmp_path / "fewer", num_samples=4)
    assert set(pictures(fewer)) < set(pictures(path))
    other = synthetic.build(tmp_path / "other", num_samples=4, seed=1)
    assert not set(pictures(other)) & set(pictures(path))


def test_every_picture_has_a_caption_and_a_label(path: Path) -> None:
    split = verify(path).splits["train"]
    assert split.num_captions == split.num_labels == split.num_samples == 12
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        synthetic.build(path, num_samples=0)
